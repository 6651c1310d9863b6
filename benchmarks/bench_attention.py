"""Attention over chosen key blocks against dense torch on this machine's CPU, float32, causal, choosing counted.

    python benchmarks/bench_attention.py [--prefill 2048,8192] [--decode 8192,32768] [--heads 8] [--kv-heads 2]
        [--width 64] [--runs 7] [--out FILE.json]

Dense and sparse calls alternate, so that a busy machine slows both. Ratios are dense / sparse of CPU time (process
time, all threads), medians. Decoding is timed in three parts: `attend` as a model calls it (checks and page bounds
over all keys every step), with page bounds that the caller keeps, and the kernel on a mask that is given.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rarefy.attention.block import BlockAttention
from rarefy.attention.quest import Quest, page_bounds
from rarefy.attention.window import WindowSinks
from rarefy.kernels.block_attention import block_attention

PREFILL = ((0.1, 64, 64), (0.25, 64, 64), (0.25, 16, 64))
"""(budget, block, query_block)"""
DECODE = ((0.05, 16), (0.25, 16))
"""(budget, block)"""


def cpu_ms(calls: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Median CPU milliseconds of each call, in turn, after one uncounted round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(runs + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if run:
                times[name].append((time.process_time() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def tensors(args: argparse.Namespace, T: int, S: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v at batch 1."""
    r = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, n, s, args.width, generator=r) for n, s in ((args.heads, T), (args.kv_heads, S), (args.kv_heads, S)))  # type: ignore[return-value]


def rows(kind: str, S: int, ms: dict[str, float], density: dict[str, float]) -> Iterator[dict[str, object]]:
    """One row a sparse call."""
    for name, value in ms.items():
        if name != "dense":
            yield {"kind": kind, "keys": S, "call": name, "density": round(density.get(name, 0.0), 4), "ms": round(value, 3),
                   "dense_ms": round(ms["dense"], 3), "ratio": round(ms["dense"] / value, 2)}


def prefill(args: argparse.Namespace, S: int) -> Iterator[dict[str, object]]:
    """S queries over S keys."""
    q, k, v = tensors(args, S, S)
    calls: dict[str, Callable[[], object]] = {"dense": lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)}
    density = {}
    for cls in (Quest, WindowSinks):
        for budget, block, query_block in PREFILL:
            method: BlockAttention = cls(budget=budget, block=block, query_block=query_block)
            name = f"{cls.name} {budget:g}, block {block}, query block {query_block}"
            method(q, k, v)
            density[name] = method.measured_density()
            calls[name] = lambda method=method: method(q, k, v)
    yield from rows("prefill", S, cpu_ms(calls, args.runs), density)


def decode(args: argparse.Namespace, S: int) -> Iterator[dict[str, object]]:
    """One query over S keys."""
    q, k, v = tensors(args, 1, S)
    calls: dict[str, Callable[[], object]] = {"dense": lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True)}
    density = {}
    for budget, block in DECODE:
        method = Quest(budget=budget, block=block)
        mask = method.choose(q, k, True)
        low, high = (x.mT.contiguous() for x in page_bounds(k, block))
        how = {"block": block, "query_block": 1, "scale": args.width**-0.5}

        def bounded(low: Tensor = low, high: Tensor = high, mask: Tensor = mask, how: dict = how) -> Tensor:
            q_BGRD = q.unflatten(1, (args.kv_heads, -1)).squeeze(3)
            score_BHN = (q_BGRD.clamp_min(0) @ high - (-q_BGRD).clamp_min(0) @ low).flatten(1, 2)
            score_BHN[..., -1] = torch.inf
            index = score_BHN.topk(int(mask[0, 0, 0].sum()), -1).indices
            chosen = torch.zeros_like(mask[:, :, 0]).scatter_(-1, index, True)
            return block_attention(q, k, v, chosen[:, :, None], **how)

        names = [f"quest {budget:g}, page {block}, {part}" for part in ("attend", "bounds kept", "kernel alone")]
        calls |= dict(zip(names, (lambda method=method: method(q, k, v), bounded,
                                  lambda mask=mask, how=how: block_attention(q, k, v, mask, **how)), strict=True))
        torch.testing.assert_close(calls[names[0]](), calls[names[1]](), rtol=1e-4, atol=1e-5)
        method.measured_density()
        method(q, k, v)
        density |= dict.fromkeys(names, method.measured_density())
    yield from rows("decode", S, cpu_ms(calls, 5 * args.runs), density)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    sizes = {"type": lambda text: [int(x) for x in text.split(",") if x]}
    parser.add_argument("--prefill", default=[2048, 8192], **sizes)
    parser.add_argument("--decode", default=[8192, 32768], **sizes)
    for name, value in (("heads", 8), ("kv-heads", 2), ("width", 64), ("runs", 7), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    with torch.no_grad():
        for measure, sizes_of in ((prefill, args.prefill), (decode, args.decode)):
            for S in sizes_of:
                for row in measure(args, S):
                    results.append(row)
                    print(f"{row['kind']:8}{row['keys']:7} {row['call']:52} density {row['density']:.3f}  "
                          f"{row['ms']:9.2f} ms  dense/sparse {row['ratio']}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
