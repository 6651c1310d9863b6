"""Quantiles of non-negative numbers from a histogram of fixed size, whatever the number of values.

A bin holds the float32 numbers that agree in exponent and the first 8 mantissa bits, so its width is at most 1/256 of
its value, and counts are whole numbers: splitting the data differently gives the same bits.

Shape letters: Q = bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SHIFT = 15
BINS = 0x7F800000 >> _SHIFT
"""Bins of all finite float32 numbers >= 0."""


def add_to(count_Q: Tensor, values: Tensor) -> None:
    """Count finite values >= 0 of any shape into count_Q [BINS] int64, in place."""
    most = torch.finfo(torch.float32).max
    bits = values.detach().double().clamp(0, most).float().flatten().view(torch.int32)
    count_Q += torch.bincount(bits >> _SHIFT, minlength=BINS)


def quantile(count_Q: Tensor, q: float) -> float:
    """The value that a fraction q of those counted do not exceed, interpolated within its bin.

    Non-decreasing in q. Needs at least one value counted.
    """
    total_Q = count_Q.cumsum(0)
    rank = q * int(total_Q[-1])
    at = min(int(((total_Q.double() < rank) | (total_Q == 0)).sum()), int(count_Q.nonzero()[-1]))
    edges = (torch.tensor([at, at + 1], dtype=torch.int32) << _SHIFT).view(torch.float32).double()
    if not torch.isfinite(edges[1]):
        edges[1] = torch.finfo(torch.float32).max
    inside = (rank - (int(total_Q[at]) - int(count_Q[at]))) / max(1, int(count_Q[at]))
    return float(edges[0] + (edges[1] - edges[0]) * min(max(inside, 0.0), 1.0))
