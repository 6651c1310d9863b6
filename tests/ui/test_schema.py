"""The check names the path of what is wrong; writing and reading give the same report back."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from rarefy.errors import BadInput, Damaged, Unsupported
from rarefy.ui import read_report, tidy, validate, write_report

BREAK = [
    (lambda r: r.pop("title"), "report.title"),
    (lambda r: r["made"].update(seconds="4"), "made.seconds"),
    (lambda r: r["made"]["versions"].update(torch=2), "made.versions.torch"),
    (lambda r: r["units"][0].update(unit="atoms"), "units[0].unit"),
    (lambda r: r["units"][1]["y"].update(better="big"), "units[1].y.better"),
    (lambda r: r["units"][1]["points"][3].update(role="hero"), "units[1].points[3].role"),
    (
        lambda r: r["units"][1]["points"][3]["metrics"]["kl"].update(low=float("nan")),
        "units[1].points[3].metrics.kl.low",
    ),
    (lambda r: r["units"][1]["points"][3]["cost"].update(flops=True), "units[1].points[3].cost.flops"),
    (lambda r: r["curves"][2]["series"]["fvu"].pop(), "curves[2].series.fvu"),
    (lambda r: r["curves"][0]["series"]["loss"].__setitem__(7, float("inf")), "curves[0].series.loss[7]"),
    (lambda r: r["latents"]["table"]["f1"].pop(), "latents.table.f1"),
    (lambda r: r["latents"]["table"]["concept"].__setitem__(5, 99), "latents.table.concept[5]"),
    (lambda r: r["latents"]["top"].pop(), "latents.top"),
    (lambda r: next(t for t in r["latents"]["top"] if t)["contexts"][1].update(pos=32), "contexts[1].pos"),
    (
        lambda r: next(t for t in r["latents"]["top"] if t)["contexts"][1]["tokens"].__setitem__(0, -1),
        "contexts[1].tokens[0]",
    ),
    (lambda r: r.update(notes=[1]), "notes[0]"),
]


@pytest.mark.parametrize("damage, path", BREAK, ids=[p for _, p in BREAK])
def test_names_the_path(report, damage, path):
    assert validate(report) is report
    damage(report)
    with pytest.raises(BadInput) as caught:
        validate(report)
    assert path in str(caught.value) and "\n" not in str(caught.value)


def test_other_schema_is_refused(report):
    report["schema"] = 2
    with pytest.raises(Unsupported, match="schema 2"):
        validate(report)


def test_write_read(report, tmp_path):
    report["latents"]["tokens"][0] = "\ud800</script>"
    path = write_report(tmp_path / "run", report)
    assert path.read_bytes().isascii() and read_report(tmp_path / "run") == report


def test_tidy_makes_plain_numbers():
    made = tidy({"a": float("nan"), "b": (np.float32(1.5), np.arange(2)), "c": True})
    assert json.dumps(made, allow_nan=False) == '{"a": null, "b": [1.5, [0, 1]], "c": true}'
    with pytest.raises(BadInput, match="object"):
        tidy(object())


def test_refused_report_leaves_the_old_one(report, tmp_path):
    path = write_report(tmp_path, report)
    before = path.read_bytes()
    with pytest.raises(BadInput):
        write_report(tmp_path, {**report, "title": None})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["report.json"]


def test_absent_and_damaged(tmp_path):
    with pytest.raises(BadInput, match=r"no report\.json"):
        read_report(tmp_path)
    for junk in (b'{"schema": 1', b"[" * 100_000, b"\xff\xfe", b'{"schema": 1, "title": 3}'):
        (tmp_path / "report.json").write_bytes(junk)
        with pytest.raises(Damaged):
            read_report(tmp_path)
