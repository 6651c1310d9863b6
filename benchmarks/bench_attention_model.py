"""Attention methods inside a Hugging Face Llama against its dense attention (sdpa): prefill, training step, generation. One thread, one run.

    python benchmarks/bench_attention_model.py [--full] [--only prefill,train,decode] [--runs 3] [--dtypes float32,bfloat16] [--out FILE.json]

Passes alternate, so that a busy machine slows all of them; figures are medians of the thread's CPU time, ratios are dense / method, and the
density is what the method counted. Everything that a call costs is in it: choice, counting, checks for NaN.

prefill    two layers, 512 wide, 8 heads, random weights and tokens; 4k tokens, with --full 16k; methods at 10 % in blocks of 64, and
           Quest as it comes
train      forward and backward of the same at 1k tokens, with --full 4k
decode     greedy steps of the built-in model (6 layers, 4 heads of 64, 2 key heads) behind random tokens, 2k or with --full 8k of them: beyond
           the 2k positions it was trained on, which matters for what it says and not for how fast; and of the recall model for 8k tokens
           (2 layers, 4 heads of 32). Dense: sdpa and DynamicCache; Quest with rarefy's cache, prefill dense, pages of 16. And what needles
           the recall model finds at these budgets in as many tokens, in decoding.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from rarefy.attention.cache import Cache
from rarefy.attention.quest import Quest
from rarefy.builtin.model import builtin_folder, recall_model
from rarefy.catalogue import entry
from rarefy.site import replaced
from rarefy.tasks.needles import needles
from rarefy.tasks.recall import FILLER, KEYS, VALUES

BUDGETS = (0.05, 0.1, 0.25)
Row = dict[str, Any]


def llama(dtype: torch.dtype) -> Any:
    """The two-layer model, random weights."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 8}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=8, max_position_embeddings=32768))
    return model.eval().to(dtype)


def methods(S: int) -> dict[str, Any]:
    """Methods that keep about 10 % of the pairs of S tokens."""
    blocks = {"block": 64, "query_block": 64}
    pattern = f"window({round(0.05 * S)}) | sinks(4)"
    made = {"quest": {"budget": 0.1}, "window": {"budget": 0.1}, "pattern": {"pattern": pattern}, "moba": {"budget": 0.1}}
    return {f"{name} {how.get('pattern', '')}".strip(): entry(f"attention/{name}").load()(**how, **blocks).eval() for name, how in made.items()}


def as_it_comes() -> dict[str, Any]:
    """Quest with its own pages of 16, each query choosing for itself, and 16 queries choosing together."""
    return {f"quest, {name}": Quest(budget=0.1, **how).eval() for name, how in (
        ("block 16, query_block 1", {}), ("block 16, query_block 16", {"query_block": 16}))}


def in_turn(passes: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Median CPU seconds of each, after one uncounted round."""
    times: dict[str, list[float]] = {name: [] for name in passes}
    for run in range(runs + 1):
        for name, call in passes.items():
            start = time.thread_time()
            call()
            if run:
                times[name].append(time.thread_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def whole(kind: str, dtype: str, S: int, runs: int) -> list[Row]:
    """Prefill, or a training step's forward and backward."""
    model, train = llama(getattr(torch, dtype)), kind == "train"
    ids = torch.randint(0, 1024, (1, S), generator=torch.Generator().manual_seed(0))
    every: dict[str, Any] = {"dense": None} | methods(S) | ({} if train else as_it_comes())

    def step(method: Any) -> None:
        with replaced(model, {"layers.*.attn": method}) if method is not None else contextlib.nullcontext(), torch.set_grad_enabled(train):
            out = model.model(input_ids=ids, use_cache=False).last_hidden_state
            if train:
                out.float().square().mean().backward()
                model.zero_grad()

    spent = in_turn({name: (lambda method=method: step(method)) for name, method in every.items()}, runs)
    return [{"kind": kind, "dtype": dtype, "tokens": S, "call": name, "s": round(t, 4), "ratio": round(spent["dense"] / t, 2),
             "density": round(every[name].measured_density(), 4) if every[name] is not None else 1.0} for name, t in spent.items()]


class Generation:
    """A model behind a context that was read densely, once for each kind of cache; `steps` continues it greedily."""

    def __init__(self, model: Any, ids: torch.Tensor, cache: Any, method: Any) -> None:
        self.model, self.method, self.cache = model, method, cache
        self.ids = torch.cat([ids, model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)], 1)

    def steps(self, count: int) -> None:
        """`generate` of `count` tokens behind what is held."""
        inside = replaced(self.model, {"layers.*.attn": self.method}) if self.method is not None else contextlib.nullcontext()
        with inside:
            self.ids = self.model.generate(self.ids, past_key_values=self.cache, attention_mask=torch.ones_like(self.ids), do_sample=False,
                                           max_new_tokens=count, min_new_tokens=count, use_cache=True, pad_token_id=0)


