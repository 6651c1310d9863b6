"""`rarefy judge`: a fitted run on held-out text, next to dense and to other methods."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..catalogue import Entry, entry
from ..errors import BadInput
from ..frontier import Frontier, Judge, Point
from ..store.run import read_run
from ..tasks.concepts import label_batches
from .build import check_names, dictionary
from .dictionaries import ablate, describe, judge_dictionary
from .fit import saved_plan
from .models import Opened, Text, open_for_work, read_text
from .report import page, unit_panel, write_report
from .screen import Screen, points_table
from .sweep import Fitter, verdict


@dataclass
class JudgeResult:
    """Points of the run and of what it was compared with."""

    points: list[Point]
    extra: tuple[str, ...]
    verdict: str

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"schema": 1, "verdict": self.verdict, "points": [p.as_json() for p in self.points]}

    def show(self, out: Path) -> None:
        """Print the table."""
        screen = Screen()
        points_table(screen, "", self.points, self.extra)
        if self.verdict:
            screen.say(self.verdict)
        screen.say(f"rarefy show {out}")


def judge(run: Path, against: list[str], *, data: str, tokens: int, screen: Screen) -> JudgeResult:
    """Do it: reads what the run was fitted to, and judges on the documents that were held out from it."""
    made = read_run(run)["made"]
    if made.get("command") != "fit":
        raise BadInput(f"{run} was made by `rarefy {made.get('command')}`; judge takes runs of `rarefy fit`")
    request = made["request"]
    others = [name for name in against if name != "dense"]
    cards = check_names(others) if others else []
    plan = saved_plan(run)
    with screen.stage("open the model"):
        opened = open_for_work(request["model"])
        if opened.info.sha256 != made["model"]["sha256"]:
            then, now = made["model"]["sha256"][:12], opened.info.sha256[:12]
            raise BadInput(f"{run} was fitted to a model with other weights ({then}) than {request['model']} has now ({now})")
    with screen.stage("read text"):
        text = read_text(data or request["data"], opened, context=request["context"], fit_tokens=request["tokens"], judge_tokens=tokens)
    with screen.stage("dense model") as update:
        board = Judge(opened.model, text.judge)
        update(f"{board.tokens:,} held-out tokens of {board.documents} documents")
    work = _dictionaries if all(m.unit == "latent" for m in plan.values()) else _plans
    points, extra, latents = work(board, plan, cards, request, opened, text, screen)
    if "dense" in against:
        points.insert(0, board.dense(points[0].unit))
    said = verdict(points)
    unit = next(iter(plan.values())).unit
    plural = {"latent": "latents", "weight": "weights", "neuron": "neurons"}.get(unit, "attention")
    x = ("l0", "latents active a token") if unit == "latent" else ("density", "fraction kept")
    report = page(
        f"{run.name}: {', '.join(sorted({p.method for p in points if p.role == 'method'}))}", opened, text, data or request["data"],
        [unit_panel(plural, points, said, x=x)], screen, points=points, log=run / "log.jsonl", latents=latents,
    )
    write_report(run, report)
    Frontier(points).save(run / "points.jsonl")
    return JudgeResult(points, extra, said)


def _dictionaries(
    board: Judge, plan: dict[str, Any], cards: list[Entry], request: dict[str, Any], opened: Opened, text: Text, screen: Screen,
) -> tuple[list[Point], tuple[str, ...], Any]:
    from ..site import sites
    from ..streams import LiveStream, windows

    if request.get("target"):
        raise BadInput("this run holds transcoders; `judge` splices autoencoders so far")
    (site,) = sites(opened.model, request["site"] or f"layers.{opened.model.config.num_hidden_layers // 2}.resid_post")
    for card in cards:
        if card.unit != "latent":
            raise BadInput(f"{card.name} selects {card.unit}s; compare dictionaries with dictionaries")
        if card.fitted != "none":
            raise BadInput(f"{card.name} must be trained to be compared with: name both in one `rarefy fit {card.name},...`")
        made = dictionary(card, sites(opened.model, site)[site].d, width=request["width"], k=request["k"], seed=request["seed"], settings={})
        made.initialise(next(LiveStream(opened.model, site, windows(text.fit), request["batch"], seed=0).batches())[0])
        plan[card.name] = made.eval()
    points, latents = [], None
    with screen.stage(f"splice {len(plan)} dictionaries at {site}"):
        lost = ablate(board, site)
        for name, method in plan.items():
            role = "baseline" if entry(name).baseline else "method"
            points.append(judge_dictionary(board, site, method, lost, role=role, name=name))
    with screen.stage("describe latents"):
        first = next(n for n in plan if not entry(n).baseline)
        labels, sides = label_batches(text.judge, text.judge_docs)
        latents = describe(board, site, plan[first], opened.tokenizer, labels=labels, sides=sides, doc_names=text.judge_names)
    return points, ("l0", "fvu", "loss_recovered", "dead"), latents


def _plans(
    board: Judge, plan: dict[str, Any], cards: list[Entry], request: dict[str, Any], opened: Opened, text: Text, screen: Screen,
) -> tuple[list[Point], tuple[str, ...], Any]:
    card = entry(request["methods"][0])
    points = []
    with screen.stage(f"judge {card.name}"):
        role = "baseline" if card.baseline else "method"
        points.append(board.measure(plan, method=card.name, unit=card.unit, role=role, budget=request["budget"]))
    fitter = Fitter(opened, text.fit, request["site"], {}, sequential=True)
    for other in cards:
        with screen.stage(f"judge {other.name}"):
            fitted = fitter(other, request["budget"])
            points.append(board.measure(
                fitted, method=other.name, unit=other.unit, role="baseline" if other.baseline else "method", budget=request["budget"],
            ))
    return points, (), None
