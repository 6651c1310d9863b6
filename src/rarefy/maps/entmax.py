"""alpha-entmax (Peters, Niculae & Martins 2019, arXiv 1905.05702): softmax at alpha = 1, sparsemax at alpha = 2.

p_i = exp_a(z_i - v) with exp_a(u) = [1 + (a - 1) u]_+ ^ (1 / (a - 1)) and v such that the p_i sum to one. Written so, and with
log1p, the map and its derivatives are accurate down to a = 1, where exp_a is exp and v is logsumexp; the usual form
[(a - 1) z - tau]_+ ^ (1 / (a - 1)) loses 1 / (a - 1) digits there.

v is found by Newton's steps on log sum p, kept inside a bracket: near a = 1 that function is a line. A score more than
1 / (a - 1) below the maximum can have no weight, so only those above are looked at where they are few.

Shape letters: N = scores of a row, ... = rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from .entmax_rows import available, entmax_rows
from .rows import NEAR_ONE, STEPS, closed, highest, opened

FEW = 128
"""Scores of a row below which all are looked at."""

def _tsallis(u: Tensor, e: Tensor) -> Tensor:
    """exp_a(u) with e = a - 1 >= 0."""
    inside = (e * u).clamp_min(-1)
    return torch.where(e < NEAR_ONE, u, inside.log1p() / e.clamp_min(NEAR_ONE)).exp()


def _solve(z: Tensor, e: Tensor) -> Tensor:
    """[..., 1] v of rows z [..., N] whose maximum is 0 (-inf allowed); e = alpha - 1, [..., 1]."""
    # At v = 0 the largest alone weighs 1; at the upper end all N together would weigh 1 were they all as large.
    count = torch.tensor(float(z.shape[-1]), dtype=z.dtype, device=z.device)
    low = torch.zeros_like(z[..., :1])
    small = e.clamp_min(NEAR_ONE)
    high = torch.where(e < NEAR_ONE, count.log(), -torch.expm1(-small * count.log()) / small).expand_as(low).clone()
    v = low.clone()
    tolerance = 4 * torch.finfo(z.dtype).eps
    for _ in range(STEPS):
        p = _tsallis(z - v, e)
        total = p.sum(-1, keepdim=True)
        low, high = torch.where(total >= 1, v, low), torch.where(total <= 1, v, high)
        if bool((((total - 1).abs() <= tolerance) | (high - low <= tolerance * (1 + high))).all()):
            break
        slope = torch.where(p > 0, p ** (1 - e), 0).sum(-1, keepdim=True)         # -d total / dv
        step = v + total.log() * total / slope.clamp_min(1e-30)
        inside = (step > low) & (step < high)
        moved = torch.where(total == 1, v, torch.where(inside, step, (low + high) / 2))
        if torch.equal(moved, v):
            break
        v = moved
    return v


def _candidates(x: Tensor, e: Tensor) -> Tensor | None:
    """[..., K] places of the scores near enough to their row's maximum to have weight, -1 behind them; None where K is no saving."""
    if x.shape[-1] < FEW or not e.numel() or float(e.min()) < 0.2:
        return None
    reach = float(e.min())
    near = (x > highest(x) - 1 / reach).reshape(-1, x.shape[-1])
    row_M, at_M = near.nonzero(as_tuple=True)
    count = row_M.bincount(minlength=len(near))
    most = int(count.max()) if len(count) else 0
    if not 0 < most <= x.shape[-1] // 4:
        return None
    index = torch.full((len(near), most), -1, device=x.device)
    index[row_M, torch.arange(len(row_M), device=x.device) - (count.cumsum(0) - count)[row_M]] = at_M
    return index.view(*x.shape[:-1], most)


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, e: Tensor) -> Tensor:
        top = highest(x)
        if available(x):
            p = entmax_rows(x, e)
        else:
            p = _tsallis(x - top - _solve(x - top, e), e)
            total = p.sum(-1, keepdim=True)
            p = p / torch.where(total > 0, total, 1)
        ctx.save_for_backward(p, e)
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Written in p, e and the gradient alone, by steps whose own derivatives are finite: it can be differentiated again."""
        (grad,), (p, e) = grads, ctx.saved_tensors
        there = p > 0
        safe = torch.where(there, p, 1)
        s = torch.where(there, safe ** (1 - e), 0)                                # dp_i / du_i
        size = s.sum(-1, keepdim=True)
        share = s / torch.where(size > 0, size, 1)
        mean = (grad * share).sum(-1, keepdim=True)
        by_x = s * (grad - mean) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return by_x, None
        # dp/da at fixed u, then v moves so that the sum stays one; the series is that of log1p(eu) / e at small eu.
        log, small = safe.log(), e.clamp_min(NEAR_ONE)
        u = torch.where(e < NEAR_ONE, log, torch.expm1(small * log) / small)
        eu = e * u
        near = eu.abs() < 1e-2
        far = torch.where(near, 1, 1 + eu)
        exact = (u / far - log) / small
        series = u * u * (-1 / 2 + eu * (2 / 3 + eu * (-3 / 4 + eu * (4 / 5 - eu * (5 / 6)))))
        g = p * torch.where(near, series, torch.where(near, 0, exact))
        by_e = (grad * (g - share * g.sum(-1, keepdim=True))).sum(-1, keepdim=True)
        return by_x, by_e.sum_to_size(e.shape)


def entmax(scores: Tensor, alpha: float | Tensor = 1.5, dim: int = -1) -> Tensor:
    """Weights of each row along `dim`, >= 0 with sum 1. Differentiable in the scores and, where it is a tensor, in alpha.

    Args:
        alpha: >= 1; a tensor broadcasts against the scores with `dim` of size 1, such as [H, 1, 1] for scores [B, H, T, S].

    Raises:
        BadInput: alpha below 1 or not finite; NaN or +inf among the scores.
    """
    x = opened(scores, dim)
    if isinstance(alpha, Tensor):
        e = alpha.to(x.dtype) - 1
        while e.ndim < x.ndim:
            e = e[None]
        e = e.movedim(dim, -1) if dim not in (-1, scores.ndim - 1) else e
        if e.shape[-1] != 1:
            raise BadInput(f"alpha has shape {list(alpha.shape)}, but one row has one alpha: give it size 1 along dim={dim}")
    else:
        e = torch.full((1,) * x.ndim, float(alpha) - 1, dtype=x.dtype, device=x.device)
    if not bool((e >= 0).all()) or not bool(e.isfinite().all()):
        given = alpha.detach().flatten()[:4].tolist() if isinstance(alpha, Tensor) else alpha
        raise BadInput(f"alpha={given} must be >= 1 and finite (1 is softmax, 2 sparsemax)")
    index = None if available(x) else _candidates(x.detach(), e.detach())
    if index is None:
        return closed(_Entmax.apply(x, e), scores, dim)  # type: ignore[arg-type]
    held = index.clamp_min(0)
    few: Any = _Entmax.apply(x.gather(-1, held).masked_fill(index < 0, -torch.inf), e)
    return closed(torch.zeros_like(x).scatter_add(-1, held, few), scores, dim)


def sparsemax(scores: Tensor, dim: int = -1) -> Tensor:
    """Euclidean projection of each row onto the simplex (Martins & Astudillo 2016, arXiv 1602.02068)."""
    return entmax(scores, 2.0, dim)


def entmax15(scores: Tensor, dim: int = -1) -> Tensor:
    """entmax at alpha = 1.5."""
    return entmax(scores, 1.5, dim)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor, target: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(p, target)
        e = alpha - 1
        log = torch.where(p > 0, p, 1).log()
        entropy = -(p * (log if e < NEAR_ONE else torch.expm1(e * log) / (alpha * e))).sum(-1)    # p - p^a would lose 1 / e digits
        at = x.gather(-1, target[..., None])[..., 0]
        return torch.where(p > 0, p * x, 0).sum(-1) + entropy - at

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,), (p, target) = grads, ctx.saved_tensors                           # p has a graph of its own, for second derivatives
        return grad[..., None] * (p - torch.zeros_like(p).scatter_(-1, target[..., None], 1.0)), None, None, None


def entmax_loss(scores: Tensor, target: Tensor, alpha: float = 1.5) -> Tensor:
    """Fenchel-Young loss of alpha-entmax, [...] for scores [..., N] and target classes [...]; its gradient is p - y.

    (p - y) . z + H_a(p), H_a the Tsallis entropy sum (p - p^a) / (a (a - 1)) (Peters et al. 2019); cross entropy at alpha = 1.
    """
    x = opened(scores, -1)
    if target.shape != scores.shape[:-1] or target.dtype != torch.int64:
        raise BadInput(f"target {list(target.shape)} {target.dtype} must be int64 classes of shape {list(scores.shape[:-1])}")
    if target.numel() and not 0 <= int(target.min()) <= int(target.max()) < scores.shape[-1]:
        raise BadInput(f"target holds classes {int(target.min())}..{int(target.max())} but there are {scores.shape[-1]}")
    return _Loss.apply(x, entmax(x, alpha), target, alpha)  # type: ignore[return-value]


def sparsemax_loss(scores: Tensor, target: Tensor) -> Tensor:
    """Fenchel-Young loss of sparsemax (Martins & Astudillo 2016)."""
    return entmax_loss(scores, target, 2.0)
