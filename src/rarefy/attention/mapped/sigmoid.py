"""Sigmoid attention (Ramapuram et al. 2024, arXiv 2409.04431): each key weighed by itself, without competition in a row.

Shape letters: B = batch, H = query heads, T = queries, S = keys.
"""

from __future__ import annotations

from torch import Tensor

from ... import maps
from .base import MappedAttention


class Sigmoid(MappedAttention):
    """1 / (1 + exp(-(z - log n))), n the keys that a query sees, so that a row of zero scores sums to almost one.

    No weight is zero: it stands here as the dense end of the maps without competition.
    """

    name = "attention/sigmoid"

    def weights(self, score_BHTS: Tensor, seen_BHT1: Tensor) -> Tensor:
        """sigmoid(z - log n)."""
        return maps.sigmoid(score_BHTS, -seen_BHT1.to(score_BHTS.dtype).clamp_min(1).log())

    def naive(self, score_BHTS: Tensor, seen_BHT1: Tensor) -> Tensor:
        """1 / (1 + n exp(-z))."""
        return 1 / (1 + seen_BHT1 * (-score_BHTS).exp())
