"""Maps that keep a given number of a row's scores.

Shape letters: N = scores of a row, K = kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from .rows import closed, highest, opened
from .softmax import softmax


def _count(k: float, n: int) -> None:
    if isinstance(k, bool) or not 0 < k <= n:
        raise BadInput(f"k={k} must be in 1..{n}, the number of scores in a row")


def top_k_softmax(scores: Tensor, k: int, dim: int = -1) -> Tensor:
    """softmax over each row's k highest scores, of equal ones the earlier (Gupta et al. 2021, arXiv 2106.06899)."""
    x = opened(scores, dim)
    _count(k, x.shape[-1])
    least = x.topk(k, -1).values[..., -1:]
    above, level = x > least, x == least
    keep = above | level & (level.cumsum(-1) <= k - above.sum(-1, keepdim=True))
    return closed(softmax(x.masked_fill(~keep, -torch.inf)), scores, dim)


def statistical_top_k(scores: Tensor, k: float | Tensor, dim: int = -1) -> Tensor:
    """softmax over the scores above mean + std * Q(1 - k / N), Q the normal quantile: about k of them, without a sort
    (You et al. 2025, arXiv 2506.06644).

    Mean and deviation are of the N scores that are not -inf; the highest is always kept, and all are where k >= N.

    Args:
        k: scores to keep; a tensor broadcasts against the scores with `dim` moved to the end, of size 1.
    """
    x = opened(scores, dim)
    if not isinstance(k, Tensor):
        _count(k, x.shape[-1])
    top = highest(x.detach())
    there = x > -torch.inf
    count = there.sum(-1, keepdim=True).clamp_min(1)
    mean = torch.where(there, x, 0).sum(-1, keepdim=True) / count
    apart = torch.where(there, x - mean, 0)
    size = apart.detach().abs().amax(-1, keepdim=True)                                     # squares of small scores would vanish
    size = torch.where(size > 0, size, 1)
    std = size * ((apart / size).square().sum(-1, keepdim=True) / count).sqrt()
    share = torch.as_tensor(k, dtype=torch.float64, device=x.device) / count
    least = mean + std * torch.special.ndtri((1 - share).clamp(1e-12, 1 - 1e-12)).to(x.dtype)
    keep = (x > least) | (x == top) | (share >= 1)
    return closed(softmax(x.masked_fill(~keep, -torch.inf)), scores, dim)


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, k: float) -> Tensor:
        # The sum of clip(x - t, 0, 1) falls by one slope between neighbouring kinks x_i and x_i - 1: find the piece, then solve on it.
        kinks = torch.cat([x, x - 1], -1).sort(-1, descending=True).values
        low = torch.zeros(*x.shape[:-1], 1, dtype=torch.int64, device=x.device)
        high = torch.full_like(low, kinks.shape[-1] - 1)
        for _ in range(kinks.shape[-1].bit_length() + 1):
            middle = (low + high + 1) // 2
            total = (x - kinks.gather(-1, middle)).clamp(0, 1).sum(-1, keepdim=True)
            low, high = torch.where(total <= k, middle, low), torch.where(total <= k, high, middle - 1)
            high = high.maximum(low)
        above = kinks.gather(-1, low)
        p = (x - above).clamp(0, 1)
        below = kinks.gather(-1, (low + 1).clamp_max(kinks.shape[-1] - 1))
        middle = (above + below) / 2
        slope = ((x > middle) & (x - middle < 1)).sum(-1, keepdim=True)
        tau = above - (k - p.sum(-1, keepdim=True)) / slope.clamp_min(1)
        p = (x - tau).clamp(0, 1)
        ctx.save_for_backward((p > 0) & (p < 1))
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), (free,) = grads, ctx.saved_tensors
        mean = torch.where(free, grad, 0).sum(-1, keepdim=True) / free.sum(-1, keepdim=True).clamp_min(1)
        return torch.where(free, grad - mean, 0), None


def soft_top_k(scores: Tensor, k: float, dim: int = -1) -> Tensor:
    """clip(z - t, 0, 1) with t such that the row sums to k: the projection of SPARSEK (Lou et al. 2024, arXiv 2406.16747).

    The sum is min(k, scores that are not -inf).
    """
    x = opened(scores, dim)
    _count(k, x.shape[-1])
    top = highest(x.detach())
    there = x > -torch.inf
    short = there.sum(-1, keepdim=True) <= k
    # A score of -inf has no kink; far below every other it cannot be reached unless there are too few others.
    floor = torch.where(there, x, torch.inf).amin(-1, keepdim=True).masked_fill(~there.any(-1, keepdim=True), 0.0).minimum(top)
    p = _SoftTopK.apply(torch.where(there, x, floor.detach() - 2 - k), k)
    return closed(torch.where(short, there.to(x.dtype), torch.where(there, p, 0)), scores, dim)  # type: ignore[arg-type]


