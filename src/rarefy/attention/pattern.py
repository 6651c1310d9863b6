"""Attention over a static pattern, written as an expression: `PatternAttention(pattern="window(256) | sinks(4)")`.

The pattern says pair by pair what is attended to; words, grammar and the papers' own patterns are in patterns/.
Shape letters as in block.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.block_attention import BlockMask, block_attention, blocks_of, merge, token_attention
from .bound import Bound
from .patterns.compile import newest
from .patterns.count import kept_pairs, visible_pairs
from .patterns.lists import apart


class PatternAttention(Bound):
    """softmax attention over the pairs of a pattern; a query without any gives zeros.

    The choice is exact to the pair whatever the blocks are; `block` and `query_block` say what the kernel works on at a
    time. In causal attention it is the pattern's pairs that are not ahead. One method may serve all layers: words such
    as `layers` and `on_layers` tell them apart. Prefill is decoding for every pattern whose pairs do not depend on the
    length; those that do (neighbours, parts, random without past=True, positions from the end) see each step's own.
    With padding, positions count real tokens only.

    Args:
        pattern: an expression, see `rarefy.attention.patterns`.
        block: keys in a block.
        query_block: queries worked on at a time in prefill.

    Raises:
        BadInput: an expression that cannot be read, naming its part.
    """

    name = "attention/pattern"
    unit = "key"
    wants = ("cache",)

    def __init__(self, pattern: str = "window(256) | sinks(4)", block: int = 64, query_block: int = 64) -> None:
        super().__init__(pattern, block, query_block)
        self._used: tuple[BlockMask, BlockMask, float] | None = None
        self._density, self._seen_finite = 1.0, False

    @property
    def budget(self) -> float:
        """1: all that the pattern allows is kept. What that is of all pairs, `measured_density` counts."""
        return 1.0

    def attend(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, padding_BS: Tensor | None = None, **how: Any) -> Tensor:
        """As BlockAttention.attend."""
        self._padding_BS = padding_BS
        try:
            return super().attend(q_BHTD, k_BGSD, v_BGSD, padding_BS=padding_BS, **how)
        finally:
            self._padding_BS, self._row = None, -1

    def _refuse_all(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, layer: int, cache: Any) -> None:
        """As BlockAttention's; without a cache that keeps sums, a step looks at the newest key and value here and at others where it reads them."""
        self._seen_finite = q_BHTD.shape[2] > 1 or hasattr(cache, "summary")
        new = slice(None if self._seen_finite else -1, None)
        super()._refuse_all(q_BHTD, k_BGSD[:, :, new], v_BGSD[:, :, new], layer, cache if self._seen_finite else None)

    def block_mask(self, T: int, S: int, heads: int, causal: bool) -> BlockMask:
        """The pattern in this layer, for T queries at the end of S keys."""
        sizes = {"block": self.block, "query_block": self._rows(T), "causal": causal}
        return self._laid((T, S, heads, causal), lambda **where: self.pattern.block_mask(T, S, **sizes, heads=heads, **where))

    def choose(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
        """[B, H, Q, N] bool: blocks with a pair of the pattern, whatever queries and keys say."""
        blocks = self.block_mask(q_BHTD.shape[2], k_BGSD.shape[2], q_BHTD.shape[1], causal).blocks
        return blocks.to(q_BHTD.device).expand(*q_BHTD.shape[:2], *blocks.shape[2:])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        if not q.numel():
            return torch.zeros_like(q)
        T, S = q.shape[2], k.shape[2]
        self._shape = (q.shape[1], q.shape[-1], S, T)
        if T == 1:
            return self._step(q, k, v, scale)
        sizes = {"block": self.block, "query_block": self._rows(T), "causal": causal}
        parts = self._laid(("apart", T, S, q.shape[1], causal), lambda **where: apart(self.pattern, T, S, **sizes, heads=q.shape[1], **where))
        mask, index = parts or (self.block_mask(T, S, q.shape[1], causal), None)
        if self._used is None or self._used[0] is not mask or self._used[1].blocks.device != q.device:
            partial, tiles = (None if x is None else x.to(q.device) for x in (mask.partial, mask.tiles))
            here = BlockMask(mask.blocks.to(q.device), partial, tiles, mask.block, mask.query_block)
            listed = 0.0 if index is None else int((index >= 0).sum()) / (index.shape[0] * index.shape[1])
            self._used = mask, here, kept_pairs(mask, T, S, causal) / (here.blocks.shape[0] * here.blocks.shape[1]) + listed
        _, here, kept = self._used
        self._density = kept / visible_pairs(T, S, causal)
        self._kept += kept * q.shape[0] * q.shape[1]
        self._seen += float(visible_pairs(T, S, causal) * q.shape[0] * q.shape[1])
        how = {"block": self.block, "query_block": self._rows(T), "scale": scale, "causal": causal}
        if index is None:
            return block_attention(q, k, v, here, **how)
        return merge(*zip(block_attention(q, k, v, here, **how, return_lse=True),
                          token_attention(q, k, v, index.to(q.device), scale=scale, return_lse=True), strict=True))[0]

    def _step(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """One query reads the keys that it attends to and no others; no mask is made."""
        (B, H), S = q.shape[:2], k.shape[2]
        index = self._laid(("step", S, H), lambda **where: newest(self.pattern, S, heads=H, **where)).to(q.device)
        kept = int((index >= 0).sum()) / (index.shape[0] * index.shape[1])
        self._density = kept / S
        self._kept += kept * B * H
        self._seen += float(S * B * H)
        if not self._seen_finite and (2 * kept > S or not self._finite(k, index)):
            self._refuse(k, "keys", f" in layer {self._layer}")
        if kept == S:
            every = torch.ones(1, 1, 1, blocks_of(1, S, self.block, 1)[1], dtype=torch.bool, device=q.device)
            out = block_attention(q, k, v, every, block=self.block, query_block=1, scale=scale)
        else:
            out = token_attention(q, k, v, index, scale=scale)
        self._refuse_values(out, v, self._layer)
        return out

    def reference(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
        """softmax over the pattern's pairs of a full score matrix, head by head."""
        T, S, H = q_BHTD.shape[2], k_BGSD.shape[2], q_BHTD.shape[1]
        tables = [{n: t[b] if t.ndim == self._needs[n].ndim + 1 else t for n, t in self._tables.items()} for b in range(q_BHTD.shape[0])]
        keep_BHTS = torch.stack([
            torch.stack([self.pattern.mask(T, S, head=h, heads=H, tables=mine) for h in range(H)]) for mine in (tables if self._tables else [{}])
        ]).to(q_BHTD.device)
        share = H // k_BGSD.shape[1]
        score = q_BHTD @ k_BGSD.repeat_interleave(share, 1).mT * q_BHTD.shape[-1] ** -0.5
        weight = score.masked_fill(~keep_BHTS, torch.finfo(score.dtype).min).softmax(-1)
        return (weight * keep_BHTS) @ v_BGSD.repeat_interleave(share, 1)

    def cost(self, density: float | None = None) -> Any:
        """Per query at the context of the last call, all heads; by default at the pattern's own density there."""
        return super().cost(self._density if density is None else density)
