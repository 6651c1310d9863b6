"""The static frontier: well-formed, safe, and its front agrees with the definition."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ET

import pytest

from rarefy.errors import BadInput
from rarefy.plots import axis_value, frontier_svg, pareto_front

NS = "{http://www.w3.org/2000/svg}"


def test_every_method_is_drawn_and_named(report):
    for unit in report["units"]:
        root = ET.fromstring(frontier_svg(unit))
        said = [t.text for t in root.iter(NS + "text")]
        drawn = {p["method"]: p["role"] for p in unit["points"] if unit["y"]["key"] in p["metrics"]}
        for name, role in drawn.items():
            assert (name + " (baseline)" if role == "baseline" else name) in said
        marks = [p for p in root.iter(NS + "path") if p.get("transform")]
        assert len(marks) == sum(p["role"] != "dense" and unit["y"]["key"] in p["metrics"] for p in unit["points"])


def test_marks_lie_inside_and_cost_runs_right(report):
    unit = report["units"][1]
    root = ET.fromstring(frontier_svg(unit))
    spots = [tuple(map(float, p.get("transform")[10:-1].split())) for p in root.iter(NS + "path") if p.get("transform")]
    assert all(0 < x < 760 and 0 < y < 430 for x, y in spots)
    sparse = [p for p in unit["points"] if p["role"] != "dense"]
    first = sorted((p for p in sparse if p["method"] == sparse[0]["method"]), key=lambda p: p["density"])
    xs, ys = zip(*spots[: len(first)], strict=True)
    assert list(xs) == sorted(xs) and list(ys) == sorted(ys)  # harm falls with density, and SVG's y grows downwards


def test_front_is_what_no_other_beats():
    rng = random.Random(3)
    for better in ("low", "high"):
        points = [
            {
                "method": str(i),
                "role": "method",
                "density": rng.random(),
                "budget": 0.5,
                "cost": {},
                "metrics": {"q": {"mean": rng.random()}},
            }
            for i in range(63)
        ]
        front = pareto_front(points, "density", "q", better)
        sign = 1 if better == "low" else -1
        value = lambda p: sign * p["metrics"]["q"]["mean"]  # noqa: E731,B023
        for p in points:
            best_at_cost = min(value(q) for q in points if q["density"] <= 1.02 * p["density"])
            assert (p in front) == (value(p) == best_at_cost)


def test_cost_axis_is_a_fraction_of_dense():
    point = {"role": "method", "cost": {"flops": 3.0, "dense_flops": 12.0, "ms": 1.0}, "metrics": {}}
    assert axis_value(point, "flops") == 0.25 and axis_value(point, "ms") is None


def test_hostile_names_and_no_points(report):
    unit = report["units"][1]
    unit["points"][1]["method"] = "<script>\ud800\x00&"
    assert "<script" not in frontier_svg(unit)
    ET.fromstring(frontier_svg(unit).encode())
    unit["points"] = unit["points"][:1]
    with pytest.raises(BadInput, match="no point has both"):
        frontier_svg(unit)


def test_one_point_alone(report):
    unit = report["units"][2]
    unit["points"] = unit["points"][1:2]
    drawn = ET.fromstring(frontier_svg(unit))
    marks = [e for e in drawn.iter() if e.tag.endswith("path") and e.get("transform", "").startswith("translate")]
    assert len(marks) == 1 and unit["points"][0]["method"].split("/")[1] in "".join(drawn.itertext())
    assert all(0 < float(v) < 2000 for v in marks[0].get("transform").removeprefix("translate(").removesuffix(")").split())
