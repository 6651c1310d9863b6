"""PLADIS (Kim & Sim 2025, arXiv 2503.07677): a trained model's softmax pushed on past entmax at inference.

Shape letters: B = batch, H = query heads, T = queries, S = keys.
"""

from __future__ import annotations

from torch import Tensor

from ... import maps
from ...errors import BadInput
from .base import MappedAttention
from .entmax import Entmax


class Pladis(MappedAttention):
    """softmax + strength * (entmax - softmax). Every key keeps a weight once strength passes 1, negative where entmax is zero.

    The paper does this in the cross attention of diffusion models; here it is a language model's self-attention.

    Args:
        strength: 0 is softmax, 1 entmax, the paper uses up to 2.
        alpha: of entmax.
    """

    name = "attention/pladis"

    def __init__(self, strength: float = 2.0, alpha: float = 1.5) -> None:
        super().__init__()
        if not 0 <= strength < float("inf"):
            raise BadInput(f"strength={strength} must be a finite number >= 0")
        if not 1 <= alpha < float("inf"):
            raise BadInput(f"alpha={alpha} must be >= 1 (1 is softmax, 2 sparsemax)")
        self.strength, self.alpha = float(strength), float(alpha)

    def weights(self, score_BHTS: Tensor, seen_BHT1: Tensor) -> Tensor:
        """The extrapolated map."""
        return maps.pladis(score_BHTS, self.strength, self.alpha)

    def naive(self, score_BHTS: Tensor, seen_BHT1: Tensor) -> Tensor:
        """The two maps apart, in float64."""
        z = score_BHTS.double()
        return (1 - self.strength) * z.softmax(-1) + self.strength * Entmax(self.alpha).naive(z, seen_BHT1)
