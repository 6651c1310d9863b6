"""Attention over chosen blocks against torch's dense attention on this machine's CPU, one thread, all in one run.

    python benchmarks/bench_attention.py [--full] [--prefill 8192] [--train 4096] [--decode 8192] [--lines 8192] [--tokens 4096]
        [--heads 8] [--kv-heads 8] [--width 64] [--runs 2] [--dtypes float32] [--out FILE.json]

These are the sizes without --full, under a minute; with it 16k, 8k and 32k beside them, bfloat16, and 5 runs. bench_attention_steps.py has
steps of whole methods and of patterns.

Calls alternate, so that a busy machine slows all of them; figures are medians of the thread's CPU time, ratios are dense / call. "ideal" is
dense time times density: 100 % means that nothing is lost against the dense kernel of torch, more that ours is the faster one.

prefill    sink + window and random blocks (its own, and others drawn a head) at about 10 % and 5 % of the causal blocks, blocks of 64
chosen     prefill with its selection counted: mean-pooled block scores, causal top-k, then attention
train      forward and backward
lines      whole methods that choose columns and diagonals, in prefill at about 10 % of the pairs, selection counted
tokens     whole methods whose queries each choose their own keys, in prefill at 2 to 10 % of the pairs, selection counted; beside them the
           peak memory of the process when their first call is done
decode     5 % of the keys in pages of 16 by QUEST's bounds (selection counted; page metadata kept, in bfloat16); all pages by the same kernel
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rarefy.attention.block import BlockAttention, highest
from rarefy.attention.dynamic.by_lines import ByLines, visible
from rarefy.attention.dynamic.double_sparsity import DoubleSparsity
from rarefy.attention.dynamic.loki import Loki
from rarefy.attention.dynamic.lsh import LSH
from rarefy.attention.dynamic.magicpig import MagicPIG
from rarefy.attention.dynamic.minference import MInference
from rarefy.attention.dynamic.sample import SampleAttention
from rarefy.attention.dynamic.twilight import Twilight
from rarefy.attention.dynamic.vertical_slash import VerticalSlash
from rarefy.attention.dynamic.zipvl import ZipVL
from rarefy.kernels.block_attention import block_attention, page_meta, page_scores, top_pages
from rarefy.kernels.block_attention.lines import line_pairs

BLOCK, PAGE = 64, 16
FULL = {"prefill": [8192, 16384], "train": [4096, 8192], "decode": [8192, 32768], "lines": [8192, 16384], "tokens": [4096, 8192, 16384]}
"""Keys of each kind of call; the first without --full."""
Calls = dict[str, tuple[Callable[[], object], float]]
"""name -> (call, density of its causal blocks; 0 where "ideal" says nothing)"""


def cpu_ms(calls: Calls, runs: int) -> dict[str, float]:
    """Median CPU milliseconds of each call, in turn, after one uncounted round; short calls are repeated within a turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    again = dict.fromkeys(calls, 1)
    for run in range(runs + 1):
        for name, (call, _) in calls.items():
            start = time.thread_time()
            for _ in range(again[name]):
                call()
            spent = (time.thread_time() - start) * 1e3 / again[name]
            if run:
                times[name].append(spent)
            else:
                again[name] = max(1, min(50, int(10 / max(spent, 1e-3))))
    return {name: statistics.median(values) for name, values in times.items()}


