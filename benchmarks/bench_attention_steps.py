"""Steps of patterns and of methods that choose by content against torch's dense step; prefill over random graphs; first calls of kernels.

    python benchmarks/bench_attention_steps.py [--full] [--only patterns,methods,graphs,first] [--runs 15] [--out FILE.json]

One thread, float32, batch 1, 8 heads of 64, one layer; medians of the thread's CPU time, calls in turn with dense ones.

patterns   one query a head, patterns that keep 1 to 10 % of 8k keys, with --full also of 32k; the cache grows by a key each step
methods    one query a head by every method of catalogue/dynamic.py at 5 %, beside rarefy's cache; those that leave steps dense say so
graphs     prefill over random graphs of single pairs: the first call, which cuts the pattern, and the second
first      seconds of the first call of each compiled kernel in a fresh folder for compiled code, and of a second process
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from rarefy.attention.cache import Cache
from rarefy.attention.pattern import PatternAttention
from rarefy.catalogue import dynamic

H, D = 8, 64
Row = dict[str, Any]


def patterns(S: int) -> dict[str, str]:
    """Patterns that keep 1 to 10 % of S keys."""
    w = S // 20
    return {
        "window + sinks": f"window({w}) | sinks(4)", "dilated window": f"window({w // 2}, 4) | sinks(4)",
        "strided": f"window({w // 2}) | strided(64)",
        "fixed": "block(128) | summaries(128, 8)", "powers of two": "window(256) | lag(512) | lag(1024) | lag(2048)",
        "two kinds of heads": f"heads(window({w}) | sinks(4), strided(20))", "shards, each head its own": "blocks(64, window(4) | shards(16))",
        "window + random + global": f"window({w // 2}) | random(64, past=True) | tokens(0, 1)",
    }


def tensors(S: int) -> tuple[torch.Tensor, ...]:
    """Random q, k, v of S positions."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, H, S, D, generator=generator) for _ in range(3))


def milliseconds(call: Callable[[int], object], runs: int) -> tuple[float, float]:
    """(median of all but the first three, the first)."""
    times = []
    for i in range(runs + 3):
        start = time.thread_time()
        call(i)
        times.append((time.thread_time() - start) * 1e3)
    return statistics.median(times[3:]), times[0]


def dense_step(S: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, runs: int) -> float:
    return milliseconds(lambda i: scaled_dot_product_attention(q[:, :, i : i + 1], k[:, :, : S + i], v[:, :, : S + i]), runs)[0]


def of_patterns(S: int, runs: int) -> Iterator[Row]:
    """Steps of patterns."""
    q, k, v = tensors(S + runs + 8)
    made = {name: PatternAttention(text) for name, text in patterns(S).items()}
    for name, method in made.items():
        dense = dense_step(S, q, k, v, runs)
        ms, _ = milliseconds(lambda i, m=method: m.attend(q[:, :, i : i + 1], k[:, :, : S + i], v[:, :, : S + i], scale=D**-0.5), runs)
        yield {"kind": "patterns", "keys": S, "call": name, "ms": ms, "ratio": dense / ms, "density": method.measured_density()}


def of_methods(S: int, runs: int) -> Iterator[Row]:
    """Steps of every method."""
    q, k, v = tensors(S + runs + 8)
    for entry in dynamic.ENTRIES:
        kind = entry.load()
        wanted = inspect.signature(kind.__init__).parameters
        if entry.name == "attention/sparse_video" or entry.name == "attention/retrieval" and S > 8192:     # of videos; its graph counts pairs of keys
            continue
        method: Any = kind(**({"budget": 0.05} if "budget" in wanted else {})).eval()
        if getattr(kind, "fitted", "none") == "calibrated":
            method.observe(q[:, :, :512], k[:, :, :512], v[:, :, :512])
            method.finish()
        cache = Cache()
        cache.update(k[:, :, :S], v[:, :, :S], 0)
        layers = (2, 3) if entry.name == "attention/tidal" else (3,)         # a layer behind the one that selects
        extra = {"cache": cache.layers[0]} if "cache" in getattr(kind, "wants", ()) else {}

        def step(i: int, method: Any = method, cache: Any = cache, layers: tuple[int, ...] = layers, extra: Any = extra) -> float:
            keys, values = cache.update(k[:, :, S + i : S + i + 1], v[:, :, S + i : S + i + 1], 0)
            for layer in layers:
                start = time.thread_time()
                method.attend(q[:, :, S + i : S + i + 1], keys, values, scale=D**-0.5, layer=layer, **extra)
            return (time.thread_time() - start) * 1e3

        dense, times = dense_step(S, q, k, v, runs), [step(0)]
        times += [step(i) for i in range(1, runs + 3 if times[0] < 1e3 else 4)]
        ms = statistics.median(times[2:])
        yield {"kind": "methods", "keys": S, "call": entry.name.removeprefix("attention/") + (" (dense steps)" if method.prefill_only else ""),
                     "ms": ms, "ratio": dense / ms, "density": method.measured_density()}


