"""SPARSEK (Lou et al. 2024, arXiv 2406.16747): every key has a score of its own, and each query keeps, softly, the k best before it.

    p(u, k) = argmin ||p - u||^2 over 0 <= p <= 1, sum p = k;  p = clip(u - tau, 0, 1)                                        (eq. 7-8)
    out_t = sum_s softmax(q_t K^T s over {s : p_ts > 0})_s p_ts v_s

Queries have no part in the choice, and tau only rises as keys come, so that a key dropped never returns: while decoding k keys and a window
are enough. p gates the values, through which the language model's gradient reaches the scorer. Beside it the nearest `window` keys are kept
whole, and p chooses among those that have left the window. Departure: the scorer reads the key's value, which is linear in its hidden state and
held by a cache, in place of the hidden state.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width, K = keys in a query's list.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...kernels.block_attention import token_attention
from ...method import fraction, positive
from .base import PairAttention, drawn, listed, masked_softmax


def sparsek(u: Tensor, k: Tensor) -> Tensor:
    """[..., N] projection of scores u onto {0 <= p <= 1, sum p = k}; all ones where k >= the number of scores above -inf, which are left out.

    tau by sorting: with u descending, take the `a` largest whole and those up to `b` in part; tau = (sum of the part - (k - a)) / (b - a).
    Its gradient is that of the closed form: du_i - mean of du over the part, for i in the part.
    """
    there = u > -torch.inf
    count = there.sum(-1, keepdim=True)
    k = torch.minimum(k.to(u).expand_as(count), count.to(u))
    tau = _tau(u.detach(), k, count)
    part = (u.detach() - tau > 0) & (u.detach() - tau < 1) & there
    size = part.sum(-1, keepdim=True).clamp_min(1)
    mean = torch.where(part, u, 0.0).sum(-1, keepdim=True) / size
    soft = torch.where(part, u, 0.0) - (mean - mean.detach()) - tau            # tau moves as the mean of the part does
    p = torch.where(part, soft, (u.detach() - tau >= 1).to(u)) * there
    return torch.where(k >= count, there.to(u), p)


def _tau(u: Tensor, k: Tensor, count: Tensor) -> Tensor:
    """[..., 1] where sum clip(u - tau, 0, 1) = k: that sum falls piecewise linearly in tau, with kinks at u and u - 1."""
    kinks = torch.cat([u, u - 1], -1)
    kinks = torch.where(kinks > -torch.inf, kinks, torch.finfo(u.dtype).min / 4).sort(-1).values
    slack = 64 * torch.finfo(u.dtype).eps * (k + 1)

    def total(at: Tensor) -> Tensor:
        return (u - kinks.gather(-1, at)).clamp(0, 1).sum(-1, keepdim=True)

    last = _last(kinks.shape[-1], count, lambda at: total(at) >= k - slack)
    first = _last(kinks.shape[-1], count, lambda at: total(at) > k + slack) + 1
    after = (last + 1).clamp_max(kinks.shape[-1] - 1)
    left, fall = kinks.gather(-1, last), total(last) - total(after)
    between = left + torch.where(fall > 0, (total(last) - k) / fall.clamp_min(slack), 0.0) * (kinks.gather(-1, after) - left)
    # Where the sum is k over a stretch, every p is 0 or 1 there: its middle keeps rounding from adding a key at p = 1e-8.
    return torch.where(first < last, (kinks.gather(-1, first.clamp_max(kinks.shape[-1] - 1)) + left) / 2, between)


def _last(size: int, like: Tensor, holds: Callable[[Tensor], Tensor]) -> Tensor:
    """Largest index < size at which a condition holds that holds up to some index; 0 also where it holds nowhere."""
    low, high = torch.zeros_like(like), torch.full_like(like, size - 1)
    for _ in range(size.bit_length()):
        middle = (low + high + 1) // 2
        good = holds(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, (middle - 1).clamp_min(0))
    return low


class SparseK(PairAttention):
    """A window, and softly the `budget`'s share of what lies before it; train it in its model (`Trained`).

    Args:
        budget: share of the keys a query sees that window and k together make up, where k = 0.
        k: keys kept of those before the window, the same at every length; 0 follows the budget.
        window: nearest keys, kept whole.
    """

    name = "attention/sparsek"

    def __init__(self, heads: int, key_heads: int, d_head: int, budget: float = 0.25, k: int = 0, window: int = 32, seed: int = 0) -> None:
        super().__init__()
        draw = self.sized(heads, key_heads, d_head, seed)
        self._budget, self.window = fraction("budget", budget), positive("window", window)
        self.k = k if k == 0 and type(k) is int else positive("k", k)
        self.score_GD = drawn(draw, key_heads, d_head, std=1.0)
        self.slope_G = nn.Parameter(torch.zeros(key_heads))
        """Added to a score a key's position times: newer keys gain where it is above 0."""

    @property
    def budget(self) -> float:
        """Share of visible keys asked for."""
        return self._budget

    def gates(self, v_BGSD: Tensor, T: int, causal: bool) -> Tensor:
        """[B, G, T, S] p of every pair, 1 inside the window."""
        S = v_BGSD.shape[2]
        at_S, at_T = torch.arange(S, device=v_BGSD.device), torch.arange(S - T, S, device=v_BGSD.device)[:, None]
        u_BGS = (v_BGSD * self.score_GD[:, None]).sum(-1) + self.slope_G[:, None] * at_S
        near = (at_T - at_S).abs() < self.window
        seen = at_S <= at_T if causal else torch.ones_like(near)
        total = torch.round(self._budget * seen.sum(-1, keepdim=True).double()).clamp_min(1)
        keep = torch.full_like(total, self.k) if self.k else (total - (near & seen).sum(-1, keepdim=True)).clamp_min(0)
        wide = torch.promote_types(u_BGS.dtype, torch.float32)
        p = sparsek(u_BGS[:, :, None].to(wide).masked_fill(near | ~seen, -torch.inf), keep)
        return torch.where(near & seen, 1.0, p)

    def choice(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """[B, H, T, S] bool: p > 0."""
        with torch.no_grad():
            return (self.gates(v, q.shape[2], causal) > 0).repeat_interleave(self.heads // self.key_heads, 1)

    def mix(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """Listed keys only. sum e^s p v / sum e^s is attention with log p added to its logits, times the ratio of the two normalisers."""
        index = listed(mask)
        p = self.gates(v, q.shape[2], causal).repeat_interleave(self.heads // self.key_heads, 1)
        bias = p.gather(3, index.clamp_min(0)).clamp_min(torch.finfo(p.dtype).tiny).log()
        gated, part = token_attention(q, k, v, index, scale=scale, bias_BHTK=bias, return_lse=True)
        _, whole = token_attention(q, k, v, index, scale=scale, return_lse=True)
        return gated * (part - whole).exp()[..., None].to(gated.dtype)

    def naive(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """From whole matrices."""
        share = self.heads // self.key_heads
        p = self.gates(v, q.shape[2], causal).repeat_interleave(share, 1)
        return (masked_softmax(q, k, mask, scale) * p.to(v.dtype)) @ v.repeat_interleave(share, 1)

    def own_flops(self, heads: int, width: int, keys: float) -> float:
        """A score a key, made once when it comes."""
        return 2 * self.key_heads * width