def tensors(args: argparse.Namespace, dtype: torch.dtype, T: int, S: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v at batch 1."""
    r = torch.Generator().manual_seed(0)
    sizes = ((args.heads, T), (args.kv_heads, S), (args.kv_heads, S))
    return tuple(torch.randn(1, n, s, args.width, generator=r).to(dtype) for n, s in sizes)  # type: ignore[return-value]


def causal(n: int) -> Tensor:
    """[n, n] bool."""
    return torch.ones(n, n, dtype=torch.bool).tril()


def sink_window(n: int, density: float) -> Tensor:
    """[1, 1, n, n]: the first block and the last w, w so that the share of causal blocks comes nearest to `density`."""
    i = torch.arange(n)
    masks = [causal(n) & ((i[:, None] - i < w) | (i == 0)) for w in range(1, n + 1)]
    return min(masks, key=lambda m: abs(int(m.sum()) / int(causal(n).sum()) - density))[None, None]


def random_blocks(n: int, density: float, heads: int) -> Tensor:
    """[1, H, n, n]: the own block and as many others, drawn anew a head and row, as make about `density` of the causal blocks."""
    score = torch.rand(heads, n, n, generator=torch.Generator().manual_seed(0)).masked_fill(~causal(n), -1.0)
    score.diagonal(dim1=1, dim2=2).fill_(2.0)
    keep = max(1, next((K for K in range(1, n + 1) if sum(min(K, i + 1) for i in range(n)) >= density * n * (n + 1) / 2), n))
    return (highest(score, torch.full((n, 1), keep)) & causal(n))[None]


def pooled_choice(q: Tensor, k: Tensor, density: float) -> Tensor:
    """[1, H, n, n]: of each query block's visible key blocks the `density` with the highest product of mean query and mean key."""
    share = q.shape[1] // k.shape[1]
    mean_q, mean_k = (x.unflatten(2, (-1, BLOCK)).mean(3, dtype=torch.float32) for x in (q, k))
    score = mean_q @ mean_k.repeat_interleave(share, 1).mT
    n = score.shape[-1]
    score = score.masked_fill(~causal(n), -torch.inf)
    score.diagonal(dim1=2, dim2=3).fill_(torch.inf)
    keep = torch.tensor([max(1, round(density * (i + 1))) for i in range(n)])[:, None]
    return highest(score, keep) & causal(n)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Ours, blocks of 64."""
    return block_attention(q, k, v, mask, block=BLOCK, query_block=BLOCK, scale=q.shape[-1] ** -0.5)


def share_of(mask: Tensor) -> float:
    """Chosen blocks of causal blocks."""
    return float((mask & causal(mask.shape[-1])).double().mean() / causal(mask.shape[-1]).double().mean())


def prefill(args: argparse.Namespace, dtype: torch.dtype, S: int) -> Calls:
    """S queries over S keys, forward; masks given, then chosen within the call."""
    q, k, v = tensors(args, dtype, S, S)
    n = S // BLOCK
    calls: Calls = {
        "dense": (lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), 0.0),
        "ours, all blocks": (lambda: attention(q, k, v, torch.ones(1, 1, n, n, dtype=torch.bool)), 1.0),
    }
    for density in (0.1, 0.05):
        for kind, mask in (("sink + window", sink_window(n, density)), ("random", random_blocks(n, density, args.heads))):
            calls[f"{kind}, {share_of(mask):.3f}"] = (lambda mask=mask: attention(q, k, v, mask)), share_of(mask)
        mask = pooled_choice(q, k, density)
        calls[f"chosen in the call, {share_of(mask):.3f}"] = (lambda d=density: attention(q, k, v, pooled_choice(q, k, d))), share_of(mask)
    return calls


def train(args: argparse.Namespace, dtype: torch.dtype, S: int) -> Calls:
    """Forward and backward."""
    inputs = tuple(x.requires_grad_() for x in tensors(args, dtype, S, S))
    grad, n = torch.randn_like(inputs[0]), S // BLOCK

    def both(forward: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), inputs, grad)

    calls: Calls = {
        "dense": (both(lambda: scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)), 0.0),
        "ours, all blocks": (both(lambda: attention(*inputs, torch.ones(1, 1, n, n, dtype=torch.bool))), 1.0),
    }
    for density in (0.1, 0.05):
        for kind, mask in (("sink + window", sink_window(n, density)), ("random", random_blocks(n, density, args.heads))):
            calls[f"{kind}, {share_of(mask):.3f}"] = both(lambda mask=mask: attention(*inputs, mask)), share_of(mask)
    return calls


def decode(args: argparse.Namespace, dtype: torch.dtype, S: int) -> Calls:
    """One query over S keys."""
    q, k, v = tensors(args, dtype, 1, S)
    how = {"block": PAGE, "query_block": 1, "scale": args.width**-0.5}
    meta, pages = page_meta(k, PAGE, half=True), S // PAGE
    keep, every = max(1, round(0.05 * pages)), torch.ones(1, 1, 1, pages, dtype=torch.bool)

    def choose() -> Tensor:
        return top_pages(page_scores(q, k, PAGE, meta), keep)

    chosen = choose()
    return {
        "dense": (lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True), 0.0),
        "ours, all pages": (lambda: block_attention(q, k, v, every, **how), 1.0),
        "5 % of the pages, chosen in the call": (lambda: block_attention(q, k, v, choose(), **how), keep / pages),
        "5 % of the pages, given": (lambda: block_attention(q, k, v, chosen, **how), keep / pages),
        "choosing alone": (choose, 0.0),
    }


def dialled(method: SampleAttention | ZipVL, q: Tensor, k: Tensor, density: float) -> BlockAttention:
    """The method with the share of mass at which it keeps about `density` of the pairs."""
    H, S, (low, high) = q.shape[1], q.shape[2], (0.0, 1.0)
    for _ in range(12):
        method.dial = (low + high) / 2
        column, back = (x.expand(1, H, S) for x in method.lines_of(q, k))
        more = float(line_pairs(column, back, S).sum()) < density * H * visible(S, S)
        low, high = (method.dial, high) if more else (low, method.dial)
    return method


def by_blocks(args: argparse.Namespace, side: int) -> MInference:
    """MInference whose heads have its patterns in turn, as if calibrated."""
    method = MInference(0.1, side=side)
    method.pattern_H, method.heads_3 = torch.arange(args.heads) % 3, torch.tensor([args.heads, args.kv_heads, args.width])
    return method


def lines(args: argparse.Namespace, dtype: torch.dtype, S: int) -> Calls:
    """Methods that choose columns and diagonals, choosing within the call. Random keys scatter the diagonals of vertical-slash, its worst
    case; "near" are the same queries and keys with a slow walk added, whose heavy diagonals lie together."""
    q, k, v = tensors(args, dtype, S, S)
    walk = torch.randn(1, 1, S, args.width, generator=torch.Generator().manual_seed(1)).cumsum(2) * (8 / S) ** 0.5
    near_q, near_k = q + walk.to(dtype), k + walk.to(dtype)
    minference = by_blocks(args, 16)
    given = {
        "vertical-slash": (VerticalSlash(0.1), q, k), "vertical-slash, near": (VerticalSlash(0.1), near_q, near_k),
        "sample": (dialled(SampleAttention(dial=0.5), q, k, 0.1), q, k), "zipvl": (dialled(ZipVL(dial=0.5), q, k, 0.1), q, k),
        "minference": (minference, q, k), "minference, blocks of 64": (by_blocks(args, 64), q, k),
    }
    calls: Calls = {"dense": (lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), 0.0)}
    for name, (method, query, key) in given.items():
        method(query, key, v)
        density = method.measured_density()
        calls[f"{name}, {density:.3f}"] = (lambda m=method, x=query, y=key: m(x, y, v)), density
        if isinstance(method, ByLines) and not name.startswith("minference"):
            calls[f"{name}, choosing alone"] = (lambda m=method, x=query, y=key: m.lines_of(x, y)), 0.0
    return calls


def tokens(args: argparse.Namespace, dtype: torch.dtype, S: int) -> Calls:
    """Methods that choose keys query by query, choosing within the call."""
    q, k, v = tensors(args, dtype, S, S)
    given: dict[str, BlockAttention] = {
        "loki": Loki(0.1), "double sparsity": DoubleSparsity(0.1), "loki, a half": Loki(0.05), "lsh": LSH(dial=14),
        **({} if S > 8192 else {"magicpig": MagicPIG(), "twilight": Twilight(0.1, dial=0.3)}),
    }
    calls: Calls = {"dense": (lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), 0.0)}
    for name, method in given.items():
        if isinstance(method, Loki | DoubleSparsity):
            method.observe(q[:, :, :512], k[:, :, :512], v[:, :, :512])
            method.finish()
        method(q, k, v)
        peak, density = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20), method.measured_density()
        calls[f"{name}, {density:.3f} ({peak:.1f} GiB)"] = (lambda m=method: m(q, k, v)), density
    return calls


def rows(kind: str, dtype: str, S: int, calls: Calls, runs: int) -> Iterator[dict[str, object]]:
    """One row a call."""
    ms = cpu_ms(calls, runs)
    for name, value in ms.items():
        density = calls[name][1]
        yield {"kind": kind, "dtype": dtype, "keys": S, "call": name, "ms": round(value, 3), "ratio": round(ms["dense"] / value, 2),
               "ideal": round(ms["dense"] * density / value, 3) if density else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--full", action="store_true", help="longer sequences, bfloat16, more runs")
    for name in FULL:
        parser.add_argument(f"--{name}", type=lambda text: [int(x) for x in text.split(",") if x])
    for name, value in (("heads", 8), ("kv-heads", 8), ("width", 64), ("runs", 0), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtypes", type=lambda text: text.split(","))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.runs, args.dtypes = args.runs or (5 if args.full else 2), args.dtypes or (["float32", "bfloat16"] if args.full else ["float32"])
    for name, lengths in FULL.items():
        if getattr(args, name) is None:
            setattr(args, name, lengths if args.full else lengths[:1])
    torch.set_num_threads(args.threads)
    results = []
    phases = ((prefill, args.prefill, args.runs), (train, args.train, args.runs), (decode, args.decode, 5 * args.runs),
              (lines, args.lines, args.runs), (tokens, args.tokens, args.runs))
    for measure, lengths, runs in phases:
        for dtype in args.dtypes:
            for S in lengths:
                with torch.set_grad_enabled(measure is train):
                    for row in rows(measure.__name__, dtype, S, measure(args, getattr(torch, dtype), S), runs):
                        results.append(row)
                        ideal = f"{100 * row['ideal']:6.0f} % of ideal" if isinstance(row["ideal"], float) else ""
                        print(f"{row['kind']:8}{dtype:9}{S:7} {row['call']:40}{row['ms']:10.2f} ms {row['ratio']:7.2f}x{ideal}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
