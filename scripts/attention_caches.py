"""Policies of the key-value cache side by side: what they keep, what it costs, and what a second question finds.

    python scripts/attention_caches.py              # minutes on one core; prints the first table of docs/kv-cache.md
    python scripts/attention_caches.py --equal      # every policy at the same bytes: the second table, and docs/pictures/caches-bytes.svg

Recall: 12 pairs in filler and six questions, 256 tokens, in the recall model. The prompt is the context and a first question, its
answer not among it; then, token by token, that question again and the five others. KL and top-1: 384 tokens of held-out Python read at once by
the built-in model, then 128 more one at a time. Bytes are those held after the prompt, of a dense cache's (without spare room).

--equal: for each share of a dense cache's bytes and each model, the setting that takes most without taking more. Evicting policies keep as many
entries as fit; Mustafar, CSR and Attamba as much of each far token as fits beside a window of 16 whole ones (4 where nothing does), which then
takes what is left; ShadowKV a rank; ADORE a budget. What a policy keeps in slow memory (values of ShadowKV, the store of ADORE) is not counted there,
but printed. The picture is drawn only where all policies were asked for.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import log_softmax

from rarefy.attention.cache import Cache, Policy, make
from rarefy.attention.cache.controller import Controller
from rarefy.builtin.corpus import text
from rarefy.builtin.model import recall_model
from rarefy.fidelity import Interval, ratio_interval
from rarefy.hub import open_model
from rarefy.plots import frontier_svg
from rarefy.tasks.recall import FILLER, KEYS, VALUES
from rarefy.tasks.turns import turns

POLICIES = ("random", "window", "h2o", "snapkv", "alisa", "pages", "probe", "mustafar", "csr", "shadow", "shared", "adore", "attamba")
EVICTING = ("random", "window", "h2o", "snapkv")
SETTINGS: dict[str, dict[str, Any]] = {
    "snapkv": {"window": 16}, "pages": {"page": 8}, "mustafar": {"recent": 16}, "csr": {"recent": 16}, "shadow": {"chunk": 8, "outliers": 2},
    "attamba": {"recent": 16},
}
BUDGETS = (0.5, 0.25, 0.1)
QUESTIONS, BATCH, PROMPT = 6, 24, 384
PICTURE = Path(__file__).parents[1] / "docs/pictures/caches-bytes.svg"


def dense_bytes(model, tokens: int, rows: int) -> int:
    c = model.config
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 4 * tokens * rows


def made(name: str, budget: float, model, ids, **settings: Any) -> Policy:
    policy: Any = make(name, budget=budget, **SETTINGS.get(name, {}) | settings)
    if hasattr(policy, "fit"):
        policy.fit(model, ids)
    return policy


@torch.no_grad()
def recalled(model, task, cache) -> tuple[float, float, int, int]:
    """(accuracy at the first question asked again, at the others, bytes after the prompt in fast and in slow memory)."""
    ids, first = task.recall.input_ids, task.context + task.turn
    model(input_ids=ids[:, : first - 1], past_key_values=cache)
    held, away = (cache.bytes(), 0) if isinstance(cache, Cache) else (cache.bytes(False), cache.bytes(True))

    def turn(start: int) -> float:
        for t in range(start, start + task.turn - 1):
            logits = model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits
        right = (logits[:, -1].argmax(-1) == ids[:, start + task.turn - 1]).float().mean()
        model(input_ids=ids[:, start + task.turn - 1 : start + task.turn], past_key_values=cache)
        return float(right)

    again = turn(task.context)
    return again, sum(turn(first + n * task.turn) for n in range(QUESTIONS - 1)) / (QUESTIONS - 1), held, away


@torch.no_grad()
def diverged(model, ids, dense, cache) -> tuple[Interval, Interval, int, int]:
    """(KL of the dense model's next token from this one's, share of steps with the same first token, bytes after the prompt as in recalled)."""
    model(input_ids=ids[:, :PROMPT], past_key_values=cache)
    held, away = cache.bytes(False), cache.bytes(True)
    total, same = torch.zeros(2, len(ids), dtype=torch.float64)
    for t in range(PROMPT, ids.shape[1]):
        got = log_softmax(model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits[:, -1], -1)
        want = log_softmax(dense[:, t], -1)
        total += (want.exp() * (want - got)).sum(-1)
        same += got.argmax(-1) == want.argmax(-1)
    count = torch.full((len(ids),), ids.shape[1] - PROMPT)
    return ratio_interval(total, count), ratio_interval(same, count), held, away


def most(fits: Callable[[int], bool], high: int) -> int:
    """The largest n in 0 .. high that fits, where fewer always do; 0 fits by assumption."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


