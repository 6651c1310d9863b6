"""Statistical top-k attention (You et al. 2025, arXiv 2506.06644): the highest scores by two moments and a comparison, no sort.

The paper scores with the first channels of queries and keys and modulates with the rest, which takes a model trained so; here
the whole product is both, and the map is what stands in for softmax.

Shape letters: B = batch, H = query heads, T = queries, S = keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import maps
from .base import BudgetedMap


class StatisticalTopK(BudgetedMap):
    """softmax over scores above mean + std * z, z the normal quantile with a share `budget` above it; at least the highest.

    Args:
        budget: fraction of the visible keys, met on average where scores are normal and missed where they are not.
    """

    name = "attention/statistical_top_k"

    def weights(self, score_BHTS: Tensor, seen_BHT1: Tensor) -> Tensor:
        """softmax of what passes the threshold of its row."""
        return maps.statistical_top_k(score_BHTS, self._budget * seen_BHT1)

    def naive(self, score_BHTS: Tensor, seen_BHT1: Tensor) -> Tensor:
        """Row by row, over the scores that are seen."""
        out = torch.zeros_like(score_BHTS)
        z = torch.special.ndtri(torch.tensor(1 - self._budget, dtype=torch.float64))
        for at in torch.cartesian_prod(*(torch.arange(n) for n in score_BHTS.shape[:3])):
            row = score_BHTS[tuple(at)]
            seen = row[row > -torch.inf].double()
            least = seen.mean() + seen.std(correction=0) * z
            keep = (row.double() > least) | (row == row.max())
            out[tuple(at)] = row.masked_fill(~keep, -torch.inf).softmax(-1)
        return out
