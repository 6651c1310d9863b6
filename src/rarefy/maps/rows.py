"""What every map does with a row before and after: the dim moved to the end, half precision widened, bad scores refused."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadInput

NEAR_ONE = 1e-15
"""alpha - 1 below which exp_a is exp: weights then differ by 0.27 (alpha - 1) at most, float64's precision."""
STEPS = 100
"""Of the search for a row's threshold: far more than are taken. Newton's steps end after five to twelve, halving alone would need sixty."""


def opened(scores: Tensor, dim: int) -> Tensor:
    """[..., N] with `dim` last, in float32 or float64.

    Raises:
        BadInput: no such dim, no scores in it, or a dtype that is no float.
    """
    if not scores.is_floating_point():
        raise BadInput(f"scores are {scores.dtype}; a map to weights needs floating point")
    if not -scores.ndim <= dim < scores.ndim or not scores.shape[dim]:
        raise BadInput(f"dim={dim} of scores with shape {list(scores.shape)}: there is nothing to give weight to along it")
    moved = scores.movedim(dim, -1)
    return moved.float() if moved.dtype in (torch.float16, torch.bfloat16) else moved


def highest(x: Tensor) -> Tensor:
    """[..., 1] the row's maximum, 0 for rows of -inf alone. Raises BadInput for NaN and +inf, which it finds on the way."""
    top = x.amax(-1, keepdim=True)
    bad = top.isnan() | (top == torch.inf)
    if bad.any():
        row = [int(i) for i in bad.squeeze(-1).nonzero()[0]] if bad.ndim > 1 else []
        where = f"{int(bad.sum())} of {bad.numel()} rows hold NaN or +inf, the first at {row}"
        raise BadInput(f"scores: {where}; mask with -inf, and find the layer that made them")
    return top.masked_fill(top == -torch.inf, 0.0)


def closed(weight: Tensor, like: Tensor, dim: int) -> Tensor:
    """Weights [..., N] back to the place and dtype of the scores."""
    return weight.to(like.dtype).movedim(-1, dim)
