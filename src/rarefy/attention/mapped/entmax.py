"""alpha-entmax attention (Correia, Niculae & Martins 2019, arXiv 1909.00015): a row's weights by entmax, with alpha learned by each head.

Shape letters: B = batch, H = query heads, T = queries, S = keys.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import maps
from ...errors import BadInput
from .base import MappedAttention


class Entmax(MappedAttention):
    """p = [(a - 1) z - tau]_+ ^ (1 / (a - 1)); softmax at a = 1, sparsemax at a = 2.

    Args:
        alpha: of every head, >= 1.
        heads: 0 keeps alpha as it is; else the number of query heads, each of which learns its own in (1, 2),
            a = 1 + sigmoid(logit), begun at `alpha`.
    """

    name = "attention/entmax"

    def __init__(self, alpha: float = 1.5, heads: int = 0) -> None:
        super().__init__()
        if not 1 <= alpha < float("inf"):
            raise BadInput(f"alpha={alpha} must be >= 1 (1 is softmax, 2 sparsemax)")
        if heads < 0 or not isinstance(heads, int):
            raise BadInput(f"heads={heads} must be 0, or the number of query heads that each learn an alpha")
        if heads and not 1 < alpha < 2:
            raise BadInput(f"alpha={alpha} must be in (1, 2) to be learned: it is 1 + sigmoid of a parameter")
        self.alpha = float(alpha)
        self.logit_H = nn.Parameter(torch.full((heads,), alpha - 1.0).logit()) if heads else None

    def _alpha(self, heads: int) -> float | Tensor:
        if self.logit_H is None:
            return self.alpha
        if len(self.logit_H) != heads:
            raise BadInput(f"{self.name} has an alpha for each of {len(self.logit_H)} heads, but was given {heads}")
        return 1 + self.logit_H.sigmoid()[:, None, None]

    def weights(self, score_BHTS: Tensor, seen_BHT1: Tensor) -> Tensor:
        """entmax of each row."""
        return maps.entmax(score_BHTS, self._alpha(score_BHTS.shape[1]))

    def naive(self, score_BHTS: Tensor, seen_BHT1: Tensor) -> Tensor:
        """The threshold by halving, in float64."""
        z, alpha = score_BHTS.double(), self._alpha(score_BHTS.shape[1])
        if not isinstance(alpha, Tensor) and alpha == 1:
            return z.softmax(-1)
        e = torch.as_tensor(alpha, dtype=torch.float64).to(z.device) - 1
        z = e * z
        low, high = z.amax(-1, keepdim=True) - 1, z.amax(-1, keepdim=True)
        for _ in range(80):
            tau = (low + high) / 2
            over = ((z - tau).clamp_min(0) ** (1 / e)).sum(-1, keepdim=True) >= 1
            low, high = torch.where(over, tau, low), torch.where(over, high, tau)
        return (z - (low + high) / 2).clamp_min(0) ** (1 / e)
