"""`rarefy demo`: a real language model made sparse in four ways, each judged on files it never saw."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..builtin.model import recall_model
from ..catalogue import entry
from ..fit import Recipe, train
from ..frontier import Frontier, Judge, Point
from ..frontier import sweep as measure_all
from ..latents.random import RandomDictionary
from ..latents.topk import TopK
from ..method import positive
from ..site import capture, replaced
from ..store.methods import save
from ..streams import TensorStream, windows
from ..tasks.recall import FILLER, KEYS, VALUES, key_value, recall_accuracy
from .build import dictionary
from .dictionaries import ablate, describe, judge_dictionary
from .fit import method_folder, progress
from .folder import refuse_early, run_folder
from .models import Opened, Text, open_for_work, read_text
from .report import page, unit_panel, write_report
from .screen import Screen, points_table
from .sweep import Fitter, verdict

SITE, WIDTH, K, BATCH = "layers.3.resid_post", 4096, 32, 2048
CONTEXT, FIT_TOKENS, JUDGE_TOKENS, CALIBRATION = 512, 420_000, 16_384, 32_768
STEPS, RATE = 1_100, 1e-3
WEIGHT_BUDGETS, NEURON_BUDGETS, KEY_BUDGETS = (0.4, 0.5, 0.7), (0.3, 0.5, 0.7), (0.1, 0.25, 0.5)
CONCEPT_TOKENS = 120_000
ATTENTION = ("attention/quest", "attention/window", "attention/random")
PAIRS, GAP, SEQUENCES = 32, 128, 48


@dataclass
class DemoResult:
    """Every point and what was found."""

    points: dict[str, list[Point]]
    verdicts: dict[str, str]
    concepts: dict[str, Any]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "schema": 1, "seconds": self.seconds, "verdicts": self.verdicts, "concepts": self.concepts,
            "points": {unit: [p.as_json() for p in points] for unit, points in self.points.items()},
        }

    def show(self, out: Path) -> None:
        """Print the tables and where the page is."""
        screen = Screen()
        for unit, points in self.points.items():
            extra = {"latents": ("l0", "fvu", "loss_recovered", "dead"), "recall": ("recall",)}.get(unit, ())
            points_table(screen, unit, points, extra)
            screen.say(self.verdicts[unit])
            screen.say("")
        screen.say(f"{self.concepts['above_0.8']} latents track a Python concept with F1 above 0.8 on held-out files")
        screen.say(f"{self.seconds:.0f} s in all; the page: {out / 'report.html'}")
        screen.say(f"rarefy show {out}")


def demo(out: Path, *, steps: int, screen: Screen) -> DemoResult:
    """Do it; a demo found in `out` goes on from its last checkpoint."""
    torch.manual_seed(0)
    steps = steps or STEPS
    positive("steps", steps)
    refuse_early(out, "demo", {"steps": steps})
    with screen.stage("open the built-in model") as update:
        opened = open_for_work("builtin")
        update(f"{opened.info.n_params / 1e6:.1f} M parameters, {opened.info.n_layers} layers, trained on Python source")
    with run_folder(out, {"command": "demo", "request": {"steps": steps}, "model": opened.card(), "seed": 0}):
        with screen.stage("read the standard library") as update:
            text = read_text("stdlib", opened, context=CONTEXT, fit_tokens=FIT_TOKENS, judge_tokens=JUDGE_TOKENS)
            update(f"{len(text.fit_names)} files to fit on, {len(text.judge_names)} held out")
        with screen.stage("dense model") as update:
            judge = Judge(opened.model, text.judge)
            update(f"{judge.dense('').metrics['ce']} nats a token on {judge.tokens:,} held-out tokens")
        points: dict[str, list[Point]] = {}
        points["latents"], method = _latents(out, steps, opened, text, judge, screen)
        calibration = text.fit[: max(1, CALIBRATION // (CONTEXT * 8))]
        fitter = Fitter(opened, calibration, "", {})
        points["weights"] = _sweep(judge, fitter, ("weights/wanda", "weights/magnitude", "weights/random"), WEIGHT_BUDGETS, screen)
        points["neurons"] = _sweep(judge, fitter, ("neurons/wina", "neurons/teal", "neurons/random"), NEURON_BUDGETS, screen)
        points["attention"] = _sweep(judge, fitter, ATTENTION, KEY_BUDGETS, screen)
        points["recall"] = _recall(screen)
        latents, concepts = _describe(opened, text, method, screen)
        verdicts = {unit: _verdict(unit, ps) for unit, ps in points.items()}
        for unit, ps in points.items():
            Frontier(ps).save(out / ("recall.jsonl" if unit == "recall" else "points.jsonl"))
        with screen.stage("write the page"):
            units = [_panel(unit, ps, verdicts[unit]) for unit, ps in points.items()]
            every = [p for ps in points.values() for p in ps]
            report = page(
                "A small language model made sparse in four ways", opened, text, "the standard library of this Python", units, screen,
                points=every, log=out / "log.jsonl", latents=latents, notes=_notes(concepts),
            )
            write_report(out, report)
    return DemoResult(points, verdicts, concepts, round(sum(s["seconds"] for s in screen.stages), 1))


def _activations(opened: Opened, text: Text, update: Any) -> Tensor:
    got, done = [], 0
    for ids_BT in windows(text.fit).split(16):
        got.append(capture(opened.model, [SITE], input_ids=ids_BT)[SITE][:, 1:].flatten(0, 1))
        done += ids_BT.numel()
        update(f"{done:,} tokens")
    return torch.cat(got)


def _latents(out: Path, steps: int, opened: Opened, text: Text, judge: Judge, screen: Screen) -> tuple[list[Point], Any]:
    with screen.stage(f"capture {SITE}") as update:
        x_ND = _activations(opened, text, update)
    card = entry("latents/topk")
    method = dictionary(card, x_ND.shape[1], width=WIDTH, k=K, seed=0, settings={"dead_after": 100_000})
    recipe = Recipe(steps=steps, lr=RATE, warmup=min(50, steps), log_every=10, save_every=400)
    with screen.stage(f"train {card.name}, {WIDTH:,} latents, {K} active") as update:
        train({card.name: method}, TensorStream(x_ND, BATCH), recipe, out, on_log=lambda r: update(progress(r)))
    save(method, method_folder(out, card.name))
    random = dictionary(entry("latents/random"), x_ND.shape[1], width=WIDTH, k=K, seed=0, settings={})
    random.initialise(x_ND[:BATCH])
    random.eval()
    points = [judge.dense("latent")]
    with screen.stage("splice dictionaries into the model") as update:
        lost = ablate(judge, SITE)
        for made, role in ((method, "method"), (random, "baseline")):
            for k in (8, 16, 32, 64):
                other = copy.deepcopy(cast(TopK | RandomDictionary, made))
                other.k = k
                note = "" if k == K else f"the dictionary trained at k = {K}, read with {k} latents"
                points.append(judge_dictionary(judge, SITE, other, lost, role=role, note=note))
                update(f"{made.name} with {k} latents")
    return points, method


def _sweep(judge: Judge, fitter: Fitter, names: tuple[str, ...], budgets: tuple[float, ...], screen: Screen) -> list[Point]:
    with screen.stage(f"measure {', '.join(names)}") as update:
        frontier = measure_all(judge, names, budgets, lambda n, b: fitter(entry(n), b), on_point=lambda p: update(f"{p.method} at {p.budget:g}"))
    return [judge.dense(frontier.points[0].unit), *frontier.points]


def _recall(screen: Screen) -> list[Point]:
    """Recall of key-value pairs by a two-layer model that lives by it, with the keys each method leaves it."""
    model = recall_model()
    task = key_value(KEYS, VALUES, PAIRS, SEQUENCES, filler=FILLER, gap=GAP, seed=9)
    points = [Point("dense", "key", "dense", 1.0, 1.0, {"recall": recall_accuracy(model, task)})]
    with screen.stage(f"recall {PAIRS} pairs, at least {task.gap} tokens back") as update:
        for name in ATTENTION:
            card = entry(name)
            for budget in KEY_BUDGETS:
                method: Any = card.load()(budget=budget).eval()
                with replaced(model, {"layers.*.attn": method}):
                    kept = recall_accuracy(model, task)
                role = "baseline" if card.baseline else "method"
                points.append(Point(name, card.unit, role, budget, method.measured_density(), {"recall": kept}))
                update(f"{name} at {budget:g}: {kept.mean:.1%} recalled; dense {points[0].metrics['recall'].mean:.1%}")
    return points


def _panel(unit: str, points: list[Point], said: str) -> dict[str, Any]:
    if unit != "recall":
        return unit_panel(unit, points, said) | {"headline": _headline(unit, points)}
    panel = unit_panel("attention", points, said, y=("recall", "answers recalled", "high"))
    question = f"Which keys must stay for a model to recall {PAIRS} pairs from at least {GAP} tokens back? (A two-layer model trained for that.)"
    return panel | {"title": "Attention: recall", "question": question, "headline": _headline(unit, points)}


def _headline(unit: str, points: list[Point]) -> str:
    """The unit's result in one short sentence."""

    def at(name: str, budget: float, metric: str) -> float:
        return next(p.metrics[metric].mean for p in points if p.method == name and abs(p.budget - budget) < 1e-9)

    if unit == "latents":
        ours, random = (at(f"latents/{name}", K / WIDTH, "loss_recovered") for name in ("topk", "random"))
        return f"{K} of {WIDTH:,} latents recover {ours:.1%} of the loss; random directions {random:.1%}."
    if unit == "weights":
        ours, plain = (at(f"weights/{name}", 0.5, "ce_increase") for name in ("wanda", "magnitude"))
        return f"Half the weights: {ours:+.3f} nats by Wanda, {plain:+.3f} by magnitude."
    if unit == "neurons":
        ours, plain = (at(f"neurons/{name}", 0.5, "ce_increase") for name in ("wina", "teal"))
        return f"Half of every layer's inputs: {ours:+.3f} nats by WINA, {plain:+.3f} by TEAL."
    metric, form = ("recall", "{:.1%} recalled") if unit == "recall" else ("ce_increase", "{:+.3f} nats")
    ours, plain = (form.format(at(f"attention/{name}", 0.25, metric)) for name in ("quest", "window"))
    return f"A quarter of the keys: {ours} by page bounds, {plain} by window + sinks."