def of_graphs(S: int, runs: int) -> Iterator[Row]:
    """Prefill over random graphs."""
    q, k, v = tensors(S)
    dense, _ = milliseconds(lambda _: scaled_dot_product_attention(q, k, v, is_causal=True), 1)
    for text in ("window(64) | random(16)", "random(64, past=True)", "around(64) | tokens(0, -1) | random(3)", "expander(8)"):
        method = PatternAttention(text)
        ms, first = milliseconds(lambda _, m=method: m(q, k, v), 1)
        yield {"kind": "graphs", "keys": S, "call": text, "ms": ms, "ratio": dense / ms, "density": method.measured_density(), "first": first}


HEAD = """
import time, torch
torch.set_num_threads(1)
from rarefy.attention.pattern import PatternAttention
from rarefy.kernels import block_attention as ba
from rarefy.kernels.block_attention.agree import agreements
from rarefy.kernels.block_attention.lines import line_attention
from rarefy.kernels.block_attention.listed import listed_products
from rarefy.kernels.block_attention.ranked import ranked_attention
from rarefy.kernels.block_attention.reach import reach
q, k, v = (torch.randn(1, 2, 128, 64, dtype=torch.{kind}, requires_grad={grad}) for _ in range(3))
one, every, S = q[:, :, -1:], torch.ones(1, 1, 2, 2, dtype=torch.bool), torch.arange(128)
start = time.process_time()
{call}
print(time.process_time() - start)
"""
FIRST = {
    "prefill, float32": ("float32", "ba.block_attention(q, k, v, every, block=64, query_block=64, scale=1.0)"),
    "prefill, bfloat16": ("bfloat16", "ba.block_attention(q, k, v, every, block=64, query_block=64, scale=1.0)"),
    "backward, float32": ("float32", "ba.block_attention(q, k, v, every, block=64, query_block=64, scale=1.0).sum().backward()"),
    "step over pages": ("float32", "ba.block_attention(one, k, v, every[:, :, :1], block=64, query_block=1, scale=1.0)"),
    "step over pages, bfloat16": ("bfloat16", "ba.block_attention(one, k, v, every[:, :, :1], block=64, query_block=1, scale=1.0)"),
    "listed keys": ("float32", "ba.token_attention(one, k, v, S[None, None, None], scale=1.0)"),
    "rows of a mask": ("float32", "ba.block_attention(q, k, v, (S <= S[:, None])[None, None], block=1, query_block=1, scale=1.0)"),
    "page bounds": ("float32", "ba.page_scores(one, k, 16)"),
    "highest": ("float32", "ba.highest(q[..., 0], torch.tensor([[3]]))"),
    "columns and diagonals": ("float32", "line_attention(q, k, v, S[None, None] < 9, S[None, None] < 9, scale=1.0)"),
    "ranked in few channels": ("float32", "ranked_attention(q, k, v, q, k, (S + 2) // 2, scale=1.0)"),
    "codes in common": ("float32", "agreements(S[:, None][None, None].byte(), S[:, None][None, None].byte())"),
    "codes in common, a step": ("float32", "agreements(S[:1, None][None, None].byte(), S[:, None][None, None].byte())"),
    "products with listed keys": ("float32", "listed_products(one, k, S.expand(1, 2, 1, -1))"),
    "top-p": ("float32", "reach(q[..., 0].abs(), q[..., 0] < -9, 0.5)"),
}


def of_first(_: int, runs: int) -> Iterator[Row]:
    """First calls in a fresh folder for compiled code, then in another process."""
    for name, (kind, call) in FIRST.items():
        with tempfile.TemporaryDirectory() as folder:
            text = HEAD.format(kind=kind, call=call, grad="backward" in call)
            env = {**os.environ, "NUMBA_CACHE_DIR": folder, "OMP_NUM_THREADS": "1"}
            both = [float(subprocess.run([sys.executable, "-c", text], env=env, check=True, capture_output=True, text=True).stdout) for _ in range(2)]
        yield {"kind": "first", "keys": 128, "call": name, "ms": both[0] * 1e3, "again": both[1] * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--full", action="store_true", help="32k keys beside 8k, and first calls")
    parser.add_argument("--only", default="", type=lambda text: text.split(","), help="patterns, methods, graphs, first")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    results: list[Row] = []
    phases = {"patterns": of_patterns, "methods": of_methods, "graphs": of_graphs, "first": of_first}
    chosen = [n for n in args.only if n] or [n for n in phases if n != "first" or args.full]
    for name in chosen:
        for S in (8192, 32768) if args.full and name != "first" else (8192,):
            for row in phases[name](S, args.runs):
                results.append(row)
                more = "".join(f"  {key} {row[key]:.3f}" for key in ("ratio", "density", "first", "again") if key in row)
                print(f"{row['kind']:9}{S:6}  {row['call']:42}{row['ms']:10.3f} ms{more}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
