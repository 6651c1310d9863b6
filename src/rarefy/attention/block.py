"""What every attention method shares: choose key blocks, attend to those, count what was kept.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width, Q = query blocks,
N = key blocks.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ..cost import Cost
from ..errors import BadInput
from ..kernels.block_attention import Allowed, BlockMask, block_attention, block_attention_reference, blocks_of, highest, top_pages
from ..kernels.block_attention.pairs import visible_pairs
from ..method import fraction, positive
from ..selection import Selection, check_finite
from .counted import Counted
from .heads import real_places

AT_ONCE = 256
"""Queries that choose at a time where each chooses for itself: their scores are held, not those of all pairs."""


class BlockAttention(Counted):
    """softmax attention over chosen key blocks.

    A query at position p sees p + 1 keys in n = p // block + 1 blocks; of these max(1, round(budget * n)) are kept,
    its own always among them. With `query_block` > 1, queries of one block share a choice in prefill (faster; a query
    then is served by a choice that its block mates took part in). With query_block=1 prefill equals decoding exactly.

    Args:
        budget: fraction of the key blocks that a query can see.
        block: keys in a block (a page).
        query_block: queries that share a choice in prefill; decoding always chooses for its own query.
    """

    unit = "key block"
    wants: ClassVar[tuple[str, ...]] = ()
    """Extras that `attend` takes by keyword; "cache" where `describe` is worth keeping between steps."""
    prefill_only: ClassVar[bool] = False
    """True where the paper leaves decoding steps dense."""

    by_query: ClassVar[bool] = False
    """True where a query's choice follows from itself and the keys up to its own, so that a prefill may choose some queries at a time."""

    def __init__(self, budget: float = 0.25, block: int = 16, query_block: int = 1) -> None:
        super().__init__()
        self._budget = fraction("budget", budget)
        self.block, self.query_block = positive("block", block), positive("query_block", query_block)
        self._cache: Any = None
        self._described: Tensor | None = None
        self._row, self._layer = -1, 0

    @property
    def budget(self) -> float:
        """Fraction of visible key blocks kept."""
        return self._budget

    def scores(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> Tensor:
        """[B, H, Q, N] importance of each key block for each block of `rows` queries."""
        raise NotImplementedError

    def describe(self, k_BGSD: Tensor) -> Tensor:
        """[B, G, N, ...] what `scores` reads of keys instead of the keys; that of a full block may not depend on other blocks."""
        raise NotImplementedError

    def summary(self, k_BGSD: Tensor) -> Tensor:
        """`describe` of all keys; where the layer's cache keeps summaries (`cache.summary(name, make, every)`), of new blocks alone."""
        if self._described is not None:
            return self._described[:, :, : -(-k_BGSD.shape[2] // self.block)]
        keep = getattr(self._cache, "summary", None)
        return self.describe(k_BGSD) if keep is None else keep(f"{self.name}/{self.block}", self.describe, self.block)

    def rule(self, score_BHQN: Tensor, visible_Q: Tensor) -> Tensor:
        """[B, H, Q, N] bool from scores, +inf for blocks always kept, -inf for those not seen; here `budget`'s share of each row.

        Args:
            visible_Q: how many blocks each row sees.
        """
        # Python's round, for exactly the count that `budget` promises
        if len(visible_Q) == 1:
            best = top_pages(score_BHQN, max(1, round(self._budget * int(visible_Q))))
            return best & (score_BHQN > -torch.inf) | (score_BHQN == torch.inf)
        keep_Q = torch.tensor([max(1, round(self._budget * v)) for v in visible_Q.tolist()], device=score_BHQN.device)
        return highest(score_BHQN, keep_Q[:, None]) & (score_BHQN > -torch.inf) | (score_BHQN == torch.inf)

    def allowed(self) -> Allowed | None:
        """A pattern finer than a block, if the method has one."""
        return None

    def _rows(self, T: int) -> int:
        return 1 if T == 1 else self.query_block

    def choose(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
        """[B, H, Q, N] bool block mask of queries whose logits are q k / sqrt(D)."""
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        rows = self._rows(T)
        return self.rule(*self.bounded(self.scores(q_BHTD.detach(), k_BGSD.detach(), rows, causal), T, S, rows, causal))

    def bounded(self, score_BHQN: Tensor, T: int, S: int, rows: int, causal: bool) -> tuple[Tensor, Tensor]:
        """Scores with -inf for later blocks and +inf for the queries' own, and how many blocks each row sees; [B, H, Q, N] and [Q]."""
        Q, N = blocks_of(T, S, self.block, rows)
        if T == rows == 1 and causal:                          # the newest query sees everything, and stands in the last block
            score = score_BHQN.clone()
            score[..., -1] = torch.inf
            return score, torch.tensor([N], device=score.device)
        n, row_Q = torch.arange(N, device=score_BHQN.device), (S - T) // rows + torch.arange(Q, device=score_BHQN.device)
        if not causal:
            return score_BHQN, torch.full_like(row_Q, N)
        own_Q = (((row_Q + 1) * rows).clamp_max(S) - 1) // self.block
        first_Q = row_Q * rows // self.block
        score = score_BHQN.masked_fill(n > own_Q[:, None], -torch.inf)
        if rows == 1:                                          # one block a row, without another pass over all of them
            score[:, :, torch.arange(Q, device=n.device), own_Q] = torch.inf
            return score, own_Q + 1
        return score.masked_fill((n <= own_Q[:, None]) & (n >= first_Q[:, None]), torch.inf), own_Q + 1

    def _chosen(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor | None, causal: bool) -> Tensor:
        """`choose`, or everything in a decoding step of a method for prefill; values are there for those who compare outputs."""
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        if not (self.prefill_only and T == 1 and S > 1):
            return self.choose(q_BHTD, k_BGSD, causal)
        return torch.ones(*q_BHTD.shape[:2], *blocks_of(T, S, self.block, 1), dtype=torch.bool, device=q_BHTD.device)

    def _refuse(self, x: Tensor, what: str, where: str = "") -> None:
        """check_finite, screened by a sum: a tenth of the time on a long cache, and no NaN or inf leaves a sum finite."""
        if not x.detach().sum(dtype=torch.float32 if x.element_size() < 4 else x.dtype).isfinite():
            check_finite(x, f"{what} of {self.name}{where}")

    def _refuse_all(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, layer: int, cache: Any) -> None:
        """`_refuse` of queries, keys and values; of keys in a cache with summaries the new ones alone, by sums of blocks kept there.

        A step reads a part of the keys and values, so a look at all of them would cost more than attending. Values that came before
        are left to `_refuse_values`.
        """
        keep, T, where = getattr(cache, "summary", None), q_BHTD.shape[2], f" in layer {layer}"
        self._refuse(q_BHTD, "queries", where)
        if keep is None or T == k_BGSD.shape[2]:
            self._refuse(k_BGSD, "keys", where)
            self._refuse(v_BGSD, "values", where)
            return
        if not keep(f"sums/{self.block}", self._block_sums, self.block).sum().isfinite():
            self._refuse(k_BGSD, "keys", where)
        self._refuse(v_BGSD[:, :, -T:], "values", where)

    def _block_sums(self, k_BGSD: Tensor) -> Tensor:
        """[B, G, N] sum of the keys of each block."""
        wide = torch.float32 if k_BGSD.element_size() < 4 else k_BGSD.dtype
        total_BGS = k_BGSD.detach().sum(-1, dtype=wide)
        return pad(total_BGS, (0, -total_BGS.shape[2] % self.block)).unflatten(2, (-1, self.block)).sum(-1)

    def _refuse_values(self, out_BHTD: Tensor, v_BGSD: Tensor, layer: int) -> None:
        """A bad value that was attended to shows in what comes out."""
        if not out_BHTD.detach().sum(dtype=torch.float32 if out_BHTD.element_size() < 4 else out_BHTD.dtype).isfinite():
            check_finite(v_BGSD, f"values of {self.name} in layer {layer}")

    def select(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor | None = None) -> Selection:
        """Chosen key blocks of causal attention, mask form [B, H, Q, N]."""
        self._refuse(q_BHTD, "queries")
        self._refuse(k_BGSD, "keys")
        mask = self._chosen(q_BHTD, k_BGSD, v_BGSD, True)
        return Selection(mask.shape[-1], mask.to(q_BHTD.dtype), mask_=mask)

    def attend(
        self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, scale: float, causal: bool = True,
        padding_BS: Tensor | None = None, layer: int = 0, cache: Any = None,
    ) -> Tensor:
        """[B, H, T, D]; query t stands at position S - T + t.

        Args:
            padding_BS: True at real keys. Blocks are cut over real keys only, so the side of the padding is without
                effect; padded queries give zeros.
            layer: number of the layer, for messages and for methods that carry a choice from layer to layer.
            cache: the layer's cache, where summaries of keys are kept; unused beside padding, whose keys lie elsewhere.
        """
        self._refuse_all(q_BHTD, k_BGSD, v_BGSD, layer, None if padding_BS is not None else cache)
        if q_BHTD.shape[1] % k_BGSD.shape[1]:
            raise BadInput(f"{q_BHTD.shape[1]} query heads are no multiple of {k_BGSD.shape[1]} key heads")
        self._layer, self._row = layer, -1
        if padding_BS is None:
            self._cache = cache
            try:
                out = self._attend(q_BHTD, k_BGSD, v_BGSD, scale, causal)
                if cache is not None:
                    self._refuse_values(out, v_BGSD, layer)
                return out
            finally:
                self._cache = None
        out = torch.zeros_like(q_BHTD)
        for b, keys, queries in real_places(padding_BS, q_BHTD.shape[2], causal):
            self._row = b
            got = self._attend(q_BHTD[b : b + 1, :, queries], k_BGSD[b : b + 1, :, keys], v_BGSD[b : b + 1, :, keys], scale, causal)
            out[b, :, queries] = got[0]
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        if not q.numel():
            return torch.zeros_like(q)
        if self.prefill_only and q.shape[2] == 1 < k.shape[2]:
            return self._dense_step(q, k, v, scale)
        if self.by_query and causal and self._rows(q.shape[2]) == 1 and AT_ONCE < q.shape[2]:
            return self._attend_in_turn(q, k, v, scale)
        self._shape = (q.shape[1], q.shape[-1], k.shape[2], q.shape[2])
        rows, unit = self._rows(q.shape[2]), scale * q.shape[-1] ** 0.5
        mask = self._chosen(q if abs(unit - 1) < 1e-12 else q * unit, k, v, causal)
        self._count(mask, q.shape[2], k.shape[2], causal)
        return block_attention(q, k, v, mask, block=self.block, query_block=rows, scale=scale, causal=causal, allowed=self.allowed())

    def _dense_step(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """A step of a method for prefill, over everything; ours in half precision, which torch widens number by number on the CPU."""
        pairs = float(q.shape[0] * q.shape[1] * k.shape[2])
        self._kept, self._seen, self._shape = self._kept + pairs, self._seen + pairs, (q.shape[1], q.shape[3], k.shape[2], 1)
        if q.element_size() >= 4:
            return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
        every = torch.ones(1, 1, *blocks_of(1, k.shape[2], 64, 1), dtype=torch.bool, device=q.device)
        return block_attention(q, k, v, every, block=64, query_block=1, scale=scale)

    def _attend_in_turn(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """`_attend` of AT_ONCE queries at a time to the keys up to the last of them; keys are described once."""
        T, S, parts, cache = q.shape[2], k.shape[2], [], self._cache
        try:
            self._described = self.summary(k.detach()) if type(self).describe is not BlockAttention.describe else None
            self._cache = None                       # it keeps descriptions of all keys
            for start in range(0, T, AT_ONCE):
                stop = min(T, start + AT_ONCE)
                parts.append(self._attend(q[:, :, start:stop], k[:, :, : S - T + stop], v[:, :, : S - T + stop], scale, True))
        finally:
            self._described, self._cache = None, cache
        self._shape = (q.shape[1], q.shape[-1], S, T)
        return torch.cat(parts, 2)

    @torch.no_grad()
    def _count(self, mask_BHQN: Tensor, T: int, S: int, causal: bool) -> None:
        """Add to the kept and the visible (query, key) pairs."""
        if T == 1:                                             # every block is whole but the last
            short, heads = mask_BHQN.shape[-1] * self.block - S, mask_BHQN.shape[0] * mask_BHQN.shape[1]
            self._kept += float(mask_BHQN.sum()) * self.block - float(mask_BHQN[..., -1].sum()) * short
            self._seen += float(S * heads)
            return
        if self.block == self._rows(T) == 1 and mask_BHQN.device.type == "cpu":             # bytes are counted far sooner than multiplied
            there = mask_BHQN & torch.ones(T, S, dtype=torch.bool).tril_(S - T) if causal else mask_BHQN
            self._kept += float(np.count_nonzero(there.numpy()))
            self._seen += float(visible_pairs(T, S, causal) * mask_BHQN.shape[0] * mask_BHQN.shape[1])
            return
        pairs_QN = BlockMask(mask_BHQN, None, None, self.block, self._rows(T)).visible(T, S, causal)
        # Of a row, small enough to be exact in float32, which takes a fifth of the time that float64 does.
        self._kept += float((mask_BHQN.float() * pairs_QN.float()).sum(-1).sum(dtype=torch.float64))
        self._seen += float(pairs_QN.sum()) * mask_BHQN.shape[0] * mask_BHQN.shape[1]

    def forward(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
        """Causal attention with scale 1 / sqrt(D)."""
        return self.attend(q_BHTD, k_BGSD, v_BGSD, scale=q_BHTD.shape[-1] ** -0.5)

    def reference(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
        """Dense scores, unchosen pairs at minus infinity."""
        if not q_BHTD.numel():
            return torch.zeros_like(q_BHTD)
        mask = self._chosen(q_BHTD, k_BGSD, v_BGSD, True)
        return block_attention_reference(
            q_BHTD, k_BGSD, v_BGSD, mask, block=self.block, query_block=self._rows(q_BHTD.shape[2]),
            scale=q_BHTD.shape[-1] ** -0.5, allowed=self.allowed(),
        )

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """Work of choosing, a query."""
        return 0.0

    def cost(self, density: float | None = None) -> Cost:
        """Per query at the context of the last call, all heads, choosing included; bytes are keys and values in float32."""
        H, D, S = self.dims()
        density = self._budget if density is None else density
        dense_step = self.prefill_only and self._shape is not None and self._shape[3] == 1 < self._shape[2]     # nothing is chosen there
        choosing = 0.0 if dense_step else self.selection_flops(H, D, S)
        return Cost(4 * H * D * S * density + choosing, 8 * H * D * S * density)



class TokenAttention(BlockAttention):
    """softmax attention over single keys chosen query by query: blocks of one.

    Args:
        budget: fraction of the keys that a query can see.
    """

    unit = "key"

    def __init__(self, budget: float = 0.25) -> None:
        super().__init__(budget, 1, 1)
