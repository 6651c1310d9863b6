"""A decoding step through policies of the key-value cache against torch's dense attention over a cache of the same length, one thread.

    OMP_NUM_THREADS=1 python benchmarks/bench_caches.py [--tokens 8192,32768] [--heads 8] [--kv-heads 2] [--width 64] [--runs 5]

One query a head, batch 1, float32, calls in turn, medians of CPU time; a step is all that a policy's layer does for a token: taking it in,
selection, attention, packing what leaves the window. Ratios are dense / policy; bytes are those held, of a dense cache's (without its spare
room), with an offloaded part in brackets. Keys and values are random: the figures say what a step costs, not what it keeps. Dictionaries of CSR
are random too, and its prompt is filled with random codes, since pursuit of so many keys is not what is timed.
"""
from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rarefy.attention.cache import make
from rarefy.attention.cache.csr import CSR
from rarefy.attention.cache.policy import PolicyLayer

POLICIES: tuple[tuple[str, float, dict[str, Any]], ...] = (
    ("window", 0.1, {}), ("h2o", 0.1, {}), ("snapkv", 0.1, {}), ("pages", 0.05, {}), ("pages", 0.1, {}), ("mustafar", 0.5, {}),
    ("mustafar", 0.25, {}), ("csr", 0.125, {}), ("shadow", 0.05, {"rank": 32}),
)


def prompt(name: str, policy: Any, k: Tensor, v: Tensor, q: Tensor) -> tuple[PolicyLayer, Callable[[Tensor, Tensor, Tensor], object]]:
    """(a layer that has read the keys, a call for one more token)."""
    layer, D = policy.layer(policy, 0), q.shape[-1]
    policy.layers, policy.is_on = [layer], True

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer.update(k, v)
        at_BT = torch.arange(layer.seen - k.shape[2], layer.seen)[None]
        return layer.answer(q, k, v, at_BT, scale=D**-0.5, rotary=None, hidden_BTD=None)

    if isinstance(policy, CSR):
        atoms = torch.nn.functional.normalize(torch.randn(2, policy.atoms, D), dim=-1)
        policy.atoms_of = [(atoms[0], atoms[1])]
        S, n = k.shape[2] - policy.recent, max(1, round(policy.budget_of(0) * D))
        codes = {x: torch.randint(policy.atoms, (1, k.shape[1], S, n)).short() for x in ("k index", "v index")}
        layer.far.place(torch.arange(S)[None], **codes, k=torch.randn(1, k.shape[1], S, n), v=torch.randn(1, k.shape[1], S, n))
        layer.seen = k.shape[2]
        at = torch.arange(S, layer.seen).expand(1, k.shape[1], -1).int()
        layer.window.append(k=k[:, :, S:], v=v[:, :, S:], at=at)
    else:
        step(q[:, : k.shape[1]].expand(-1, -1, k.shape[2], -1), k, v)          # as many query heads as key heads: the prompt is not timed
    return layer, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="8192")
    for name, default in (("--heads", 8), ("--kv-heads", 2), ("--width", 64), ("--runs", 5)):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args()
    torch.manual_seed(0)
    print("| tokens | policy | budget | dense ms | step ms | times dense | bytes |\n|---|---|---|---|---|---|---|")
    with torch.no_grad():
        for S in map(int, args.tokens.split(",")):
            for row in rows(args, S):
                print(row, flush=True)


def rows(args: argparse.Namespace, S: int) -> list[str]:
    """A line of the table for each policy, at one length; dense is timed beside each."""
    q, D = torch.randn(1, args.heads, 1, args.width), args.width
    k, v = torch.randn(2, 1, args.kv_heads, S, D).unbind()
    out = []
    for name, budget, settings in POLICIES:
        if name == "h2o" and S > 10_000:                     # its prompt sums all probabilities: minutes here
            continue
        layer, step = prompt(name, make(name, budget=budget, **settings), k, v, q)
        size = 2 * k.numel() * k.element_size()
        held, away = layer.bytes(False) / size, layer.bytes(True) / size
        times: tuple[list[float], list[float]] = ([], [])
        for run in range(args.runs + 2):
            new = torch.randn(2, 1, args.kv_heads, 1, D).unbind()
            for which in (0, 1):
                start = time.thread_time()
                if which:
                    step(q, *new)
                else:
                    scaled_dot_product_attention(q, k, v, enable_gqa=True)
                if run > 1:
                    times[which].append((time.thread_time() - start) * 1e3)
        dense, mine = map(statistics.median, times)
        out.append(f"| {S} | {name} | {budget:g} | {dense:.2f} | {mine:.2f} | {dense / mine:.1f} | {held:.2f}{f' (+{away:.2f})' if away else ''} |")
    return out


if __name__ == "__main__":
    main()
