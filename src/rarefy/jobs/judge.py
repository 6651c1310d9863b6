"""`rarefy judge`: a fitted run on held-out text, next to dense and to other methods."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..builtin.corpus import Text
from ..catalogue import FAMILY_OF_UNIT, Entry, entry
from ..errors import BadInput, Damaged
from ..frontier import Judge, Point
from ..latents.dictionary import Dictionary
from ..method import Sparse
from ..store.atomic import write_atomic
from ..store.lines import to_lines
from ..store.lock import RunLock
from ..store.run import read_run
from ..store.sealed import seal
from ..streams import Flow, LiveStream, windows
from ..tasks.concepts import label_batches
from .build import check_names, dictionary, settings_for
from .dictionaries import describe, judge_dictionary
from .fit import FitRequest, saved_plan
from .flows import open_beside, plain
from .judge_error import error_parts
from .judge_joined import Lost, flow_in, judge_joined, told, verdicts
from .models import Opened, check_context, cut_text, digest, opened, probe, read_documents
from .report import page, unit_panel, verdict, write_report
from .screen import Screen, points_table
from .sweep import Fitter, role_of

LATENT_METRICS = ("l0", "fvu", "loss_recovered", "dead")


@dataclass
class JudgeResult:
    """Points of the run and of what it was compared with."""

    points: list[Point]
    extra: tuple[str, ...]
    verdict: str
    notes: list[str] = field(default_factory=list)
    """What dictionaries say of their error, and those of several sites of those."""
    errors: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name of each dictionary of one site -> where its error lies (`judge_error.ErrorParts`)."""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        more: dict[str, Any] = {"notes": self.notes} if self.notes else {}
        if self.errors:
            more["errors"] = self.errors
        return {"schema": 1, "verdict": self.verdict, **more, "points": [p.as_json() for p in self.points]}

    def show(self, out: Path) -> None:
        """Print the table."""
        screen = Screen()
        points_table(screen, "", self.points, self.extra)
        for line in (self.verdict, *self.notes):
            if line:
                screen.say(line)
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
    flow: Flow
    beside: Opened | None = None
    """The second model of a crosscoder of two."""


def judge(run: Path, against: list[str], *, data: str, tokens: int, screen: Screen) -> JudgeResult:
    """Do it: reads what the run was fitted to, and judges on the documents that were held out from it."""
    made, request = fitted_run(run)
    others = _others(request, against)
    check_context(request.context, tokens=tokens)
    plan = saved_plan(run, request.methods if entry(request.methods[0]).unit == "latent" else made["sites"])
    with RunLock(run):
        docs = read_documents(data or request.data, screen)
        model = opened(request.model, screen, causal=True)
        beside = open_beside(request.beside, model, screen)
        for spec, each, card in ((request.model, model, made["model"]), (request.beside, beside, made.get("beside", {}))):
            if each and each.info.sha256 != card["sha256"]:
                raise BadInput(
                    f"{run} was fitted to other weights (sha256 {card['sha256'][:12]}) than {spec} has now "
                    f"({each.info.sha256[:12]}); give it the model it was fitted to, or fit again"
                )
        text = cut_text(docs, model, screen, context=request.context, fit_tokens=request.tokens, judge_tokens=tokens)
        if not data and digest(text.fit) != made["text"]:
            raise BadInput(f"{request.data} is not the text that {run} was fitted to any more; fit again, or name the text to judge on with --data")
        probe(model, text)
        with screen.stage("dense model") as update:
            board = Judge(model.model, text.judge)
            update(f"CE {board.dense('').metrics['ce'].mean:.3f} on {board.tokens:,} held-out tokens, documents: {len(text.judge_names)}")
        bench = _Bench(run, made, request, plan, others, model, text, board, flow_in(made), beside)
        return _report(bench, "dense" in against, data or request.data, screen)


def fitted_run(run: Path) -> tuple[dict[str, Any], FitRequest]:
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
        if FAMILY_OF_UNIT[card.unit] != FAMILY_OF_UNIT[unit]:
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
    notes = _told(bench, screen) if latent and bench.flow.join else []
    errors = _errors(bench, points, notes, screen) if latent and not bench.flow.join else {}
    said = verdicts(points) if bench.flow.join else verdict(points)
    if dense:
        points.insert(0, bench.board.dense(points[0].unit))
    axes: dict[str, Any] = {"x": ("l0", "latents active a token")} if latent else {}
    title = f"{bench.run.resolve().name}: {', '.join(dict.fromkeys(p.method for p in points if p.role == 'method'))}"
    report = page(
        title, bench.model, bench.text, data, [unit_panel(FAMILY_OF_UNIT[points[0].unit], points, said, **axes)], screen,
        points=points, log=bench.run / "log.jsonl", latents=latents, notes=notes, same=data == bench.request.data,
    )
    write_report(bench.run, report)
    write_atomic(bench.run / "points.jsonl", to_lines(p.as_json() for p in points if p.role != "dense"))
    return JudgeResult(points, LATENT_METRICS if latent else (), said, notes, errors)


