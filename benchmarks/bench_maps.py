"""Sparse maps against the entmax package and torch's softmax: CPU milliseconds of one thread, calls in turn, medians.

    python benchmarks/bench_maps.py [--runs 9]

Rows of a vocabulary (8 x 131,072) and of attention (8 heads, 512 x 512), normal scores; `error` is the largest difference from halving in float64.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import entmax as peer
import torch
from torch import Tensor

from rarefy import maps

CALLS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "softmax, torch": (1.0, lambda z: z.softmax(-1)),
    "sparsemax, rarefy": (2.0, maps.sparsemax), "sparsemax, entmax (k=100)": (2.0, lambda z: peer.sparsemax(z, k=100)),
    "1.5-entmax, rarefy": (1.5, maps.entmax15), "1.5-entmax, entmax (k=100)": (1.5, lambda z: peer.entmax15(z, k=100)),
    "1.3-entmax, rarefy": (1.3, lambda z: maps.entmax(z, 1.3)), "1.3-entmax, entmax (bisection)": (1.3, lambda z: peer.entmax_bisect(z, 1.3)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    for name, shape in (("vocabulary, 8 x 131072", (8, 131072)), ("attention, 8 x 512 x 512", (8, 512, 512))):
        z = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        times: dict[str, list[float]] = {call: [] for call in CALLS}
        with torch.no_grad():
            exact = {a: z.double().softmax(-1) if a == 1 else peer.entmax_bisect(z.double(), a, n_iter=80) for a in {a for a, _ in CALLS.values()}}
            for run in range(runs + 1):
                for call, (_, f) in CALLS.items():
                    start = time.thread_time()
                    f(z)
                    if run:
                        times[call].append((time.thread_time() - start) * 1e3)
        print(f"\n{name}\n| map | ms | error |\n|---|---|---|")
        for call, (alpha, f) in CALLS.items():
            print(f"| {call} | {statistics.median(times[call]):.1f} | {(f(z).double() - exact[alpha]).abs().max():.1e} |", flush=True)


if __name__ == "__main__":
    main()
