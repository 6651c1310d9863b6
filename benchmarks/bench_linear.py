"""Batch 1: linear layers and a gated FFN that read only their kept inputs, against dense torch.

    python benchmarks/bench_linear.py [--d 1024] [--ff 4096] [--runs 40] [--out FILE.json]

Dense and sparse calls alternate, so that a busy machine slows both; every call reads another of `copies` weights and
another active set, so that the kept weights come from memory rather than from cache. Ratios are dense / sparse of
CPU time (process time, all threads), medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from rarefy.kernels.gather_linear import gather_linear
from rarefy.kernels.gather_linear.cpu import available

DENSITIES = (0.1, 0.25, 0.5)


def cpu_ms(calls: dict[str, Callable[[int], object]], runs: int) -> dict[str, float]:
    """Median CPU milliseconds of each call, in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(runs + 3):
        for name, call in calls.items():
            start = time.process_time()
            call(run)
            if run >= 3:
                times[name].append((time.process_time() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def torch_gather(x: Tensor, keep: Tensor, weight: Tensor) -> Tensor:
    index = keep[0].nonzero().squeeze(-1)
    return (x[0][index] @ weight[index])[None]


def bench_linear(d: int, ff: int, dtype: torch.dtype, runs: int, copies: int) -> list[dict[str, object]]:
    dense = [torch.randn(ff, d).to(dtype) for _ in range(copies)]
    across = [w.t().contiguous() for w in dense]
    x = torch.randn(1, d).to(dtype)
    rows = []
    for density in DENSITIES:
        keep = [torch.rand(1, d).argsort() < round(density * d) for _ in range(copies)]
        ms = cpu_ms({
            "dense": lambda i: linear(x, dense[i % copies]),
            "rarefy": lambda i, keep=keep: gather_linear(x, keep[i % copies], across[i % copies]),
            "torch gather": lambda i, keep=keep: torch_gather(x, keep[i % copies], across[i % copies]),
        }, runs)
        rows.append({"op": f"linear {d}->{ff}", "dtype": str(dtype), "density": density, **ms})
    return rows


def bench_ffn(d: int, ff: int, dtype: torch.dtype, runs: int, copies: int) -> list[dict[str, object]]:
    """down(silu(gate x) * up x) where only some hidden neurons are needed: gate, up and down read those alone."""
    sets = [[torch.randn(ff, d).mul(d**-0.5).to(dtype) for _ in range(3)] for _ in range(copies)]
    gate_up = [[w.t().contiguous() for w in triple[:2]] for triple in sets]
    down = [triple[2].t().contiguous() for triple in sets]
    x = torch.randn(1, d).to(dtype)
    rows = []
    for density in DENSITIES:
        keep_d = [torch.rand(1, d).argsort() < round(density * d) for _ in range(copies)]
        keep_f = [torch.rand(1, ff).argsort() < round(density * ff) for _ in range(copies)]

        def dense(i: int) -> Tensor:
            g, u, _ = sets[i % copies]
            return linear(silu(linear(x, g)) * linear(x, u), down[i % copies])

        def sparse(i: int, keep_d: list[Tensor] = keep_d, keep_f: list[Tensor] = keep_f) -> Tensor:
            g, u = gate_up[i % copies]
            k = keep_d[i % copies]
            hidden = silu(gather_linear(x, k, g)) * gather_linear(x, k, u)
            return gather_linear(hidden, keep_f[i % copies], sets[i % copies][2])

        rows.append({"op": f"gated ffn {d}, {ff}", "dtype": str(dtype), "density": density, **cpu_ms({"dense": dense, "rarefy": sparse}, runs)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--d", type=int, default=1024)
    parser.add_argument("--ff", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    if not available(torch.zeros(1, 1), torch.zeros(1, 1)):
        print("numba is missing: these are torch's own gathers")
    results = []
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            for bench in (bench_linear, bench_ffn):
                results += bench(given.d, given.ff, dtype, given.runs, given.copies)
    for row in results:
        times = {k: v for k, v in row.items() if isinstance(v, float) and k != "density"}
        text = ", ".join(f"{k} {v:.3f} ms ({times['dense'] / v:.1f}x)" for k, v in times.items())
        print(f"{row['op']:<22} {row['dtype']:<15} {row['density']:.0%}: {text}")
    if given.out:
        given.out.write_text(json.dumps({"schema": 1, "threads": given.threads, "torch": torch.__version__, "rows": results}, indent=1))


if __name__ == "__main__":
    main()
