"""PLADIS (Kim & Sim 2025, arXiv 2503.07677): beyond the dense map, in the direction of a sparse one."""

from __future__ import annotations

from torch import Tensor

from ..errors import BadInput
from .entmax import entmax
from .softmax import softmax


def pladis(scores: Tensor, strength: float = 2.0, alpha: float = 1.5, dim: int = -1) -> Tensor:
    """softmax + strength * (entmax - softmax); rows sum to one, and past strength 1 small weights turn negative.

    Raises:
        BadInput: a strength below 0 or not finite; what entmax refuses.
    """
    if not 0 <= strength < float("inf"):
        raise BadInput(f"strength={strength} must be a finite number >= 0 (0 is softmax, 1 entmax, beyond 1 extrapolates)")
    dense = softmax(scores, dim)
    return dense + strength * (entmax(scores, alpha, dim) - dense)
