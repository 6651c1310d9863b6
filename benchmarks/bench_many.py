"""Ten dictionaries in one pass over a model's activations, against ten passes.

    python benchmarks/bench_many.py [--steps 20] [--batch 2048] [--out FILE.json]

The ten are a sweep as one is made: two widths, two k, two seeds, and two BatchTopK. One pass captures, shuffles and checks the
activations once and shows each batch to all ten; ten passes do it ten times. CPU time of all threads; each way in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from rarefy.builtin.corpus import text
from rarefy.fit import Recipe, train
from rarefy.hub import open_model
from rarefy.latents.batch_topk import BatchTopK
from rarefy.latents.topk import TopK
from rarefy.method import Sparse
from rarefy.streams import LiveStream, windows

SITE = "layers.3.resid_post"


def plan(d: int) -> dict[str, Sparse]:
    made: dict[str, Sparse] = {
        f"topk {width} k{k} seed{seed}": TopK(d, width, k, seed=seed) for width in (1024, 4096) for k in (16, 32) for seed in (0, 1)
    }
    return made | {f"batch_topk {width}": BatchTopK(d, width, 32) for width in (1024, 4096)}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--steps", type=int, default=20)
    ask.add_argument("--batch", type=int, default=2048)
    ask.add_argument("--rounds", type=int, default=2)
    ask.add_argument("--out", type=Path)
    asked = ask.parse_args()
    torch.set_num_threads(1)
    model, tokenizer, _ = open_model("builtin")
    corpus = text("stdlib", tokenizer)
    recipe = Recipe(steps=asked.steps)

    def stream() -> LiveStream:
        return LiveStream(model, SITE, windows(corpus.fit), asked.batch)

    def capture() -> None:
        batches = stream().batches()
        for _ in range(asked.steps):
            next(batches)

    d = model.config.hidden_size
    ways = {
        "capture alone": capture,
        "one pass": lambda: train(plan(d), stream(), recipe),
        "ten passes": lambda: [train({name: method}, stream(), recipe) for name, method in plan(d).items()],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(asked.rounds):
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name].append(time.process_time() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print("| | CPU s | of ten passes |\n|---|---|---|")
    for name, value in median.items():
        print(f"| {name} | {value:.1f} | {value / median['ten passes']:.0%} |")
    print(f"\nTen dictionaries in one pass take {median['ten passes'] / median['one pass']:.2f}x less than in ten.")
    if asked.out:
        asked.out.write_text(json.dumps({"seconds": median, "steps": asked.steps, "batch": asked.batch}, indent=2) + "\n")


if __name__ == "__main__":
    main()
