"""A decoding step through policies of the key-value cache against torch's dense attention over a cache of the same length, one thread.

    OMP_NUM_THREADS=1 python benchmarks/bench_caches.py [--tokens 8192,32768] [--heads 8] [--kv-heads 2] [--width 64] [--runs 15]
    OMP_NUM_THREADS=1 python benchmarks/bench_caches.py --generate llama,builtin         # model.generate behind a prompt of 8,192 tokens

One query a head, batch 1, float32; dense, grouped and policy in turn, medians of CPU time over the runs. A step is all that a policy's layer does
for a token: checking and taking it in, selection, attention, packing what leaves the window. "dense" is scaled_dot_product_attention as
transformers calls it (enable_gqa), "grouped" the same with the query heads of a key head side by side as if they were queries, which reads each
key once; neither takes the token in. Ratios are dense / policy; bytes are those held, of a dense cache's, without spare room, an offloaded part in
brackets. Keys and values are random: the figures say what a step costs, not what it keeps. What evicting policies hold is put there; dictionaries
and codes of CSR are random too: neither prompts nor pursuit of so many keys are timed here.

With --generate: a Llama of two layers (512 wide, 8 heads, random weights) or the built-in model goes on from 8,192 tokens; CPU time a new token,
the model's own work included, against transformers' DynamicCache and rarefy's Cache.
"""
from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rarefy.attention.cache import Cache, make
from rarefy.attention.cache.csr import CSR
from rarefy.attention.cache.evicting import EvictingLayer
from rarefy.attention.cache.policy import PolicyLayer, _Served

POLICIES: tuple[tuple[str, float, dict[str, Any]], ...] = (
    ("window", 0.1, {}), ("h2o", 0.1, {}), ("snapkv", 0.1, {}), ("pages", 0.05, {}), ("pages", 0.1, {}), ("mustafar", 0.5, {}),
    ("mustafar", 0.25, {}), ("csr", 0.125, {}), ("shadow", 0.05, {"rank": 32}),
)
PROMPT, NEW, ROUNDS = 8192, 24, 3


def filled(policy: Any, k: Tensor, v: Tensor) -> tuple[PolicyLayer, Callable[[Tensor, Tensor, Tensor], object]]:
    """(a layer that holds what it would of these keys, a call for one more token)."""
    layer, (_, G, S, D) = policy.layer(policy, 0), k.shape
    policy.layers, policy.is_on, served = [layer], True, _Served(policy)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer.update(k, v)
        return served.attend(q, k, v, scale=D**-0.5, causal=True, padding_BS=None, layer=0, cache=layer, rotary=None, hidden_BTD=None)

    if isinstance(layer, EvictingLayer):
        at = torch.cat([torch.arange(4), torch.arange(S - max(1, round(policy.budget_of(0) * S)) + 4, S)])
        more = {"sum": torch.rand(1, G, len(at))} if layer.accumulates else {}
        layer.entries.append(k=k[:, :, at], v=v[:, :, at], at=at.int().expand(1, G, -1), **more)
    elif isinstance(policy, CSR):
        atoms = torch.nn.functional.normalize(torch.randn(2, policy.atoms, D), dim=-1)
        policy.atoms_of = [(atoms[0], atoms[1])]
        far, n = S - policy.recent, max(1, round(policy.budget_of(0) * D))
        codes = {x: torch.randint(policy.atoms, (1, G, far, n)).short() for x in ("k index", "v index")}
        layer.far.place(torch.arange(far)[None], **codes, k=torch.randn(1, G, far, n), v=torch.randn(1, G, far, n))
        layer.window.append(k=k[:, :, far:], v=v[:, :, far:], at=torch.arange(far, S).expand(1, G, -1).int())
    else:
        step(k, k, v)                                                      # as many query heads as key heads: the prompt is not timed
        return layer, step
    layer.seen = S
    return layer, step


def rows(args: argparse.Namespace, S: int) -> list[str]:
    """A line of the table for each policy, at one length; dense is timed beside each."""
    q, D, G = torch.randn(1, args.heads, 1, args.width), args.width, args.kv_heads
    k, v = torch.randn(2, 1, G, S, D).unbind()
    side_by_side, out = q.view(1, G, -1, D), []
    for name, budget, settings in POLICIES:
        layer, step = filled(make(name, budget=budget, **settings), k, v)
        size = 2 * k.numel() * k.element_size()
        held, away = layer.bytes(False) / size, layer.bytes(True) / size
        times: tuple[list[float], ...] = ([], [], [])
        for run in range(args.runs + 3):
            new = torch.randn(2, 1, G, 1, D).unbind()
            for which in range(3):
                start = time.thread_time()
                if which == 0:
                    scaled_dot_product_attention(q, k, v, enable_gqa=True)
                elif which == 1:
                    scaled_dot_product_attention(side_by_side, k, v)
                else:
                    step(q, *new)
                if run > 2:
                    times[which].append((time.thread_time() - start) * 1e3)
        dense, grouped, mine = map(statistics.median, times)
        out.append(f"| {S} | {name} | {budget:g} | {dense:.2f} | {grouped:.2f} | {mine:.3f} | {dense / mine:.1f} | "
                   f"{held:.2f}{f' (+{away:.2f})' if away else ''} |")
    return out


def model_of(name: str) -> Any:
    if name == "builtin":
        from rarefy.hub import open_model

        return open_model("builtin")[0]
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1376, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8,
        max_position_embeddings=PROMPT + 1024)).eval()


def generated(name: str) -> list[str]:
    """A line for each cache: ms of a prompt and a new token in a model; caches take turns."""
    from transformers import DynamicCache

    model, ids = model_of(name), torch.randint(5, 900, (1, PROMPT))
    how: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    caches: dict[str, Any] = {"dense, DynamicCache": DynamicCache(), "dense, rarefy's Cache": Cache()}
    caches |= {f"{n} at {b:g}": make(n, budget=b, **settings) for n, b, settings in POLICIES if n not in ("mustafar", "csr")}
    texts, prompts, times = {}, {}, {n: [] for n in caches}
    for turn in range(1 + ROUNDS):
        for n, cache in caches.items():
            text = texts.get(n, ids)
            with cache.on(model) if hasattr(cache, "on") else contextlib.nullcontext():
                start = time.thread_time()
                more = 1 if not turn else NEW
                texts[n] = model.generate(text, attention_mask=torch.ones_like(text), past_key_values=cache, max_new_tokens=more, **how)
                spent = time.thread_time() - start
            if turn:
                times[n].append(spent / NEW * 1e3)
            else:
                prompts[n] = spent
    mid = {n: statistics.median(x) for n, x in times.items()}
    dense = mid["dense, DynamicCache"]
    return [f"| {name} | {n} | {prompts[n]:.1f} | {mid[n]:.1f} | {dense / mid[n]:.1f} |" for n in caches]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="8192,32768")
    parser.add_argument("--generate", default="")
    for name, default in (("--heads", 8), ("--kv-heads", 2), ("--width", 64), ("--runs", 15)):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        if args.generate:
            print("| model | cache | prompt, s | a token, ms | times DynamicCache |\n|---|---|---|---|---|")
            for name in args.generate.split(","):
                print("\n".join(generated(name)), flush=True)
            return
        print("| tokens | policy | budget | dense ms | grouped ms | step ms | times dense | bytes |\n|---|---|---|---|---|---|---|---|")
        for S in map(int, args.tokens.split(",")):
            print("\n".join(rows(args, S)), flush=True)


if __name__ == "__main__":
    main()
