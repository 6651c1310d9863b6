"""softmax, the dense map that the others are measured against."""

from __future__ import annotations

from torch import Tensor

from .rows import closed, highest, opened


def softmax(scores: Tensor, dim: int = -1) -> Tensor:
    """exp(z) / sum exp(z). Unlike torch's, a row of -inf alone gives zeros and not NaN.

    Raises:
        BadInput: NaN or +inf.
    """
    x = opened(scores, dim)
    weight = (x - highest(x.detach())).exp()
    return closed(weight / weight.sum(-1, keepdim=True).clamp_min(1e-30), scores, dim)
