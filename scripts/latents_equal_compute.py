"""End-to-end against local training of one dictionary at equal compute: CE increase at one L0, several seeds.

    python scripts/latents_equal_compute.py --out runs/compute            # half an hour on one core; goes on where it was
    python scripts/latents_equal_compute.py --out runs/compute --write    # also docs/benchmarks/latents_equal_compute.{json,md}

An end-to-end step runs the model on its tokens twice and back once; a local step needs only what flows at the site. So that both cost
the same, the CPU seconds of a step of each are measured first (streams included, everything on one thread), and local training is given
as many more steps as its are cheaper. Between them: local first and end-to-end for the last half or tenth of the compute. Every step of
every kind is of as many tokens.
"""
from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from rarefy.builtin.corpus import text
from rarefy.catalogue import entry
from rarefy.fit import Recipe, train
from rarefy.frontier import Judge
from rarefy.hub import open_model
from rarefy.jobs.dictionaries import ablate, judge_dictionary
from rarefy.latents.dictionary import Dictionary
from rarefy.latents.end_to_end import EndToEnd
from rarefy.store.lines import append_line, read_lines
from rarefy.streams import LiveStream, Stream, TensorStream, windows

ROOT = Path(__file__).parents[1]
SITE, WIDTH, K, CONTEXT, TOKENS = "layers.3.resid_post", 2048, 16, 128, 512
ARMS = {
    "local, equal steps": 0.0, "local": 0.0, "local, e2e for the last tenth": 0.1, "local, e2e for the last half": 0.5,
    "e2e": 1.0, "e2e+downstream": 1.0,
}
"""Name -> share of the compute spent end to end."""


class Bench:
    """Model, text, judge, and what training a dictionary takes."""

    def __init__(self, method: str, steps: int) -> None:
        self.model, tokenizer, _ = open_model("builtin")
        found = text("stdlib", tokenizer, context=CONTEXT, fit_tokens=2_000_000, judge_tokens=20_000)
        self.ids_NT, self.board = windows(found.fit), Judge(self.model, found.judge)
        self.lost, self.steps, self.card = ablate(self.board, SITE), steps, entry(method)

    def stream(self, kind: str, seed: int) -> Stream:
        """Of activations, or of windows for a kind of end-to-end training."""
        if kind == "local":
            return LiveStream(self.model, SITE, self.ids_NT, TOKENS, seed=seed)
        return TensorStream(self.ids_NT, TOKENS // CONTEXT, seed=seed)

    def new(self, seed: int) -> Dictionary:
        """A dictionary that nothing was done to."""
        return self.card.load()(self.model.config.hidden_size, WIDTH, K, seed=seed)

    def train(self, dictionary: Dictionary, kind: str, steps: int, seed: int, *, begun: bool = False) -> float:
        """CPU seconds that it took."""
        method = dictionary if kind == "local" else EndToEnd(dictionary, self.model, SITE, downstream=float(kind == "e2e+downstream"))
        begin = time.process_time()
        train({"it": method}, self.stream(kind, seed), Recipe(steps=steps, log_every=steps), begun=["it"] if begun else [])
        return time.process_time() - begin


def measured(out: Path, bench: Bench, seeds: int) -> None:
    """Train and judge what is not in the folder yet."""
    there = out / "points.jsonl"
    done = read_lines(there) if there.exists() else []
    ratio = done[0]["ratio"] if done else price(bench)
    for seed in range(seeds):
        for arm, share in ARMS.items():
            if any((r["arm"], r["seed"]) == (arm, seed) for r in done):
                continue
            dictionary, seconds, kind = bench.new(seed), 0.0, arm if share == 1 else "e2e"
            local = bench.steps if arm.endswith("equal steps") else round((1 - share) * bench.steps * ratio)
            if local:
                seconds += bench.train(dictionary, "local", local, seed)
            if through := round(share * bench.steps):
                seconds += bench.train(dictionary, kind, through, seed, begun=bool(local))
            point = judge_dictionary(bench.board, SITE, dictionary.eval(), bench.lost, name=arm)
            record = {"arm": arm, "seed": seed, "ratio": ratio, "local": local, "e2e": through, "seconds": seconds, "point": point.as_json()}
            append_line(there, record)
            print(seed, arm, local, through, round(seconds), {k: round(point.metrics[k].mean, 3) for k in ("l0", "ce_increase", "fvu")}, flush=True)


def price(bench: Bench) -> float:
    """CPU seconds of an end-to-end step over those of a local one; median of three short runs of each, beyond the first step."""
    def step(kind: str, count: int) -> float:
        some = []
        for seed in range(3):
            one, many = (bench.train(bench.new(seed), kind, n, seed) for n in (1, 1 + count))
            some.append((many - one) / count)
        return statistics.median(some)

    each = {"e2e": step("e2e", 5), "local": step("local", 2 * 128 * (CONTEXT - 1) // TOKENS)}        # of local, two whole buffers
    print(each, flush=True)
    return each["e2e"] / each["local"]


def write(out: Path, method: str) -> None:
    """The page and the figures."""
    lines = read_lines(out / "points.jsonl")
    seeds = len({r["seed"] for r in lines})
    rows = ["| trained | local steps | e2e steps | CPU s | L0 | CE increase | KL | FVU | dead |", "|---" * 9 + "|"]
    for arm in ARMS:
        own = [r for r in lines if r["arm"] == arm]
        if own:
            rows.append(f"| {arm} | {own[0]['local']:,} | {own[0]['e2e']:,} | {statistics.mean(r['seconds'] for r in own):.0f} | " + " | ".join(
                told([r["point"]["metrics"][name]["mean"] for r in own]) for name in ("l0", "ce_increase", "kl", "fvu", "dead")) + " |")
    page = (
        "# End-to-end and local training at equal compute\n\n"
        f"    python scripts/latents_equal_compute.py --out runs/compute --method {method} --write\n\n"
        f"`{method}`, {WIDTH:,} latents, k {K}, `{SITE}` of the built-in model, steps of {TOKENS} tokens, windows of {CONTEXT}; the\n"
        f"standard library, judged on held-out files, {seeds} seeds of initialisation and order: mean ± standard deviation over them.\n"
        f"A step end to end was measured to cost {lines[0]['ratio']:.1f} times a local one (CPU seconds, streams included), and local training was\n"
        "given that many more steps. The downstream objective costs somewhat more a step than e2e alone: its CPU seconds say how much.\n\n"
        + "\n".join(rows) + "\n"
    )
    (ROOT / "docs/benchmarks/latents_equal_compute.md").write_text(page, encoding="utf-8")
    (ROOT / "docs/benchmarks/latents_equal_compute.json").write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


def told(values: list[float]) -> str:
    """Mean ± standard deviation."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--out", type=Path, required=True)
    ask.add_argument("--method", default="latents/topk")
    ask.add_argument("--steps", type=int, default=150, help="end to end")
    ask.add_argument("--seeds", type=int, default=3)
    ask.add_argument("--write", action="store_true", help="write the docs from what the folder holds")
    asked: Any = ask.parse_args()
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    measured(asked.out, Bench(asked.method, asked.steps), asked.seeds)
    if asked.write:
        write(asked.out, asked.method)


if __name__ == "__main__":
    main()