def _dictionaries(bench: _Bench, screen: Screen) -> list[Point]:
    flow, request = bench.flow, bench.request
    other, ids_NT = bench.beside.model if bench.beside else None, windows(bench.text.fit)
    for card in bench.others:
        live = LiveStream(bench.model.model, flow.sites, ids_NT, request.batch, join=flow.join, beside=other, seed=request.seed)
        x_ND, y_ND = next(live.batches())
        settings = settings_for(card, request.settings)
        d = plain(flow.widths(bench.model.model, ids_NT[:1], other)[0])
        made = dictionary(card, d, width=request.width, k=request.k or 1, seed=request.seed, settings=settings)
        made.initialise(x_ND, y_ND)
        bench.plan[card.name] = made.eval()
    points: list[Point] = []
    with screen.stage(f"splice {'dictionaries' if len(bench.plan) > 1 else 'the dictionary'} at {', '.join(flow.targets)}") as update:
        lost = Lost.of(bench.board, flow)
        for name, method in bench.plan.items():
            role = role_of(entry(name))
            if flow.join and isinstance(method, Dictionary):
                points += judge_joined(bench.board, flow, method, lost, name=name, role=role, beside=other)
            else:
                goal = flow.targets[0] if flow.transcodes else ""
                points.append(judge_dictionary(bench.board, flow.sites[0], method, lost.each[flow.targets[0]], target=goal, role=role, name=name))
            update(name)
    return points


def _told(bench: _Bench, screen: Screen) -> list[str]:
    """A sentence a trained dictionary about its sites; the figures behind it go to `joined.json` of the run."""
    records, said = {}, []
    with screen.stage("look at the sites that latents live at"):
        for name, method in bench.plan.items():
            if isinstance(method, Dictionary) and not entry(name).baseline:
                records[name], line = told(bench.board, bench.flow, method, name)
                said.append(line)
    write_atomic(bench.run / "joined.json", seal({"schema": 1, "dictionaries": records}))
    return said


def _errors(bench: _Bench, points: list[Point], notes: list[str], screen: Screen) -> dict[str, dict[str, Any]]:
    """Where the error of each dictionary of one site lies: a note of each that was trained, figures at its point, all in `errors.json`."""
    records, flow = {}, bench.flow
    with screen.stage("split the error") as update:
        for at, point in enumerate(points):
            target = flow.targets[0] if flow.transcodes else ""
            method = bench.plan[point.method]
            found = error_parts(bench.board, bench.text.fit, flow.sites[0], method, point.metrics["ce_increase"], target=target)
            records[point.method] = found.as_json()
            more = {f"ce_{part}_error": found.increase[part] for part in ("linear", "nonlinear") if part in found.increase}
            points[at] = replace(point, metrics={**point.metrics, **more})
            if point.role == "method":
                notes.append(found.told(point.method))
            update(point.method)
    write_atomic(bench.run / "errors.json", seal({"schema": 1, "dictionaries": records}))
    return records


def _described(bench: _Bench, screen: Screen) -> dict[str, Any]:
    """The latent browser of the run's first trained dictionary."""
    first = next((name for name in bench.request.methods if not entry(name).baseline), bench.request.methods[0])
    method, text = bench.plan[first], bench.text
    assert isinstance(method, Dictionary)
    with screen.stage(f"describe the latents of {first}"):
        labels, sides = label_batches(text.judge, text.judge_docs)
        flow, middle = bench.flow, len(bench.flow.sites) // 2 if bench.flow.join == "mix" else 0
        return describe(
            bench.board, ", ".join(flow.sites) if flow.join == "concat" else flow.sites[middle], method, bench.model.tokenizer,
            target=flow.targets[middle] if flow.transcodes else "", labels=labels, sides=sides, doc_names=text.judge_names,
            flow=flow if flow.join == "concat" else None, beside=bench.beside.model if bench.beside else None,
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
