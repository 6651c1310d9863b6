"""Attention over a static pattern, written as an expression: `PatternAttention(pattern="window(256) | sinks(4)")`.

The pattern says pair by pair what is attended to; words, grammar and the papers' own patterns are in patterns/.
Shape letters as in block.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..kernels.block_attention import BlockMask, block_attention, token_attention
from .block import BlockAttention
from .patterns import parse
from .patterns.count import kept_keys, kept_pairs, visible_pairs


class PatternAttention(BlockAttention):
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

    def __init__(self, pattern: str = "window(256) | sinks(4)", block: int = 64, query_block: int = 64) -> None:
        super().__init__(1.0, block, query_block)
        self.pattern = parse(pattern)
        self._needs = {need.name: need for need in self.pattern.reads()}
        self._tables: dict[str, Tensor] = {}
        self._masks: dict[tuple[Any, ...], BlockMask] = {}
        self._used: tuple[BlockMask, BlockMask, int, Tensor | None] | None = None
        self._padding_BS: Tensor | None = None
        self._density = 1.0

    @property
    def budget(self) -> float:
        """1: all that the pattern allows is kept. What that is of all pairs, `measured_density` counts."""
        return 1.0

    @contextmanager
    def bind(self, **tables: Tensor) -> Iterator[None]:
        """Metadata for the sequences served within: labels [S] or [B, S], longer than S where decoding follows; lists as their words say.

        With padding, labels stand where their tokens stand in the padded batch.

        Raises:
            BadInput: a name that the pattern does not read.
        """
        for name in tables:
            if name not in self._needs:
                near = difflib.get_close_matches(name, self._needs, n=1, cutoff=0.0)
                raise BadInput(f"{self.pattern} does not read {name!r}; it reads {', '.join(sorted(self._needs)) or 'nothing'}"
                               + (f"; did you mean {near[0]}?" if near else ""))
        before, self._tables = self._tables, {**self._tables, **tables}
        self._masks = {}
        try:
            yield
        finally:
            self._tables, self._masks = before, {}

    def attend(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, padding_BS: Tensor | None = None, **how: Any) -> Tensor:
        """As BlockAttention.attend."""
        self._padding_BS = padding_BS
        try:
            return super().attend(q_BHTD, k_BGSD, v_BGSD, padding_BS=padding_BS, **how)
        finally:
            self._padding_BS, self._row = None, -1

    def block_mask(self, T: int, S: int, heads: int, causal: bool) -> BlockMask:
        """The pattern in this layer, for T queries at the end of S keys."""
        layer = self._layer if self.pattern.by_layer else 0
        if not self._tables:
            return self._cut(T, S, heads, causal, layer, {})
        key = (T, S, heads, causal, layer, self._row)
        if key not in self._masks:
            if len(self._masks) >= 64:                      # decoding asks at a new length each step
                self._masks.pop(next(iter(self._masks)))
            self._masks[key] = self._cut(T, S, heads, causal, layer, {name: self._real(name, table) for name, table in self._tables.items()})
        return self._masks[key]

    def _cut(self, T: int, S: int, heads: int, causal: bool, layer: int, tables: dict[str, Tensor]) -> BlockMask:
        return self.pattern.block_mask(
            T, S, block=self.block, query_block=self._rows(T), causal=causal, heads=heads, layer=layer, tables=tables)

    def _real(self, name: str, table: Tensor) -> Tensor:
        """The table of one padded sequence, padding left out; of a batch without padding, the table itself."""
        need = self._needs[name]
        if self._row < 0:
            return table
        table = table[self._row] if table.ndim == need.ndim + 1 else table
        if not need.by_position or self._padding_BS is None:
            return table
        real_S = self._padding_BS[self._row].to(table.device)
        if len(table) < len(real_S):
            raise BadInput(f"{name!r} has {len(table)} entries for {len(real_S)} padded positions")
        return table[: len(real_S)][real_S]

    def choose(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
        """[B, H, Q, N] bool: blocks with a pair of the pattern, whatever queries and keys say."""
        blocks = self.block_mask(q_BHTD.shape[2], k_BGSD.shape[2], q_BHTD.shape[1], causal).blocks
        return blocks.to(q_BHTD.device).expand(*q_BHTD.shape[:2], *blocks.shape[2:])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        if not q.numel():
            return torch.zeros_like(q)
        T, S = q.shape[2], k.shape[2]
        self._shape = (q.shape[1], q.shape[-1], S, T)
        mask = self.block_mask(T, S, q.shape[1], causal)
        if self._used is None or self._used[0] is not mask or self._used[1].blocks.device != q.device:
            partial, tiles = (None if x is None else x.to(q.device) for x in (mask.partial, mask.tiles))
            here = BlockMask(mask.blocks.to(q.device), partial, tiles, mask.block, mask.query_block)
            # One query reads the keys of blocks kept in part, not the blocks.
            index = kept_keys(here.pairs(1, S, causal)) if T == 1 and partial is not None else None
            self._used = mask, here, kept_pairs(mask, T, S, causal) if index is None else int((index >= 0).sum()), index
        _, here, kept, index = self._used
        rows = here.blocks.shape[0] * here.blocks.shape[1]
        self._density = kept / (rows * visible_pairs(T, S, causal))
        self._kept += kept / rows * q.shape[0] * q.shape[1]
        self._seen += float(visible_pairs(T, S, causal) * q.shape[0] * q.shape[1])
        if index is not None:
            return token_attention(q, k, v, index.expand(*q.shape[:2], -1, -1), scale=scale)
        return block_attention(q, k, v, here, block=self.block, query_block=self._rows(T), scale=scale, causal=causal)

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
