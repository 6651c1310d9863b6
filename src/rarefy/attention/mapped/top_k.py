"""Top-k attention (Gupta et al. 2021, arXiv 2106.06899): softmax over each query's highest scores.

Every score is formed, so it saves no time: it is what methods that guess the highest scores are measured against.

Shape letters: B = batch, H = query heads, T = queries, S = keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import maps
from ..block import highest
from .base import BudgetedMap


class TopK(BudgetedMap):
    """softmax over the max(1, round(budget * n)) highest scores of the n that a query sees; of equal ones the earlier.

    Args:
        budget: fraction of the visible keys.
    """

    name = "attention/top_k"

    def weights(self, score_BHTS: Tensor, seen_BHT1: Tensor) -> Tensor:
        """softmax of what is kept."""
        keep = (self._budget * seen_BHT1.double()).round().clamp_min(1).long()
        return maps.softmax(score_BHTS.masked_fill(~highest(score_BHTS, keep), -torch.inf))

    def naive(self, score_BHTS: Tensor, seen_BHT1: Tensor) -> Tensor:
        """By a stable sort of each row."""
        rank = score_BHTS.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
        keep = torch.tensor([max(1, round(self._budget * n)) for n in seen_BHT1.flatten().tolist()]).view(seen_BHT1.shape)
        return score_BHTS.masked_fill(rank >= keep, -torch.inf).softmax(-1)
