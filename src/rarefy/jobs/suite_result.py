"""The planted suite's lines as tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..plots import grid_svg
from ..store.atomic import write_atomic
from .screen import Screen
from .suite_measures import MEASURES

SHOWN = ("l0", "fvu", "pursued", "mcc", "f1", "span", "absorbed", "shared", "size", "bits", "linear", "dead")
"""Columns of the printed tables; --json has all."""


@dataclass
class SuiteResult:
    """Every line of a suite, those of other methods that the folder holds too."""

    suite: str
    methods: list[str]
    cells: Sequence[Any]
    lines: list[dict[str, Any]]

    def of(self, cell: str) -> list[dict[str, Any]]:
        """A cell's lines: baselines as they were written, then methods in the order asked for."""
        rank = {name: i for i, name in enumerate(self.methods)}
        return sorted((line for line in self.lines if line["cell"] == cell), key=lambda line: rank.get(line["method"], -1))

    def mean(self, cell: str, method: str, measure: str) -> float:
        """Mean over seeds, NaN where it was not measured."""
        return next((spread(line, measure)[0] for line in self.of(cell) if line["method"] == method), math.nan)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"schema": 1, "suite": self.suite, "measures": MEASURES, "lines": self.lines}

    def show(self, out: Path) -> None:
        """Print the tables: of the planted suite one a kind, of the phase diagram the matched cosine a cell."""
        screen = Screen()
        for cell in self.cells if self.suite == "planted" else ():
            rows = self.of(cell.name)
            shown = [m for m in SHOWN if any(m in line["seeds"][0] for line in rows)]
            screen.table(cell.name, ["method", *shown], [[short(line["method"]), *(figure(line, m) for m in shown)] for line in rows])
        names = list(dict.fromkeys(line["method"] for cell in self.cells for line in self.of(cell.name)))
        table = [[self.mean(cell.name, name, "mcc") for cell in self.cells] for name in names]
        rows, columns = [short(name) for name in names], [cell.kind for cell in self.cells]
        if self.suite == "phase":                           # as many cells as a table has room for, below one another
            table, rows, columns = [list(column) for column in zip(*table, strict=True)], [cell.name for cell in self.cells], rows
        said = [[row, *("-" if math.isnan(v) else f"{v:.3f}" for v in vs)] for row, vs in zip(rows, table, strict=True)]
        screen.table("mean matched cosine (mcc)", ["", *columns], said)
        if self.suite == "planted":
            screen.say("; ".join(f"{name}: {MEASURES[name]}" for name in SHOWN))
        screen.say("± is the standard deviation over seeds of the initialisation, on the same rows")
        screen.say(f"lines in {out / 'results.jsonl'}, pictures in {out}")


def short(method: str) -> str:
    """Without the family that all share."""
    return method.removeprefix("latents/")


def spread(line: dict[str, Any], measure: str) -> tuple[float, float]:
    """(mean, standard deviation) over seeds; the second NaN for one seed."""
    values = [seed[measure] for seed in line["seeds"] if seed.get(measure) is not None]
    if not values:
        return math.nan, math.nan
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else math.nan


def figure(line: dict[str, Any], measure: str) -> str:
    """"0.94±.01", or "-" where it was not measured."""
    mean, deviation = spread(line, measure)
    if math.isnan(mean):
        return "-"
    digits = 1 if measure in ("l0", "bits") else 2
    return f"{mean:.{digits}f}" + ("" if math.isnan(deviation) else f"±{deviation:.{digits}f}".replace("±0.", "±."))


def write_pictures(out: Path, result: SuiteResult) -> None:
    """mcc.svg of methods by kinds; or phase-METHOD.svg of L0 by features a dimension, one a method."""
    names = list(dict.fromkeys(line["method"] for cell in result.cells for line in result.of(cell.name)))
    if result.suite == "planted":
        values = [[result.mean(cell.name, name, "mcc") for cell in result.cells] for name in names]
        kinds, rows = [cell.kind for cell in result.cells], [short(name) for name in names]
        svg = grid_svg("Mean matched cosine of recovered features", kinds, rows, values, across="kind of planted data")
        write_atomic(out / "mcc.svg", svg.encode())
        return
    sizes, l0s = sorted({cell.features for cell in result.cells}), sorted({cell.l0 for cell in result.cells}, reverse=True)
    cells = {(cell.features, cell.l0): cell.name for cell in result.cells}
    for name in names:
        values = [[result.mean(cells.get((size, l0), ""), name, "mcc") for size in sizes] for l0 in l0s]
        svg = grid_svg(f"Features recovered by {name}", [str(s) for s in sizes], [f"L0 {v:g}" for v in l0s], values, across="planted features")
        write_atomic(out / f"phase-{name.replace('/', '__')}.svg", svg.encode())
