"""`rarefy sweep`: methods x budgets on one frontier."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..catalogue import Entry
from ..errors import BadInput
from ..fit import calibrate
from ..frontier import Frontier, Judge, Point
from ..frontier import sweep as measure_all
from ..method import Sparse
from ..store.run import Run
from .build import check_names, make_plan, places
from .models import Opened, open_for_work, read_text
from .screen import Screen, points_table


@dataclass
class SweepRequest:
    """Everything `rarefy sweep` was asked for."""

    methods: list[str]
    model: str
    budgets: list[float]
    out: Path
    site: str = ""
    data: str = "stdlib"
    context: int = 512
    tokens: int = 20_000
    calibration: int = 20_000
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class SweepResult:
    """The frontier and what was said about it."""

    frontier: Frontier
    verdict: str

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"schema": 1, "verdict": self.verdict, "points": [p.as_json() for p in self.frontier.points]}

    def show(self, out: Path) -> None:
        """Print the table."""
        screen = Screen()
        points_table(screen, "", self.frontier.points)
        screen.say(self.verdict)
        screen.say(f"rarefy show {out}")


class Fitter:
    """Makes fitted plans for one model and one calibration text; calibration statistics are gathered once a budget."""

    def __init__(self, opened: Opened, calibration: list[Any], pattern: str, settings: dict[str, Any], *, sequential: bool = False):
        self.opened, self.calibration, self.pattern = opened, calibration, pattern
        self.settings, self.sequential = settings, sequential

    def __call__(self, card: Entry, budget: float) -> dict[str, Sparse]:
        plan = make_plan(self.opened.model, card, self.pattern, budget, self.settings)
        calibrate(self.opened.model, plan, self.calibration, sequential=self.sequential)
        return plan


def verdict(points: list[Point]) -> str:
    """Who wins where, in a sentence that holds up: by intervals of CE increase at each budget."""
    said = []
    for budget in sorted({p.budget for p in points if p.role != "dense"}):
        row = sorted((p for p in points if p.budget == budget and p.role != "dense"), key=lambda p: p.metrics["ce_increase"].mean)
        if len(row) < 2:
            continue
        first, second = row[0], row[1]
        a, b = first.metrics["ce_increase"], second.metrics["ce_increase"]
        clear = "clearly" if a.high < b.low else "not clearly"
        said.append(f"at {budget:.0%} kept {first.method} is best ({a.mean:+.3f} nats), {clear} ahead of {second.method} ({b.mean:+.3f})")
    return "; ".join(said) + "." if said else ""


def sweep(request: SweepRequest, *, screen: Screen) -> SweepResult:
    """Do it; points already in the folder are kept."""
    cards = {c.name: c for c in check_names(request.methods)}
    if any(c.unit == "latent" for c in cards.values()):
        raise BadInput("dictionaries are trained: use `rarefy fit` for each, then `rarefy judge RUN --against ...`")
    with screen.stage("open the model"):
        opened = open_for_work(request.model)
    record = {**asdict(request), "out": request.out.name}
    with Run(request.out, made={"command": "sweep", "request": record, "model": opened.card(), "seed": 0}) as run:
        for card in cards.values():
            places(opened.model, card, request.site)
        with screen.stage("read text"):
            text = read_text(
                request.data, opened, context=request.context, fit_tokens=request.calibration, judge_tokens=request.tokens
            )
        with screen.stage("dense model") as update:
            judge = Judge(opened.model, text.judge)
            update(f"{judge.tokens:,} held-out tokens of {judge.documents} documents")
        fitter = Fitter(opened, text.fit, request.site, request.settings)
        with screen.stage(f"measure {len(cards)} methods at {len(request.budgets)} budgets") as update:
            frontier = measure_all(
                judge, list(cards), request.budgets, lambda name, budget: fitter(cards[name], budget),
                path=request.out / "points.jsonl", on_point=lambda p: update(f"{p.method} {p.budget:g}"),
            )
        units = sorted({c.unit for c in cards.values()})
        frontier.points[:0] = [judge.dense(unit) for unit in units]
        result = SweepResult(frontier, verdict(frontier.points))
        from .report import sweep_report, write_report

        write_report(request.out, sweep_report(request, opened, text, frontier, result.verdict, screen, run))
        return result