@torch.no_grad()
def sized(name: str, share: float, model, ids) -> tuple[float, dict[str, Any]] | None:
    """(budget, settings) that take most fast memory within a share of the dense cache's bytes for a prompt like `ids` [1, T]; None: none does."""
    T, c = ids.shape[1], model.config
    D = c.head_dim

    def fits(budget: float, **settings: Any) -> bool:
        cache: Any = make(name, budget=budget, **SETTINGS.get(name, {}) | settings)
        if name == "csr":                                                  # sizes do not depend on what atoms are
            cache.atoms_of = [(torch.eye(cache.atoms, D),) * 2] * c.num_hidden_layers
        if name == "adore":
            cache.controllers = [Controller(c.hidden_size, c.num_key_value_heads, cache.states).requires_grad_(False)] * c.num_hidden_layers
        with cache.on(model):
            model(input_ids=ids, past_key_values=cache)
        return cache.bytes(False) <= share * dense_bytes(model, T, 1)

    if name in (*EVICTING, "adore"):
        kept = most(lambda n: fits(n / T), T)
        return (kept / T, {}) if kept else None
    if name == "shadow":
        rank = most(lambda n: fits(share, rank=n), c.num_key_value_heads * D)
        return (share, {"rank": rank}) if rank else None
    if name in ("mustafar", "csr", "attamba"):
        finer = [1 / n for n in range(2, 33)] if name == "attamba" else [n / D for n in range(D, 0, -1)]
        for window in (16, 4):
            budget = next((b for b in finer if fits(b, recent=window)), None)
            if budget is not None:
                return budget, {"recent": window + most(lambda n, b=budget, w=window: fits(b, recent=w + n), T - window)}
    return None


def point(name: str, share: float, kl: Interval, top1: Interval, held: int, dense: int) -> dict[str, Any]:
    """For the picture."""
    metrics = {key: {"mean": x.mean, "low": x.low, "high": x.high} for key, x in (("kl", kl), ("top1", top1))}
    about = {"method": f"cache/{name}", "role": "baseline" if name == "random" else "method", "budget": share, "density": share}
    return about | {"metrics": metrics, "cost": {"bytes": held, "dense_bytes": dense}}


def shown(settings: dict[str, Any], budget: float) -> str:
    return ", ".join([f"budget {budget:.3g}", *(f"{key} {value}" for key, value in settings.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="*", default=list(POLICIES))
    parser.add_argument("--equal", action="store_true")
    args = parser.parse_args()
    small = recall_model()
    task = turns(KEYS, VALUES, FILLER, 256, 12, BATCH, questions=QUESTIONS, seed=5)
    spare = turns(KEYS, VALUES, FILLER, 256, 12, 4, questions=QUESTIONS, seed=6).recall.input_ids
    large, tokenizer, _ = open_model("builtin")
    corpus = text("stdlib", tokenizer, context=512, batch=8, fit_tokens=8 * 512, judge_tokens=8 * 512)
    ids, other = corpus.judge[0].input_ids, corpus.fit[0].input_ids
    with torch.no_grad():
        dense = large(input_ids=ids).logits
    again, others, *_ = recalled(small, task, Cache())
    print(f"dense: first question again {again:.3f}, others {others:.3f}")
    last = "settings, recall model; built-in" if args.equal else ""
    print("| policy | budget | bytes | same question | other questions | KL | top-1 | bytes, built-in |" + (f" {last} |" if last else ""))
    print("|---|---|---|---|---|---|---|---|" + ("---|" if last else ""))
    points, prompt = [], task.context + task.turn - 1
    for name in args.policies:
        for share in BUDGETS:
            first = sized(name, share, small, spare[:1, :prompt]) if args.equal else (share, {})
            second = sized(name, share, large, other[:1, :PROMPT]) if args.equal else (share, {})
            if first is None or second is None:
                print(f"| {name} | {share:g} | no setting takes so little | | | | | |" + (" |" if last else ""), flush=True)
                continue
            cache = made(name, first[0], small, spare, **first[1])
            with cache.on(small):
                again, others, held, away = recalled(small, task, cache)
            parts = [f"{held / (all_ := dense_bytes(small, prompt, BATCH)):.2f}" + (f" (+{away / all_:.2f})" if away else "")]
            cache = made(name, second[0], large, other, **second[1])
            with cache.on(large):
                kl, top1, held, away = diverged(large, ids, dense, cache)
            parts.append(f"{held / (all_ := dense_bytes(large, PROMPT, len(ids))):.2f}" + (f" (+{away / all_:.2f})" if away else ""))
            points.append(point(name, share, kl, top1, held, all_))
            more = f" {shown(first[1], first[0])}; {shown(second[1], second[0])} |" if args.equal else ""
            scores = f"{again:.2f} | {others:.2f} | {kl.mean:.3f} ({kl.low:.3f}-{kl.high:.3f}) | {top1.mean:.2f}"
            print(f"| {name} | {share:g} | {parts[0]} | {scores} | {parts[1]} |{more}", flush=True)
    if args.equal and set(args.policies) == set(POLICIES):
        PICTURE.write_text(frontier_svg({
            "unit": "attention", "question": "", "x": {"key": "bytes", "label": "fast memory, of a dense cache's"}, "verdict": "",
            "y": {"key": "kl", "label": "KL from the dense model (nats a token)", "better": "low"}, "points": points}), encoding="utf-8")


if __name__ == "__main__":
    main()
