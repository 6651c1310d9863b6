"""Families of static patterns at several sizes, on text and on recall, beside choosing by content at the same density.

    python scripts/static_frontier.py    # rewrites docs/benchmarks/static_frontier.md and its pictures

Papers' sizes are for contexts of thousands; here each family is scaled to contexts of 512.
"""
import argparse
from pathlib import Path

import torch

import rarefy
from rarefy.attention.mapped.top_k import TopK
from rarefy.attention.pattern import PatternAttention
from rarefy.attention.quest import Quest
from rarefy.builtin.model import recall_model
from rarefy.frontier import Judge, Point
from rarefy.jobs.report import unit_panel
from rarefy.plots import frontier_svg
from rarefy.tasks.needles import needles
from rarefy.tasks.recall import CONTEXT, FILLER, KEYS, VALUES, recall_accuracy

ROOT = Path(__file__).parents[1]
FAMILIES = {
    "window": "window({n})",
    "sinks": "window({n}) | sinks(4)",
    "dilated": "heads(window({q}), window({q}, dilation=2), window({q}, dilation=4), window({q}, dilation=8)) | sinks(4)",
    "strided": "heads(window({n}), strided({m})) | sinks(4)",
    "fixed": "heads(block({n}), summaries({n}, {s})) | own() | sinks(4)",
    "shards": "window({n}) | shards({m}) | sinks(4)",
    "bigbird": "blocks(16, window({b}) | tokens(0) | random({r}, past=True))",
    "shifted": "heads(chunks({n}), chunks({n}, shift={h})) | sinks(4)",
    "some full": "on_layers([{full}], full(), window({n}) | sinks(4))",
}
SIZES = (16, 32, 64, 128, 256)
ROWS = ["| family | size | density | KL, nats a token | loss increase | needles found | at density |", "|---|---|---|---|---|---|---|"]


def expression(family: str, n: int, layers: int) -> str:
    """A family at window n in a model of so many layers; the other sizes shrink or grow with it."""
    full = "2, 3" if layers == 6 else "1"
    near = {"n": n, "h": n // 2, "q": max(2, n // 2), "s": max(1, n // 16), "b": max(1, n // 32)}
    return FAMILIES[family].format(full=full, m=max(2, 512 // n), r=max(1, n // 64), **near)


def methods():
    """(family, size, number of layers -> method)."""
    for family in FAMILIES:
        for n in SIZES:
            if n > SIZES[0] and expression(family, n, 6) == expression(family, n // 2, 6):        # its parts have a least size
                continue
            yield family, n, lambda layers, family=family, n=n: PatternAttention(expression(family, n, layers), block=16, query_block=16)
    for budget in (0.05, 0.1, 0.25, 0.5):
        yield "quest", budget, lambda layers, budget=budget: Quest(budget, block=8)
        yield "top_k", budget, lambda layers, budget=budget: TopK(budget)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=16_384, help="held-out tokens of text")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer, _ = rarefy.open_model("builtin")
    text = rarefy.text("stdlib", tokenizer, context=512, fit_tokens=512, judge_tokens=args.tokens)
    judge, recall = Judge(model, text.judge), recall_model()
    task = needles(KEYS, VALUES, FILLER, CONTEXT, 16, 24, asked=8, seed=11)
    points: list[Point] = []
    for family, size, make in methods():
        point = judge.measure({"layers.*.attn": make(6).eval()}, method=family, unit="key", budget=1.0, note=str(size))
        method = make(2).eval()
        with rarefy.replaced(recall, {"layers.*.attn": method}):
            point.metrics["needles"] = recall_accuracy(recall, task)
        points.append(point)
        ROWS.append(row(point, method.measured_density()))
        print(ROWS[-1], flush=True)
    axes = {"text": ("kl", "KL from dense (nats a token)", "low"), "needles": ("needles", "needles found", "high")}
    for name, axis in axes.items():
        svg = frontier_svg(unit_panel("attention", points, "", y=axis))
        (ROOT / f"docs/pictures/static-frontier-{name}.svg").write_text(svg, encoding="utf-8")
    page = ROOT / "docs/benchmarks/static_frontier.md"
    head, start, rest = page.read_text(encoding="utf-8").partition("<!-- table -->\n")
    _, stop, tail = rest.partition("<!-- /table -->")
    page.write_text(head + start + "\n".join(ROWS) + "\n" + stop + tail, encoding="utf-8")


def row(point: Point, there: float) -> str:
    """A line of the table; `there`: density in the recall model."""
    kl, found = point.metrics["kl"], point.metrics["needles"]
    more = point.metrics["ce_increase"].mean
    return (
        f"| {point.method} | {point.note} | {point.density:.3f} | {kl.mean:.3f} [{kl.low:.3f}, {kl.high:.3f}] | {more:.3f} | "
        f"{found.mean:.1%} | {there:.3f} |")


if __name__ == "__main__":
    main()
