"""Policies of the key-value cache side by side: what they keep, what it costs, and what a second question finds.

    python scripts/attention_caches.py              # minutes on one core; prints the tables of docs/kv-cache.md

Recall: 12 pairs in filler and six questions, 256 tokens, in the recall model. The prompt is the context and a first question, its
answer not among it; then, token by token, that question again and the five others. KL: 384 tokens of held-out Python read at once by the
built-in model, then 128 more one at a time. Bytes are those held after the prompt, of a dense cache's (without spare room).
"""
from __future__ import annotations

import argparse

import torch
from torch.nn.functional import log_softmax

from rarefy.attention.cache import Cache, Policy, make
from rarefy.builtin.corpus import text
from rarefy.builtin.model import recall_model
from rarefy.hub import open_model
from rarefy.tasks.recall import FILLER, KEYS, VALUES
from rarefy.tasks.turns import turns

POLICIES = ("random", "window", "h2o", "snapkv", "alisa", "pages", "probe", "mustafar", "csr", "shadow", "shared", "adore", "attamba")
SETTINGS = {
    "snapkv": {"window": 16}, "pages": {"page": 8}, "mustafar": {"recent": 16}, "csr": {"recent": 16}, "shadow": {"chunk": 8, "outliers": 2},
    "attamba": {"recent": 16},
}
BUDGETS = (0.5, 0.25, 0.1)
QUESTIONS, BATCH, PROMPT = 6, 24, 384


def dense_bytes(model, tokens: int, rows: int) -> int:
    c = model.config
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 4 * tokens * rows


def made(name: str, budget: float, model, ids) -> Policy:
    policy = make(name, budget=budget, **SETTINGS.get(name, {}))
    if hasattr(policy, "fit"):
        policy.fit(model, ids)
    return policy


@torch.no_grad()
def recalled(model, task, cache) -> tuple[float, float, int]:
    """(accuracy at the first question asked again, at the others, bytes after the prompt)."""
    ids, first = task.recall.input_ids, task.context + task.turn
    model(input_ids=ids[:, : first - 1], past_key_values=cache)
    held = cache.bytes()

    def turn(start: int) -> float:
        for t in range(start, start + task.turn - 1):
            logits = model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits
        right = (logits[:, -1].argmax(-1) == ids[:, start + task.turn - 1]).float().mean()
        model(input_ids=ids[:, start + task.turn - 1 : start + task.turn], past_key_values=cache)
        return float(right)

    again = turn(task.context)
    return again, sum(turn(first + n * task.turn) for n in range(QUESTIONS - 1)) / (QUESTIONS - 1), held


@torch.no_grad()
def diverged(model, ids, dense, cache) -> tuple[float, int]:
    """(mean KL of the dense model's next token from this one's over the steps, bytes after the prompt)."""
    model(input_ids=ids[:, :PROMPT], past_key_values=cache)
    held, total = cache.bytes(), 0.0
    for t in range(PROMPT, ids.shape[1]):
        got = log_softmax(model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits[:, -1], -1)
        want = log_softmax(dense[:, t], -1)
        total += float((want.exp() * (want - got)).sum(-1).mean())
    return total / (ids.shape[1] - PROMPT), held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="*", default=list(POLICIES))
    names = parser.parse_args().policies
    small = recall_model()
    task = turns(KEYS, VALUES, FILLER, 256, 12, BATCH, questions=QUESTIONS, seed=5)
    spare = turns(KEYS, VALUES, FILLER, 256, 12, 4, questions=QUESTIONS, seed=6).recall.input_ids
    large, tokenizer, _ = open_model("builtin")
    corpus = text("stdlib", tokenizer, context=512, batch=8, fit_tokens=8 * 512, judge_tokens=8 * 512)
    ids, other = corpus.judge[0].input_ids, corpus.fit[0].input_ids
    with torch.no_grad():
        dense = large(input_ids=ids).logits
    again, others, _ = recalled(small, task, Cache())
    print(f"dense: first question again {again:.3f}, others {others:.3f}")
    print("| policy | budget | bytes | same question | other questions | KL | bytes, built-in |\n|---|---|---|---|---|---|---|")
    for name in names:
        for budget in BUDGETS:
            cache = made(name, budget, small, spare)
            with cache.on(small):
                again, others, held = recalled(small, task, cache)
            part = held / dense_bytes(small, task.context + task.turn - 1, BATCH)
            cache = made(name, budget, large, other)
            with cache.on(large):
                kl, kept = diverged(large, ids, dense, cache)
            rest = kept / dense_bytes(large, PROMPT, len(ids))
            print(f"| {name} | {budget:g} | {part:.2f} | {again:.2f} | {others:.2f} | {kl:.3f} | {rest:.2f} |", flush=True)


if __name__ == "__main__":
    main()