def generations(model: Any, S: int) -> dict[str, Generation]:
    """A model behind S random tokens of its vocabulary, dense and by Quest."""
    ids = torch.randint(0, model.config.vocab_size, (1, S), generator=torch.Generator().manual_seed(0))
    made: dict[str, Generation] = {"dense": Generation(model, ids, DynamicCache(), None)}
    made["dense, rarefy's cache"] = Generation(model, ids, Cache(), None)
    return made | {f"quest {budget:g}": Generation(model, ids, Cache(), Quest(budget=budget, block=16).eval()) for budget in BUDGETS}


def decode(dtype: str, S: int, runs: int, count: int = 32) -> list[Row]:
    """Tokens a second of the built-in model and of the recall model for S tokens, and the needles that the latter finds in S tokens."""
    kind = getattr(torch, dtype)
    models = {"": LlamaForCausalLM.from_pretrained(builtin_folder(), dtype=kind).eval(), "recall model, ": recall_model(S).to(kind)}
    made = {prefix + name: one for prefix, model in models.items() for name, one in generations(model, S).items()}
    spent = in_turn({name: (lambda one=one: one.steps(count)) for name, one in made.items()}, runs)
    found = {f"quest {budget:g}": score for budget, score in recalled((1.0, *BUDGETS), S, kind).items()}
    found["dense"] = found.pop("quest 1")
    dense = {name: spent[("recall model, " if name.startswith("recall") else "") + "dense"] for name in spent}
    return [{"kind": "decode", "dtype": dtype, "tokens": S, "call": name, "s": round(t, 4), "ratio": round(dense[name] / t, 2),
             "tokens/s": round(count / t, 1), "density": round(made[name].method.measured_density(), 4) if made[name].method is not None else 1.0,
             "needle": found.get(name.removeprefix("recall model, "))} for name, t in spent.items()]


def recalled(budgets: tuple[float, ...], S: int, dtype: torch.dtype) -> dict[float, float]:
    """Share of 4 needles of 8 found by the recall model in S tokens: filler read densely, each question answered under Quest."""
    model, sequences = recall_model(S).to(dtype), 64 if S <= 512 else 16
    task = needles(list(KEYS), list(VALUES), list(FILLER), S, 8, sequences, asked=4)
    first = int(task.answer.nonzero()[:, 1].min()) - 1            # the first question
    right = dict.fromkeys(budgets, 0.0)
    for ids in task.input_ids.split(max(1, 8192 // S)):
        read = Cache()
        model(input_ids=ids[:, :first], past_key_values=read, logits_to_keep=1)
        for budget in budgets:
            cache = copy.deepcopy(read)
            with replaced(model, {"layers.*.attn": Quest(budget=budget, block=16).eval()}):
                logits = [model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits[:, -1] for t in range(first, S - 1)]
            right[budget] += float((torch.stack(logits, 1).argmax(-1) == ids[:, first + 1 :])[:, ::2].sum())      # every second token is an answer
    return {budget: round(count / int(task.answer.sum()), 4) for budget, count in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--full", action="store_true", help="16k, 4k and 8k tokens instead of 4k, 1k and 2k")
    parser.add_argument("--only", default=["prefill", "train", "decode"], type=lambda text: text.split(","))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtypes", default=["float32", "bfloat16"], type=lambda text: text.split(","))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: list[Row] = []
    sizes = {"prefill": (4096, 16384), "train": (1024, 4096), "decode": (2048, 8192)}
    for kind in args.only:
        for dtype in args.dtypes:
            S = sizes[kind][args.full]
            with torch.set_grad_enabled(kind == "train"):
                found = decode(dtype, S, args.runs) if kind == "decode" else whole(kind, dtype, S, args.runs)
            for row in found:
                results.append(row)
                more = f"  {row['tokens/s']:8.1f} tokens/s, needles {row['needle']}" if kind == "decode" else ""
                figures = f"{row['s']:9.3f} s {row['ratio']:6.2f}x  density {row['density']:.3f}"
                print(f"{kind:8}{dtype:9}{S:7} {row['call']:32}{figures}{more}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
