"""What a computation costs: floating-point operations and bytes moved, counted from shapes; milliseconds, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Cost:
    """Counted work for one row (token). A multiply-add is 2 flops, as torch's FlopCounterMode counts."""

    flops: float
    bytes: float
    """Bytes of parameters, indices and cached state that must be read for the row at batch 1."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flops * times, self.bytes * times)


@dataclass(frozen=True)
class Timing:
    """Wall milliseconds of repeated calls after warm-up."""

    ms: float
    """Median."""
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    runs: int


def timed(call: Callable[[], object], *, runs: int = 9, warmup: int = 2) -> Timing:
    """Median and quartiles of `runs` calls after `warmup` uncounted ones; waits for the GPU where there is one."""

    def once() -> float:
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    for _ in range(warmup):
        once()
    times = torch.tensor([once() for _ in range(runs)], dtype=torch.float64)
    low, mid, high = times.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return Timing(mid, low, high, runs)


def counted_flops(call: Callable[[], object]) -> int:
    """Flops of one call as torch's own counter sees them (matrix products and attention; element-wise work is 0)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()
