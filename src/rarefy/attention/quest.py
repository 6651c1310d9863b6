"""QUEST (Tang et al. 2024, arXiv 2406.10774): pages whose bounds promise the largest logit.

A page is described by the channel-wise minimum m and maximum M of its keys; for a query q no key of the page can score
above sum_d max(q_d m_d, q_d M_d). The pages with the highest bounds are attended to exactly.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width, Q = query blocks, N = pages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import native
from ..kernels.block_attention import available, blocks_of, page_meta, page_scores
from ..kernels.cache_steps import pages_step
from .block import BlockAttention
from .dynamic.scores import bounds, largest
from .heads import per_head

STRIP = 1024
"""Queries whose bounds are worked out at once in prefill."""


class Quest(BlockAttention):
    """Top pages by their upper bound; the query's own page always counts among them.

    The paper leaves prefill and the first two layers dense; here a plan says which layers, and prefill selects too. Its kernel counts the
    newest page within the budget, as here; its evaluation lets that page compete, and keeps three pages at least.
    With query_block > 1 a block's bound is the largest of its queries'.
    """

    name = "attention/quest"
    wants = ("cache",)

    def describe(self, k_BGSD: Tensor) -> Tensor:
        """[B, G, N, 2 D] maximum, then minimum, of each page's keys: what `page_scores` reads as it lies."""
        return page_meta(k_BGSD, self.block)

    def scores(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> Tensor:
        """sum_d max(q_d m_d, q_d M_d)."""
        meta_BGNE = self.summary(k_BGSD)
        if q_BHTD.shape[2] == 1 and available(q_BHTD, meta_BGNE):
            return page_scores(q_BHTD, k_BGSD, self.block, meta_BGNE)
        if q_BHTD.shape[2] > 1:
            return self._strips(q_BHTD, meta_BGNE, k_BGSD.shape[2], rows, causal)
        high, low = meta_BGNE.chunk(2, -1)
        return bounds(q_BHTD, low, high)

    def _strips(self, q_BHTD: Tensor, meta_BGNE: Tensor, S: int, rows: int, causal: bool) -> Tensor:
        """The same, some query blocks at a time: bounds of all queries need not lie in memory at once, nor those of later pages be made."""
        B, H, T, _ = q_BHTD.shape
        Q, N = blocks_of(T, S, self.block, rows)
        meta_BHEN = per_head(meta_BGNE, H).mT
        out_BHQN, strip = q_BHTD.new_full((B, H, Q, N), -torch.inf), max(1, STRIP // rows)
        for first in range(0, Q, strip):
            start, stop = (min(T, max(0, at * rows - (S - T) % rows)) for at in (first, first + strip))
            end = S - T + stop
            seen = -(-end // self.block) if causal else N
            q = q_BHTD[:, :, start:stop]
            bound_BHTN = torch.cat([q.clamp_min(0), q.clamp_max(0)], -1) @ meta_BHEN[..., :seen]
            out_BHQN[:, :, first : first + strip, :seen] = largest(bound_BHTN, end, rows)
        return out_BHQN

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        got = self._step(q, k, v, scale) if q.shape[2] == 1 < k.shape[2] and causal and scale > 0 else None
        return super()._attend(q, k, v, scale, causal) if got is None else got

    def _step(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor | None:
        """A step beside rarefy's cache in one compiled call; None where that does not serve, or a subclass chooses in its own way."""
        stores, mine = getattr(self._cache, "stores", None), (type(self).choose, type(self).rule) == (BlockAttention.choose, BlockAttention.rule)
        wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        if stores is None or not mine or wanted or not native.serves(q, k, v, dtypes=(torch.float32,)):
            return None
        k_room, v_room, meta = stores(f"{self.name}/{self.block}", self.describe, self.block)
        (B, H, _, D), S = q.shape, k.shape[2]
        if k_room.data_ptr() != k.data_ptr() or v_room.data_ptr() != v.data_ptr():
            return None
        N = -(-S // self.block)
        keep = max(1, round(self._budget * N))
        # The newest key is in its place and in its bound already: written there again it changes nothing.
        out, _ = pages_step(q, k[:, :, -1:], v[:, :, -1:], k_room, v_room, meta, held=S - 1, page=self.block, keep=keep, scale=scale)
        self._shape, rows = (H, D, S, 1), float(B * H)
        self._kept, self._seen = self._kept + rows * (keep * self.block - N * self.block + S), self._seen + rows * S
        return out

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """Two products with the bounds of keys / block pages."""
        return 4 * heads * width * keys / self.block
