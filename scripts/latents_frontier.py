"""Every dictionary of the catalogue at several L0 on the built-in model: loss recovered and FVU against latents active a token.

    python scripts/latents_frontier.py --out runs/frontier            # train and judge, an hour on one core; goes on where it was
    python scripts/latents_frontier.py --out runs/frontier --write    # also docs/benchmarks/latents_frontier.{json,md} and the picture

All methods of one L0 are trained in one pass over the same activations, at one width, number of steps and rate, with their own defaults
otherwise: what they do untuned. Those that read the model's gradients have a pass of their own, over the same tokens. Methods without a
k get three penalties, as multiples of their default, which is meant for long runs.
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from rarefy.builtin.corpus import text
from rarefy.catalogue import ENTRIES, Entry, entry
from rarefy.errors import BadInput
from rarefy.fit import Recipe, train
from rarefy.frontier import Judge, Point
from rarefy.gradient_stream import GradientStream
from rarefy.hub import open_model
from rarefy.jobs.build import fixes_k
from rarefy.jobs.dictionaries import ablate, judge_dictionary
from rarefy.jobs.report import unit_panel
from rarefy.jobs.suite_plan import build, default_of, knob, usable
from rarefy.plots import frontier_svg
from rarefy.store.lines import append_line, read_lines
from rarefy.streams import LiveStream, windows

ROOT = Path(__file__).parents[1]
SITE, WIDTH, CONTEXT = "layers.3.resid_post", 2048, 512
LEVELS = (8, 32, 128)
PENALTIES = (128.0, 32.0, 8.0)


def cards() -> list[Entry]:
    """Trained dictionaries of single rows."""
    found = []
    for card in ENTRIES:
        try:
            usable(card)
        except BadInput:
            continue
        if not card.load().join:                                          # such a one reads several layers: scripts/latents_objects.py
            found.append(card)
    return found


def made(card: Entry, d: int, level: int, steps: int, batch: int) -> Any:
    """A method at the level's k, or at the level's multiple of its penalty's default."""
    name = knob(card, {})
    own = {name: default_of(card, name) * PENALTIES[LEVELS.index(level)]} if name else {}
    return build(card, own, d=d, width=WIDTH, k=level if fixes_k(card) else 1, seed=0, steps=steps, batch=batch)


def measured(out: Path, steps: int, batch: int, names: list[str]) -> None:
    """Train and judge what is not in the folder yet."""
    model, tokenizer, _ = open_model("builtin")
    corpus = text("stdlib", tokenizer, context=CONTEXT, fit_tokens=steps * batch + 100_000, judge_tokens=16_000)
    board = Judge(model, corpus.judge)
    lost = ablate(board, SITE)
    d = model.config.hidden_size
    there = {(r["name"], r["level"]) for r in read_lines(out / "points.jsonl")} if (out / "points.jsonl").exists() else set()
    wanted = [(card, level) for level in LEVELS for card in cards() if (card.name, level) not in there and (not names or card.name in names)]
    plain = [[(card, level) for card, level in wanted if level == at and not card.load().reads_gradients] for at in LEVELS]
    pulled = [(card, level) for card, level in wanted if card.load().reads_gradients]          # its pass is what costs: one for all levels
    for some, stream_of in (*((some, LiveStream) for some in plain), (pulled, GradientStream)):
        if not some:
            continue
        plan = {f"{card.name}@{level}": made(card, d, level, steps, batch) for card, level in some}
        train(plan, stream_of(model, SITE, windows(corpus.fit), batch), Recipe(steps=steps, lr=1e-3, save_every=steps, log_every=50), on_log=on_log)
        for (card, level), method in zip(some, plan.values(), strict=True):
            point = judge_dictionary(board, SITE, method, lost, name=card.name)
            append_line(out / "points.jsonl", {"name": card.name, "level": level, "point": point.as_json()})
            print(card.name, level, {key: round(point.metrics[key].mean, 3) for key in ("l0", "fvu", "loss_recovered")}, flush=True)


def on_log(record: dict[str, Any]) -> None:
    """How far training is."""
    print(record.get("step"), record.get("seconds"), flush=True)


def write(out: Path, steps: int, batch: int) -> None:
    """The page, the points and the picture."""
    lines = read_lines(out / "points.jsonl")
    points = [Point.from_json(r["point"]) for r in lines]
    unit = unit_panel("latents", points, "", x=("l0", "latents active a token"))
    (ROOT / "docs/pictures/latents.svg").write_text(frontier_svg(unit), encoding="utf-8")
    (ROOT / "docs/benchmarks/latents_frontier.json").write_text(json.dumps([p.as_json() for p in points], indent=1) + "\n", encoding="utf-8")
    rows = ["| method | paper | L0 | FVU | loss recovered | dead |", "|---|---|---|---|---|---|"]
    for record, point in sorted(zip(lines, points, strict=True), key=lambda pair: (pair[0]["name"], pair[1].metrics["l0"].mean)):
        card, m = entry(record["name"]), point.metrics
        rows.append(
            f"| `{card.name}` | {card.year} | {m['l0'].mean:.1f} | {m['fvu'].mean:.3f} | {m['loss_recovered'].mean:.3f} "
            f"({m['loss_recovered'].low:.3f}-{m['loss_recovered'].high:.3f}) | {m['dead'].mean:.1%} |"
        )
    levels = {card.name: sum(r["name"] == card.name for r in lines) for card in cards()}
    absent, partly = ([f"`{name}`" for name, n in levels.items() if test(n)] for test in (lambda n: not n, lambda n: 0 < n < len(LEVELS)))
    missing = f"\nNot run, as a step takes more than 4 s on one core: {', '.join(absent)}." if absent else ""
    missing += f"\nNot run at every L0, as a step's time rises with its square: {', '.join(partly)}." if partly else ""
    missing += "\nOf dictionaries that read several layers: [objects](latents_objects.md)."
    page = (
        "# Every dictionary on the built-in model\n\n"
        f"    python scripts/latents_frontier.py --out runs/frontier --steps {steps} --batch {batch} --write\n\n"
        f"`{SITE}` of the built-in model, {WIDTH:,} latents, {steps} steps of {batch:,} tokens of the standard library, one seed, each\n"
        "method's own defaults beside k or the penalty: what they do untuned and shortly trained, not the best that each can do.\n"
        f"Methods without a k have {', '.join(f'{p:g}' for p in PENALTIES)} times the default penalty, which is meant for longer runs.\n"
        "Judged on held-out files; loss recovered is against zero ablation, with a 95 % interval over documents."
        f"{missing}\n\n"
        "![frontier](../pictures/latents.svg)\n\n" + "\n".join(rows) + "\n"
    )
    (ROOT / "docs/benchmarks/latents_frontier.md").write_text(page, encoding="utf-8")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--out", type=Path, required=True)
    ask.add_argument("--steps", type=int, default=400)
    ask.add_argument("--batch", type=int, default=1024)
    ask.add_argument("--methods", default="", help="names separated by commas; default all")
    ask.add_argument("--write", action="store_true", help="write the docs from what the folder holds")
    asked = ask.parse_args()
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    measured(asked.out, asked.steps, asked.batch, [n for n in asked.methods.split(",") if n])
    if asked.write:
        write(asked.out, asked.steps, asked.batch)


if __name__ == "__main__":
    main()
