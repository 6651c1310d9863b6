"""`rarefy judge`: a fitted run on held-out text, next to dense and to other methods."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..builtin.corpus import Text
from ..catalogue import Entry, entry
from ..errors import BadInput, Damaged
from ..frontier import Judge, Point
from ..latents.dictionary import Dictionary
from ..method import Sparse
from ..store.atomic import write_atomic
from ..store.lines import to_lines
from ..store.lock import RunLock
from ..store.run import read_run
from ..streams import LiveStream, windows
from ..tasks.concepts import label_batches
from .build import check_names, dictionary, settings_for
from .dictionaries import ablate, describe, judge_dictionary
from .fit import FitRequest, saved_plan
from .models import Opened, check_context, cut_text, digest, opened, probe, read_documents
from .report import PLURAL, page, unit_panel, verdict, write_report
from .screen import Screen, points_table
from .sweep import Fitter, role_of

LATENT_METRICS = ("l0", "fvu", "loss_recovered", "dead")


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


@dataclass
class _Bench:
    """What every comparison of a run needs."""

    run: Path
    made: dict[str, Any]
    request: FitRequest
    plan: dict[str, Sparse]
    others: list[Entry]
    model: Opened
    text: Text
    board: Judge


def judge(run: Path, against: list[str], *, data: str, tokens: int, screen: Screen) -> JudgeResult:
    """Do it: reads what the run was fitted to, and judges on the documents that were held out from it."""
    made, request = _fitted(run)
    others = _others(request, against)
    check_context(request.context, tokens=tokens)
    plan = saved_plan(run, request.methods if entry(request.methods[0]).unit == "latent" else made["sites"])
    with RunLock(run):
        docs = read_documents(data or request.data, screen)
        model = opened(request.model, screen, causal=True)
        if model.info.sha256 != made["model"]["sha256"]:
            raise BadInput(
                f"{run} was fitted to other weights (sha256 {made['model']['sha256'][:12]}) than {request.model} has now "
                f"({model.info.sha256[:12]}); give it the model it was fitted to, or fit again"
            )
        text = cut_text(docs, model, screen, context=request.context, fit_tokens=request.tokens, judge_tokens=tokens)
        if not data and digest(text.fit) != made["text"]:
            raise BadInput(f"{request.data} is not the text that {run} was fitted to any more; fit again, or name the text to judge on with --data")
        probe(model, text)
        with screen.stage("dense model") as update:
            board = Judge(model.model, text.judge)
            update(f"CE {board.dense('').metrics['ce'].mean:.3f} on {board.tokens:,} held-out tokens, documents: {len(text.judge_names)}")
        return _report(_Bench(run, made, request, plan, others, model, text, board), "dense" in against, data or request.data, screen)


def _fitted(run: Path) -> tuple[dict[str, Any], FitRequest]:
    """What a run was made of."""
    made = read_run(run)["made"]
    if made.get("command") != "fit":
        raise BadInput(f"{run} was made by `rarefy {made.get('command')}`; judge takes runs of `rarefy fit`")
    if not {"request", "model", "sites", "target", "text"} <= made.keys():
        raise Damaged(f"{run} was made by another version of rarefy; make the run again")
    return made, FitRequest.of(made["request"], run)


def _others(request: FitRequest, against: list[str]) -> list[Entry]:
    """Cards of the methods to compare with that the run does not hold."""
    names = [name for name in against if name != "dense" and name not in request.methods]
    cards = check_names(names) if names else []
    unit = entry(request.methods[0]).unit
    for card in cards:
        if PLURAL[card.unit] != PLURAL[unit]:
            raise BadInput(f"{card.name} selects {card.unit}s and the run's methods {unit}s; compare like with like")
        if unit == "latent" and card.fitted != "none":
            both = ",".join([*request.methods, card.name])
            raise BadInput(f"{card.name} must be trained to be compared with: name both in one `rarefy fit {both} ...`")
        if unit == "latent" and request.target:
            raise BadInput(f"{card.name} gives back what it reads, but the run holds transcoders to {request.target}; leave it out of --against")
    return cards


def _report(bench: _Bench, dense: bool, data: str, screen: Screen) -> JudgeResult:
    latent = entry(bench.request.methods[0]).unit == "latent"
    points = _dictionaries(bench, screen) if latent else _plans(bench, screen)
    latents = _described(bench, screen) if latent else None
    said = verdict(points)
    if dense:
        points.insert(0, bench.board.dense(points[0].unit))
    axes: dict[str, Any] = {"x": ("l0", "latents active a token")} if latent else {}
    title = f"{bench.run.resolve().name}: {', '.join(dict.fromkeys(p.method for p in points if p.role == 'method'))}"
    report = page(
        title, bench.model, bench.text, data, [unit_panel(PLURAL[points[0].unit], points, said, **axes)], screen,
        points=points, log=bench.run / "log.jsonl", latents=latents, same=data == bench.request.data,
    )
    write_report(bench.run, report)
    write_atomic(bench.run / "points.jsonl", to_lines(p.as_json() for p in points if p.role != "dense"))
    return JudgeResult(points, LATENT_METRICS if latent else (), said)


def _dictionaries(bench: _Bench, screen: Screen) -> list[Point]:
    (site,), target, request = bench.made["sites"], bench.made["target"], bench.request
    for card in bench.others:
        live = LiveStream(bench.model.model, site, windows(bench.text.fit), request.batch, seed=request.seed)
        x_ND, y_ND = next(live.batches())
        settings = settings_for(card, request.settings)
        made = dictionary(card, x_ND.shape[1], width=request.width, k=request.k or 1, seed=request.seed, settings=settings)
        made.initialise(x_ND, y_ND)
        bench.plan[card.name] = made.eval()
    points = []
    with screen.stage(f"splice {'dictionaries' if len(bench.plan) > 1 else 'the dictionary'} at {target or site}") as update:
        lost = ablate(bench.board, target or site)
        for name, method in bench.plan.items():
            points.append(judge_dictionary(bench.board, site, method, lost, target=target, role=role_of(entry(name)), name=name))
            update(name)
    return points


def _described(bench: _Bench, screen: Screen) -> dict[str, Any]:
    """The latent browser of the run's first trained dictionary."""
    first = next((name for name in bench.request.methods if not entry(name).baseline), bench.request.methods[0])
    method, text = bench.plan[first], bench.text
    assert isinstance(method, Dictionary)
    with screen.stage(f"describe the latents of {first}"):
        labels, sides = label_batches(text.judge, text.judge_docs)
        return describe(
            bench.board, bench.made["sites"][0], method, bench.model.tokenizer, target=bench.made["target"], labels=labels, sides=sides,
            doc_names=text.judge_names,
        )


def _plans(bench: _Bench, screen: Screen) -> list[Point]:
    request, points = bench.request, []
    for card in [entry(request.methods[0]), *bench.others]:
        with screen.stage(f"judge {card.name}"):
            settings = settings_for(card, request.settings)
            fitter = Fitter(bench.model, bench.text.fit, request.site, settings, sequential=True)
            plan = fitter(card, request.budget or 1.0) if card in bench.others else bench.plan
            points.append(bench.board.measure(plan, method=card.name, unit=card.unit, role=role_of(card)))
    return points
