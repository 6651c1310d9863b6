"""`rarefy judge --suite latents RUNS...`: dictionaries of one site on concepts of Python source, practical metrics beside proxies.

Each dictionary of each run, and the baselines, is taken through every test of `latent_bench`; each result is a line of
OUT/suite.jsonl, so that a killed run goes on with the tests that are missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from ..builtin.corpus import Text
from ..catalogue import entry
from ..errors import BadInput
from ..fidelity import Interval
from ..frontier import Point
from ..latents.random import RandomDictionary
from ..method import Sparse
from ..store.lines import append_line, read_lines
from ..store.tensors import raw_bytes
from ..tasks.codes import neurons, principal
from ..tasks.supervised import Supervised, conditional_means, least_squares
from .fit import FitRequest, saved_plan
from .folder import refuse_early, run_folder
from .judge import fitted_run
from .latent_bench import TESTS, Bench, Reader, bench, lens_of
from .latent_verdict import COLUMNS, PRACTICAL, Row, agreement, disagreement, grouped
from .models import Opened, check_context, cut_text, digest, opened, read_documents
from .report import page, unit_panel, write_report
from .screen import Screen
from .sweep import role_of

RESULTS = "suite.jsonl"
SHORT = {
    "loss_recovered": "recovered", "absorption": "absorbed", "absorption_kinds": "of kinds", "perturbation": "perturb",
    "disentanglement": "disentangle", "unlearn_selective": "unlearn",
}
"""Column heads of a table that must fit a terminal."""
TOKENS = 60_000
COMMAND = "judge --suite latents"
ON_PAGE = {*COLUMNS, "probe_2", "splits", "cause", "isolation", "senses_f1", "unlearn_forget", "unlearn_damage", "loss_recovered_mean"}


@dataclass
class SuiteResult:
    """Points, one a dictionary with its seeds together, and what was said about them."""

    points: list[Point]
    verdict: str
    left_out: dict[str, str]
    package: str

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "schema": 1, "verdict": self.verdict, "points": [p.as_json() for p in self.points], "left_out": self.left_out,
            "agreement": agreement(self.points), "package_to_forget": self.package,
        }

    def show(self, out: Path) -> None:
        """Print the table."""
        screen = Screen()
        columns = [c for c in COLUMNS if any(c in p.metrics for p in self.points)]
        rows = [[p.method.removeprefix("latents/"), *(f"{p.metrics[c].mean:.2f}" if c in p.metrics else "-" for c in columns)] for p in self.points]
        screen.table("", ["dictionary", *(SHORT.get(c, c) for c in columns)], rows)
        for name, why in self.left_out.items():
            screen.say(f"left out: {name} ({why})")
        if self.verdict:
            screen.say(self.verdict)
        screen.say(f"rarefy show {out}")


@dataclass(frozen=True)
class _Run:
    folder: Path
    made: dict[str, Any]
    request: FitRequest
    plan: dict[str, Sparse]


def judge_latents(runs: Sequence[Path], *, data: str, tokens: int, out: Path, screen: Screen) -> SuiteResult:
    """Do it.

    Args:
        runs: of `rarefy fit`, of dictionaries of one model at one site. data: text; default what the first was fitted on, of
            which only documents held out by name are read. out: a folder of its own; a suite found there goes on.

    Raises:
        BadInput: runs that differ in model, site or context, transcoders, or text that is not Python source.
    """
    found = [_read(run) for run in runs]
    first = _alike(found)
    data = data or first.request.data
    check_context(first.request.context, tokens=tokens)
    request = {"suite": "latents", "data": data, "tokens": tokens, "context": first.request.context}
    refuse_early(out, COMMAND, request)
    docs = read_documents(data, screen)
    model = opened(first.request.model, screen, causal=True)
    if model.info.sha256 != first.made["model"]["sha256"]:
        raise BadInput(f"{first.folder} was fitted to other weights than {first.request.model} has now; fit again")
    text = cut_text(docs, model, screen, context=first.request.context, fit_tokens=1, judge_tokens=tokens)
    made = {"command": COMMAND, "request": request, "model": model.card(), "site": first.made["sites"][0], "text": digest(text.judge)}
    with run_folder(out, made):
        with screen.stage("label the text and fit probes") as update:
            shared = bench(model.model, made["site"], text.judge, text.judge_docs)
            update(f"{len(shared.x_ND):,} tokens, {len(shared.concepts)} concepts, dense probe {shared.dense:.1%}")
        readers = [*_baselines(shared, first.request), *_fitted(found)]
        done = _done(out / RESULTS)
        for reader in readers:
            _measure(shared, reader, done, out / RESULTS, screen)
        return _report(shared, readers, done, model, text, data, out, screen)


def _read(run: Path) -> _Run:
    made, request = fitted_run(run)
    if entry(request.methods[0]).unit != "latent":
        raise BadInput(f"{run} holds {request.methods[0]}; --suite latents judges dictionaries")
    if made["target"]:
        raise BadInput(f"{run} holds transcoders to {made['target']}; the suite takes latents out of the stream they read: give autoencoders")
    if len(made["sites"]) != 1 or request.beside:
        models = " of two models" if request.beside else ""
        raise BadInput(f"{run} reads {len(made['sites'])} sites{models}; the suite judges dictionaries of one stream")
    return _Run(run, made, request, saved_plan(run, request.methods))


def _alike(found: Sequence[_Run]) -> _Run:
    """The first run, to which all others must be alike."""
    if not found:
        raise BadInput("no run given; name one or more folders made by `rarefy fit latents/...`")
    first = found[0]
    for other in found[1:]:
        for what, mine, its in (
            ("model", first.made["model"]["sha256"][:12], other.made["model"]["sha256"][:12]), ("site", first.made["sites"], other.made["sites"]),
            ("context", first.request.context, other.request.context),
        ):
            if mine != its:
                raise BadInput(f"{other.folder} has {what} {its} and {first.folder} has {mine}; judge runs of one model, site and context together")
    return first


def _key(method: Sparse) -> str:
    """A name for exactly these numbers."""
    total = xxhash.xxh3_64()
    for name, tensor in method.state_dict().items():
        total.update(name.encode())
        total.update(raw_bytes(tensor))
    return f"{method.name}/{total.hexdigest()}"


def _group(method: Sparse) -> str:
    return json.dumps([method.name, {k: v for k, v in method.arguments.items() if k != "seed"}], sort_keys=True)


def _reader(method: Sparse, steps: Any = 0) -> Reader:
    return Reader(
        _key(method), method.name, role_of(entry(method.name)), method.budget, f"{_group(method)} {steps}", int(method.arguments["width"]),
        partial(lens_of, method), method,
    )


def _fitted(found: Sequence[_Run]) -> list[Reader]:
    """Dictionaries of all runs; seeds are one group if they were trained alike."""
    unlike = {"seed", "methods", "out"}
    return [
        _reader(method, json.dumps({k: v for k, v in run.request.record().items() if k not in unlike}, sort_keys=True, default=str))
        for run in found for method in run.plan.values()
    ]


def _baselines(shared: Bench, request: FitRequest) -> list[Reader]:
    """Raw channels, principal components, random directions; and dictionaries made from the labels, the skyline."""
    fit_ND, d = shared.x_ND[shared.rows.side_N == 0], shared.x_ND.shape[1]
    mean_D = fit_ND.mean(0)
    made = [
        Reader("neurons", "raw neurons", "baseline", 1.0, "neurons", d, lambda x: neurons(x, mean_D)),
        Reader("pca", "PCA", "baseline", 1.0, "pca", d, lambda x: principal(x, fit_ND)),
    ]
    lottery = RandomDictionary(d, request.width, min(request.k or 32, request.width), seed=request.seed)
    lottery.initialise(fit_ND[:4096])
    made.append(_reader(lottery.eval()))
    if shared.concepts:
        y_NC = shared.y_NC[shared.rows.side_N == 0]
        for key, build in (("supervised means", conditional_means), ("supervised least squares", least_squares)):
            labelled: Supervised = build(fit_ND, y_NC)
            lens = partial(lambda which, x: which.lens(shared.y_NC), labelled)
            made.append(Reader(key, key, "baseline", 1.0, key, len(shared.concepts), lens, None, labelled))
    return made


def _interval(record: dict[str, float | None]) -> Interval:
    return Point.from_json({"method": "", "unit": "", "role": "", "budget": 1.0, "density": 1.0, "metrics": {"": record}}).metrics[""]


def _done(path: Path) -> dict[tuple[str, str], dict[str, Interval]]:
    records = read_lines(path) if path.exists() else []
    return {(r["key"], r["test"]): {k: _interval(v) for k, v in r["metrics"].items()} for r in records}


def _measure(shared: Bench, reader: Reader, done: dict[tuple[str, str], dict[str, Interval]], path: Path, screen: Screen) -> None:
    """The tests of one reader that are not on disk yet."""
    missing = [name for name, (needs, _) in TESTS.items() if needs not in shared.left_out and (reader.key, name) not in done]
    if not missing or (reader.labelled is not None and not shared.concepts):
        return
    with screen.stage(f"judge {reader.name}") as update:
        lens = reader.lens(shared.x_ND)
        for name in missing:
            update(name)
            metrics = TESTS[name][1](shared, reader, lens)
            done[reader.key, name] = metrics
            point = Point(reader.name, "latent", reader.role, reader.budget, 0.0, metrics)
            append_line(path, {"key": reader.key, "test": name, "name": reader.name, "metrics": point.as_json()["metrics"]})
        l0 = done.get((reader.key, "fidelity"), {}).get("l0")
        update(f"L0 {l0.mean:.1f}" if l0 else "")


def _report(
    shared: Bench, readers: Sequence[Reader], done: dict[tuple[str, str], dict[str, Interval]], model: Opened, text: Text, data: str, out: Path,
    screen: Screen,
) -> SuiteResult:
    rows = []
    for reader in readers:
        metrics = {k: v for name in TESTS for k, v in done.get((reader.key, name), {}).items()}
        rows.append(Row(reader.name, reader.role, reader.budget, reader.width, reader.group, metrics))
    points = grouped(rows)
    said = disagreement(points)
    y = next((m for m in PRACTICAL if any(m in p.metrics for p in points)), "fvu")
    axis = y, TITLES.get(y, y.replace("_", " ")), PRACTICAL.get(y, "low")
    panel = unit_panel("latents", points, said, x=("l0", "latents active a token"), y=axis)
    for point in panel["points"]:                             # everything else stays in suite.jsonl
        point["metrics"] = {k: v for k, v in point["metrics"].items() if k in ON_PAGE}
    panel |= {"title": "Latents in use", "question": "Do a few latents hold what the model knows of Python, one concept each?"}
    title = f"{', '.join(dict.fromkeys(r.name for r in readers if r.role == 'method'))} at {shared.site}"
    write_report(out, page(title, model, text, data, [panel], screen, notes=_notes(shared), same=True))
    return SuiteResult(points, said, shared.left_out, shared.package)


TITLES = {"probe_1": "accuracy of a probe on one latent a concept, mean over concepts"}


def _notes(shared: Bench) -> list[str]:
    swaps = f" ({', '.join(a.name for a in shared.swaps.attributes)})" if shared.swaps else ""
    pairs = "; ".join(f"{p.wanted} freed of {p.spurious}" for p in shared.pairs)
    return [
        f"Probes: {len(shared.concepts)} concepts; fitted on half of the documents, judged on the other; classes weigh the same, so that chance is "
        f"1/2. A dense probe on the raw stream reaches {shared.dense:.1%}.",
        "Absorption: share of rows that a probe gets right where the concept's own latents are silent and one other latent carries it; first letters "
        "of names (absorption), kinds of token that contain others (absorption kinds). Where all codes are dense it says little.",
        "Removal: accuracy that a probe misled by a second concept regains when 10 latents of that concept are set to their mean, 1 being an "
        f"unbiased probe's ({pairs}). Perturbation: accuracy that a concept's own probe loses by 10 latents, less what the others lose.",
        f"Disentanglement: (cause + isolation) / 2 of swapping up to 20 codes{swaps}, 1/2 being chance. Control: cause with two codes a row.",
        "Senses: same strongest latent as a sign of the same use of an identifier (attribute, parameter, import, keyword argument); chance is 1/2.",
        f"Unlearning: loss on held-back files of {shared.package or 'a package'} less loss elsewhere when latents that fire there and hardly "
        "elsewhere are clamped to minus three times their mean.",
        "Supervised dictionaries are made from the labels themselves and show what codes for these concepts could at best do. Points of several "
        "seeds are their mean with the least and the most; other intervals are 95 % over documents, or words for senses.",
        *(f"Left out: {name} ({why})." for name, why in shared.left_out.items()),
    ]
