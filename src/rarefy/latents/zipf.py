"""Zipf's law as a target for how often latents fire: few often, most rarely, none never.

Shape letters: F = latents, rank order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def zipf_rates(width: int, k: float, exponent: float) -> Tensor:
    """[F] float64, falling: rates c * rank^-exponent that sum to k, none above 1 (Zipf's law; what a cap cuts off goes to later ranks)."""
    shape_F = torch.arange(1, width + 1, dtype=torch.float64).pow(-exponent)
    tail_F = shape_F.flip(0).cumsum(0).flip(0)
    factor_F = (k - torch.arange(width)) / tail_F              # c, were the first f rates 1
    capped = int((factor_F * shape_F > 1).sum())               # the test holds for a prefix only, as the shape falls
    return torch.cat((torch.ones(capped, dtype=torch.float64), factor_F[min(capped, width - 1)] * shape_F[capped:]))


def in_whole_numbers(share_F: Tensor, offset: float) -> Tensor:
    """[F] int64 within 1 of each share, summing to the rounded total; over offsets spread evenly in [0, 1) each has its share as mean.

    Systematic sampling (Madow 1949): ticks at whole numbers plus `offset` along the cumulated shares, each share owning those on it.
    """
    edge_F = share_F.cumsum(0)
    edge_F[-1] = round(float(edge_F[-1]))                      # rounding of the sum must not cost a tick
    return (edge_F + offset).floor().long().diff(prepend=torch.zeros(1, dtype=torch.long, device=share_F.device))
