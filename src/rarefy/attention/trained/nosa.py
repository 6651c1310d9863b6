"""NOSA (Huang et al. 2025, arXiv 2510.13602): part of the blocks is chosen by the query, part by the keys alone, which stay from step to step.

    s_j = A softplus(w . v_j + b)                              importance of key j to whatever query; a block's: the largest mean of its windows
    by the query: the first block, the `local` newest, and the best by softmax(q . mean keys of windows), summed over the heads of a key head, of
                  which a block has its largest (InfLLM-V2); then, by importance alone, the best of the others up to the budget
    out = softmax(q k^T s + s_j) v over chosen blocks           so that the language model's own loss trains A, w and b

The k blocks of the highest importance are always among the chosen, taken by the query or after it; they change only where a new block joins
them. What of a block a fast memory holds is thus needed again at the next step for a share `steady` of the budget at least (`moved` counts the
rest). w is drawn small, so that keys begin about equally important: drawn wide, a lookup takes several times the steps.
Departures: windows do not overlap; importance is read from the value, which a cache holds.

Shape letters as in base.py; N = blocks, I = windows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from ...errors import BadInput
from ...kernels.block_attention import BlockMask, block_attention
from ...method import fraction, positive
from ..block import highest
from .base import PairAttention, drawn


class NOSA(PairAttention):
    """Blocks by query and blocks by importance; train it in its model (`Trained`).

    Args:
        budget: share of the blocks a query sees. steady: share of these that importance alone chooses, in [0, 1).
        block: keys in a block. pool: keys in a window, a divisor of it. local: newest blocks always kept, the query's own among them.
    """

    name = "attention/nosa"
    unit = "key block"

    def __init__(
        self, heads: int, key_heads: int, d_head: int, budget: float = 0.25, steady: float = 0.5, block: int = 64, pool: int = 16, local: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        draw = self.sized(heads, key_heads, d_head, seed)
        self._budget, self.local = fraction("budget", budget), positive("local", local)
        self.block, self.pool = positive("block", block), positive("pool", pool)
        if block % pool:
            raise BadInput(f"pool={pool} must divide block={block}")
        if isinstance(steady, bool) or not isinstance(steady, int | float) or not 0 <= steady < 1:
            raise BadInput(f"steady={steady!r} must be in [0, 1): the share of the budget chosen by importance alone")
        self.steady = steady
        self.importance_GD, self.bias_G = drawn(draw, key_heads, d_head, std=0.02), nn.Parameter(torch.zeros(key_heads))
        self.size_G = nn.Parameter(torch.ones(key_heads))
        """A."""

    @property
    def budget(self) -> float:
        """Share of visible blocks kept."""
        return self._budget

    def importance(self, v: Tensor) -> Tensor:
        """[B, G, S] added to the logits of a key."""
        return self.size_G[:, None] * softplus((v * self.importance_GD[:, None]).sum(-1) + self.bias_G[:, None])

    def by_query(self, q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
        """[B, G, T, N] largest share of a block's windows, of windows that ended before the query."""
        T, S, I = q.shape[2], k.shape[2], k.shape[2] // self.pool
        mean = k[:, :, : I * self.pool].unflatten(2, (I, self.pool)).mean(3).repeat_interleave(self.heads // self.key_heads, 1)
        end_I, at_T = (torch.arange(I, device=q.device) + 1) * self.pool - 1, torch.arange(S - T, S, device=q.device)[:, None]
        seen = end_I <= (at_T if causal else torch.full_like(at_T, S))
        logit = q @ mean.mT * scale
        logit = logit.masked_fill(~seen, torch.finfo(logit.dtype).min)
        share = (logit.softmax(-1) * seen).unflatten(1, (self.key_heads, -1)).sum(2) if I else logit[:, :: self.heads // self.key_heads]
        return self._largest(share, S)

    def _largest(self, x_ABTI: Tensor, S: int) -> Tensor:
        """[..., N] of a block's windows; 0 where it has none that is whole."""
        N = -(-S // self.block)
        return pad(x_ABTI, (0, N * (self.block // self.pool) - x_ABTI.shape[-1])).unflatten(-1, (N, -1)).amax(-1)

    @torch.no_grad()
    def choice(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """[B, H, T, N] bool, the same for the heads of a key head."""
        T, S, I = q.shape[2], k.shape[2], k.shape[2] // self.pool
        score = self.by_query(q, k, scale, causal)
        steady = self._largest(self.importance(v)[..., : I * self.pool].unflatten(2, (I, self.pool)).mean(3), S)[:, :, None]
        n = torch.arange(score.shape[3], device=q.device)
        own = torch.div(torch.arange(S - T, S, device=q.device), self.block, rounding_mode="floor")[:, None]
        own = own if causal else torch.full_like(own, len(n) - 1)
        forced, later = (n == 0) | (n > own - self.local), n > own
        keep = torch.tensor([max(1, round(self._budget * m)) for m in (own[:, 0] + 1).tolist()], device=q.device)[:, None]
        fixed = (keep * self.steady).floor().long()
        score = score.masked_fill(forced, torch.inf).masked_fill(later, -torch.inf)
        taken = highest(score, keep - fixed) & (score > -torch.inf) | (score == torch.inf)
        steady = steady.expand_as(score).masked_fill(later | taken, -torch.inf)
        more = highest(steady, fixed.clamp_min(1)) & (steady > -torch.inf) & (fixed > 0)
        return (taken | more).repeat_interleave(self.heads // self.key_heads, 1)

    def mix(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """Chosen blocks only. A coordinate more, 1 / scale in queries and s in keys, adds s to a logit."""
        q, v = pad(q, (0, 1), value=1 / scale), pad(v, (0, 1))
        k = torch.cat([k, self.importance(v[..., :-1])[..., None].to(k.dtype)], -1)
        return block_attention(q, k, v, mask, block=self.block, query_block=1, scale=scale, causal=causal)[..., :-1]

    def naive(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """From whole score matrices."""
        T, S, share = q.shape[2], k.shape[2], self.heads // self.key_heads
        keep = BlockMask(mask, None, None, self.block, 1).pairs(T, S, causal)
        score = q @ k.repeat_interleave(share, 1).mT * scale + self.importance(v).repeat_interleave(share, 1)[:, :, None]
        return score.masked_fill(~keep, -torch.inf).softmax(-1) @ v.repeat_interleave(share, 1)

    @torch.no_grad()
    def moved(self, mask: Tensor) -> Tensor:
        """[B, H, T - 1] blocks that each query after the first needs and the one before it did not: transfers into a memory of that size."""
        return (mask[:, :, 1:] & ~mask[:, :, :-1]).sum(-1)

    @torch.no_grad()
    def count(self, mask: Tensor, T: int, S: int, causal: bool) -> None:
        """Pairs of chosen blocks."""
        visible = BlockMask(mask, None, None, self.block, 1).visible(T, S, causal)
        self._kept += float((mask * visible).sum())
        self._seen += float(visible.sum()) * mask.shape[0] * mask.shape[1]

    def own_flops(self, heads: int, width: int, keys: float) -> float:
        """Products with the windows' means, and the importance of the query's own key."""
        return 2 * heads * width * keys / self.pool + 2 * self.key_heads * width
