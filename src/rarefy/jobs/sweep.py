"""`rarefy sweep`: methods x budgets on one frontier."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..catalogue import FAMILY_OF_UNIT, Entry
from ..errors import BadInput
from ..fit import calibrate
from ..frontier import Frontier, Judge
from ..frontier import sweep as measure_all
from ..method import Sparse
from .build import check_budget, check_names, check_settings, make_plan, places, refuse_untrained, settings_for
from .folder import refuse_early, run_folder
from .models import Opened, check_context, cut_text, digest, opened, probe, read_documents
from .report import sweep_report, verdict, write_report
from .request import Request
from .screen import Screen, points_table

MAY_GROW = ("request.methods", "request.budgets")
"""In these a sweep that goes on may differ: the points measured stay what they are."""


@dataclass
class SweepRequest(Request):
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

    def check(self) -> dict[str, Entry]:
        """Cards of the methods. Raises BadInput for whatever can be seen to be wrong without a model or data."""
        cards = check_names(self.methods)
        if dictionaries := [card.name for card in cards if card.unit == "latent"]:
            raise BadInput(f"{dictionaries[0]} is a dictionary and has to be trained: use `rarefy fit`, then `rarefy judge RUN --against ...`")
        refuse_untrained(cards)
        check_settings(cards, self.settings)
        if not self.budgets:
            raise BadInput("no budget named; give fractions of units kept, such as 0.3,0.5")
        for budget in self.budgets:
            check_budget(budget)
        check_context(self.context, tokens=self.tokens, calibration=self.calibration)
        return {card.name: card for card in cards}


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
        points = self.frontier.points
        points_table(screen, "", [p for i, p in enumerate(points) if p.role != "dense" or i == 0])      # one dense row for all units
        if self.verdict:
            screen.say(self.verdict)
        screen.say(f"rarefy show {out}")


class Fitter:
    """Makes fitted plans for one model and one calibration text.

    Args:
        sequential: layer after layer, as `rarefy apply` and `fit` do; otherwise all in one pass over the dense model.
    """

    def __init__(self, opened: Opened, calibration: list[Any], pattern: str, settings: dict[str, Any], *, sequential: bool = False):
        self.opened, self.calibration, self.pattern = opened, calibration, pattern
        self.settings, self.sequential = settings, sequential

    def __call__(self, card: Entry, budget: float) -> dict[str, Sparse]:
        plan = make_plan(self.opened.model, card, self.pattern, budget, settings_for(card, self.settings))
        calibrate(self.opened.model, plan, self.calibration, sequential=self.sequential)
        return plan

    def rehearse(self, card: Entry, budget: float) -> None:
        """Raise BadInput for a budget or setting that the method refuses at any of its sites; at one place of each shape."""
        tried = set()
        for name, site in places(self.opened.model, card, self.pattern).items():
            module = self.opened.model.get_submodule(site.module_path)
            shape = tuple(p.shape for p in module.parameters())
            if shape not in tried:
                tried.add(shape)
                make_plan(self.opened.model, card, name, budget, settings_for(card, self.settings))


def role_of(card: Entry) -> str:
    """What a method is on a frontier."""
    return "baseline" if card.baseline else "method"


def sweep(request: SweepRequest, *, screen: Screen) -> SweepResult:
    """Do it; points already in the folder are kept, also where more methods or budgets are asked for now."""
    cards = request.check()
    refuse_early(request.out, "sweep", request.record(), MAY_GROW)
    docs = read_documents(request.data, screen)
    model = opened(request.model, screen, causal=True)
    for card in cards.values():
        places(model.model, card, request.site)
    text = cut_text(docs, model, screen, context=request.context, fit_tokens=request.calibration, judge_tokens=request.tokens)
    fitter = Fitter(model, text.fit, request.site, request.settings)
    for card in cards.values():
        for budget in request.budgets:
            fitter.rehearse(card, budget)
    probe(model, text)
    made = {"command": "sweep", "request": request.record(), "model": model.card(), "text": digest([*text.fit, *text.judge])}
    with run_folder(request.out, made, MAY_GROW):
        with screen.stage("dense model") as update:
            judge = Judge(model.model, text.judge)
            update(f"CE {judge.dense('').metrics['ce'].mean:.3f} on {judge.tokens:,} held-out tokens, documents: {len(text.judge_names)}")
        with screen.stage(f"measure {len(cards)} methods at {len(request.budgets)} budgets") as update:
            frontier = measure_all(
                judge, list(cards), request.budgets, lambda name, budget: fitter(cards[name], budget),
                path=request.out / "points.jsonl", on_point=lambda p: update(f"{p.method} {p.budget:g}"),
            )
        rank = {name: i for i, name in enumerate(cards)}
        frontier.points.sort(key=lambda p: (rank.get(p.method, len(rank)), p.method, p.budget))
        units = {FAMILY_OF_UNIT[p.unit]: p.unit for p in frontier.points}
        frontier.points[:0] = [judge.dense(unit) for unit in units.values()]
        result = SweepResult(frontier, verdict(frontier.points))
        write_report(request.out, sweep_report(request, model, text, frontier, screen))
        return result
