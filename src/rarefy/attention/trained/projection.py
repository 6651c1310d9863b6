"""The projection that SPARSEK gates keys by (Lou et al. 2024, arXiv 2406.16747): scores onto {0 <= p <= 1, sum p = k}.

Shape letters: X = any leading dimensions, R = rows over the same scores, N = scores.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad


def sparsek(u: Tensor, k: Tensor) -> Tensor:
    """[..., N] projection of scores u onto {0 <= p <= 1, sum p = k}; all ones where k >= the number of scores above -inf, which are left out.

    Its gradient is that of the closed form: du_i - mean of du over the part, for i in the part.
    """
    there = u > -torch.inf
    return soft(u, threshold(torch.where(there, u.detach(), 0.0), there[..., None, :], k), there).to(u.dtype)


def soft(u: Tensor, tau: Tensor, there: Tensor) -> Tensor:
    """[..., N] clip(u - tau, 0, 1), 0 where not there, in float64; tau moves as the mean of the part between 0 and 1 does."""
    u = u.double()
    over = u.detach() - tau
    part = (over > 0) & (over < 1) & there
    mean = torch.where(part, u, 0.0).sum(-1, keepdim=True) / part.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(part, u - (mean - mean.detach()) - tau, (over >= 1).to(u)) * there


@torch.no_grad()
def threshold(u_XN: Tensor, there_XRN: Tensor, k_XR: Tensor) -> Tensor:
    """[X, R] tau where clip(u - tau, 0, 1) sums to k over each row's own part of the same scores; below all where k is no less than their count.

    That sum falls piecewise linearly in tau, with kinks at u and u - 1. Scores are sorted once for all rows; running counts and sums over a row's
    own give the sum at any kink without a pass over them, and the kink next to tau is found by halving.
    """
    down_XN, order_XN = u_XN.double().sort(-1, descending=True)
    own = there_XRN.gather(-1, order_XN[..., None, :].expand_as(there_XRN))
    count = pad(own.cumsum(-1), (1, 0))
    total = pad(torch.where(own, (down_XN - down_XN[..., :1])[..., None, :], 0.0).cumsum(-1), (1, 0))      # of what a score lacks of the highest
    kinks = torch.cat([down_XN, down_XN - 1], -1).sort(-1).values
    whole, some = (torch.searchsorted(-down_XN, x, right=right) for x, right in ((-(kinks + 1), True), (-kinks, False)))
    k = torch.minimum(k_XR.double().expand(count.shape[:-1]), count[..., -1])
    slack = 64 * torch.finfo(u_XN.dtype).eps * (k + 1)

    def sums(at_XR: Tensor) -> Tensor:
        a, b, tau = (x.gather(-1, at_XR) for x in (whole, some, kinks))
        (n_a, t_a), (n_b, t_b) = ((count.gather(-1, i[..., None])[..., 0], total.gather(-1, i[..., None])[..., 0]) for i in (a, b))
        return n_a + t_b - t_a - (tau - down_XN[..., :1]) * (n_b - n_a)

    end = kinks.shape[-1] - 1
    last = _last(end, k, lambda at: sums(at) >= k - slack)
    first = (_last(end, k, lambda at: sums(at) > k + slack) + 1).clamp_max(end)
    left, right = kinks.gather(-1, last), kinks.gather(-1, (last + 1).clamp_max(end))
    fall = sums(last) - sums((last + 1).clamp_max(end))
    between = left + torch.where(fall > 0, (sums(last) - k) / fall.clamp_min(slack), 0.0) * (right - left)
    # Where the sum is k over a stretch, every p is 0 or 1 there: its middle keeps rounding from adding a key at p = 1e-8.
    tau = torch.where(first < last, (kinks.gather(-1, first) + left) / 2, between)
    return torch.where(k < count[..., -1], tau, kinks[..., :1] - 1)


def _last(end: int, like: Tensor, holds: Callable[[Tensor], Tensor]) -> Tensor:
    """Largest index up to `end` at which a condition holds that holds up to some index; 0 also where it holds nowhere."""
    low, high = (torch.full_like(like, x, dtype=torch.long) for x in (0, end))
    for _ in range((end + 1).bit_length()):
        middle = (low + high + 1) // 2
        good = holds(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, (middle - 1).clamp_min(0))
    return low
