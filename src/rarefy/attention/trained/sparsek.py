"""SPARSEK (Lou et al. 2024, arXiv 2406.16747): every key has a score of its own, and each query keeps, softly, the k best before it.

    p(u, k) = argmin ||p - u||^2 over 0 <= p <= 1, sum p = k;  p = clip(u - tau, 0, 1)
    out_t = sum_s softmax(q_t K^T s over {s : p_ts > 0})_s p_ts v_s

Queries have no part in the choice, and tau only rises as keys come, so that a key dropped never returns: while decoding k keys and a window
are enough. p gates the values, through which the language model's gradient reaches the scorer. Beside it the nearest `window` keys are kept
whole, and p chooses among those that have left the window. Departure: the scorer reads the key's value, which is linear in its hidden state and
held by a cache, in place of the hidden state.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width, K = keys in a query's list, R = rows (queries worked
on at a time), N = keys looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...kernels.block_attention import key_lists, token_attention
from ...method import fraction, positive
from .base import PairAttention, drawn, masked_softmax
from .projection import soft, sparsek, threshold

ROWS, PAIRS = 256, 2**21
"""Most queries at a time, and most pairs of a query and a key (over batch and key heads) whose counts and sums are held."""
WHOLE = 4
"""In training, rows whose lists gather more than so many numbers a key of the context are worked out by matrix products over all of it instead."""


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

    def scores(self, v_BGSD: Tensor) -> Tensor:
        """[B, G, S] u, at least in float32."""
        at_S = torch.arange(v_BGSD.shape[2], device=v_BGSD.device)
        u_BGS = (v_BGSD * self.score_GD[:, None]).sum(-1) + self.slope_G[:, None] * at_S
        return u_BGS.to(torch.promote_types(u_BGS.dtype, torch.float32))

    def reach(self, at_R: Tensor, at_N: Tensor, S: int, causal: bool) -> tuple[Tensor, Tensor]:
        """[R, N] bool: keys that queries at these positions see beyond their windows; [R] how many of these they keep."""
        away = at_R[:, None] - at_N
        far = away >= self.window if causal else away.abs() >= self.window
        near = (at_R + 1).clamp_max(self.window) + (0 if causal else (S - 1 - at_R).clamp_max(self.window - 1))
        if self.k:
            return far, torch.full_like(at_R, self.k)
        seen = (at_R + 1 if causal else torch.full_like(at_R, S)).double()
        return far, ((seen * self._budget).round().clamp_min(1) - near).clamp_min(0)

    def gates(self, v_BGSD: Tensor, T: int, causal: bool) -> Tensor:
        """[B, G, T, S] p of every pair, 1 inside the window: the definition, in whole matrices."""
        S = v_BGSD.shape[2]
        at_S = torch.arange(S, device=v_BGSD.device)
        at_T, u_BGS = at_S[S - T :], self.scores(v_BGSD)
        far, keep = self.reach(at_T, at_S, S, causal)
        near = ~far & (at_S <= at_T[:, None]) if causal else ~far
        p = sparsek(u_BGS[:, :, None].masked_fill(~far, -torch.inf), keep[:, None])
        return torch.where(near, 1.0, p)

    def choice(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """[B, H, T, S] bool: p > 0."""
        with torch.no_grad():
            return (self.gates(v, q.shape[2], causal) > 0).repeat_interleave(self.heads // self.key_heads, 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """Some queries at a time. With a fixed k, keys that the last of them drops never return and are not looked at again."""
        if not q.numel():
            return torch.zeros_like(q)
        (B, H, T, D), S = q.shape, k.shape[2]
        self._shape = (H, D, S, T)
        self._seen += B * H * (T * S - T * (T - 1) / 2 if causal else T * S)
        at_T, pool, u_BGS, outs, start = torch.arange(S - T, S, device=q.device), torch.arange(S, device=q.device), self.scores(v), [], 0
        while start < T:
            before = max(1, int((pool < at_T[start]).sum())) if causal else S
            at_R = at_T[start : start + max(1, min(ROWS, PAIRS // (B * self.key_heads * before)))]
            keys_N = pool[pool <= at_R[-1]] if causal else pool
            far, keep = self.reach(at_R, keys_N, S, causal)
            tau = threshold(u_BGS[:, :, keys_N].detach(), far.expand(B, self.key_heads, -1, -1), keep)
            outs.append(self._some(q[:, :, start : start + len(at_R)], k, v, u_BGS, at_R, keys_N, far, tau, scale, causal))
            if self.k and causal:
                pool = pool[(pool > at_R[-1]) | (u_BGS[:, :, pool] > tau[:, :, -1:]).any(1).any(0)]
            start += len(at_R)
        return torch.cat(outs, 2)

    def _some(
        self, q: Tensor, k: Tensor, v: Tensor, u: Tensor, at_R: Tensor, keys_N: Tensor, far: Tensor, tau: Tensor, scale: float, causal: bool,
    ) -> Tensor:
        """[B, H, R, D] from lists: sum e^s p v / sum e^s is attention with log p added to its logits, times the ratio of the two normalisers."""
        (B, H), S = q.shape[:2], k.shape[2]
        place = key_lists(far & (u.detach()[:, :, None, keys_N] > tau[..., None]))
        there, index = place >= 0, torch.where(place >= 0, keys_N[place.clamp_min(0)], -1)
        p = soft(u[:, :, None].expand(-1, -1, len(at_R), -1).gather(3, index.clamp_min(0)), tau[..., None], there)
        near = at_R[:, None] - torch.arange(0 if causal else 1 - self.window, self.window, device=q.device)
        near = torch.where((near >= 0) & (near < S), near, -1).expand(B, self.key_heads, -1, -1)
        index = torch.cat([near, index], 3).repeat_interleave(H // self.key_heads, 1)
        p = pad(p.to(u.dtype), (near.shape[3], 0), value=1.0).repeat_interleave(H // self.key_heads, 1)
        self._kept += float((index >= 0).sum())
        if torch.is_grad_enabled() and p.requires_grad and index.shape[3] * q.shape[3] > WHOLE * S:
            at, none = torch.where(index >= 0, index, S), p.new_zeros(B, H, len(at_R), S + 1)
            return self._gated(none.bool().scatter(3, at, True)[..., :S], none.scatter(3, at, p)[..., :S], q, k, v, scale)
        bias = p.clamp_min(torch.finfo(u.dtype).tiny).log()
        gated, part = token_attention(q, k, v, index, scale=scale, bias_BHTK=bias, return_lse=True)
        _, whole = token_attention(q, k, v, index, scale=scale, return_lse=True)
        return gated * (part - whole).exp()[..., None].to(gated.dtype)

    def naive(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """From whole matrices."""
        return self._gated(mask, self.gates(v, q.shape[2], causal).repeat_interleave(self.heads // self.key_heads, 1), q, k, v, scale)

    def _gated(self, mask: Tensor, p_BHTS: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return (masked_softmax(q, k, mask, scale) * p_BHTS.to(v.dtype)) @ v.repeat_interleave(self.heads // self.key_heads, 1)

    def own_flops(self, heads: int, width: int, keys: float) -> float:
        """A score a key, made once when it comes."""
        return 2 * self.key_heads * width