def _describe(opened: Opened, text: Text, method: Any, screen: Screen) -> tuple[dict[str, Any], dict[str, Any]]:
    from ..builtin.corpus import pack
    from ..tasks.concepts import label_batches

    with screen.stage("find what each latent tracks") as update:
        batches = list(pack(text.judge_docs, opened.tokenizer, CONTEXT, 8, max_tokens=CONCEPT_TOKENS, each=CONCEPT_TOKENS // 20))
        labels, sides = label_batches(batches, text.judge_docs)
        reader = _Reader(opened.model, batches)
        latents = describe(reader, SITE, method, opened.tokenizer, labels=labels, sides=sides, doc_names=text.judge_names)
        f1 = torch.tensor(latents["table"]["f1"])
        concept = torch.tensor(latents["table"]["concept"])
        good = f1 > 0.8
        names = [latents["concepts"][i] for i in concept[good].unique().tolist()]
        update(f"{int(good.sum())} latents with F1 above 0.8 for {len(names)} concepts")
    return latents, {"above_0.8": int(good.sum()), "names": names, "of": len(latents["concepts"])}


@dataclass
class _Reader:
    """A model with text to read; what `describe` needs of a Judge."""

    model: Any
    batches: list[Any]


def _verdict(unit: str, points: list[Point]) -> str:
    if unit == "recall":
        dense = points[0].metrics["recall"].mean
        kept = [f"At {b:.0%} kept: " + ", ".join(f"{p.method} {p.metrics['recall'].mean:.1%}" for p in points if p.budget == b) for b in KEY_BUDGETS]
        return f"Dense recalls {dense:.1%}. {'. '.join(kept)}."
    if unit != "latents":
        return verdict(points)
    at = {p.method: p for p in points if round(p.metrics["l0"].mean if "l0" in p.metrics else -1) == K}
    ours, random = at.get("latents/topk"), at.get("latents/random")
    if not ours or not random:
        return ""
    return (
        f"With {K} of {WIDTH:,} latents active, latents/topk keeps {ours.metrics['loss_recovered'].mean:.1%} of the loss that zero ablation costs "
        f"(FVU {ours.metrics['fvu'].mean:.3f}, {ours.metrics['dead'].mean:.1%} dead); "
        f"random directions keep {random.metrics['loss_recovered'].mean:.1%} (FVU {random.metrics['fvu'].mean:.3f})."
    )


def _notes(concepts: dict[str, Any]) -> list[str]:
    return [
        f"{concepts['above_0.8']} latents track one of {concepts['of']} Python concepts with F1 above 0.8; concept and threshold were chosen on "
        "one half of the held-out files and measured on the other.",
        "Intervals are 95 % over held-out documents. A method's place is clear only where intervals do not overlap.",
        "Costs are counted from shapes for the layers a method replaces, a token, at batch 1; selection is included.",
        "weights/*: unstructured masks per output row. neurons/*: every linear layer's input. attention/*: every layer, each query "
        "choosing its own keys.",
    ]
