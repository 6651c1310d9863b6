"""What attention over a pattern reads beside queries and keys: bound metadata, what was made of it, and keys that a step looks at.

Shape letters as in block.py; K = places in a list of keys.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from .block import BlockAttention
from .patterns import parse


class Bound(BlockAttention):
    """A method with a pattern, whose metadata is bound for a while.

    Args:
        pattern: an expression, see `rarefy.attention.patterns`.
        block: keys in a block.
        query_block: queries worked on at a time in prefill.
    """

    def __init__(self, pattern: str, block: int, query_block: int) -> None:
        super().__init__(1.0, block, query_block)
        self.pattern = parse(pattern)
        self._needs = {need.name: need for need in self.pattern.reads()}
        self._tables: dict[str, Tensor] = {}
        self._masks: dict[tuple[Any, ...], Any] = {}
        self._padding_BS: Tensor | None = None

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

    def _laid(self, asked: tuple[Any, ...], make: Callable[..., Any]) -> Any:
        """What `make(layer=, tables=)` says of this layer and padded row, kept while tables are bound."""
        layer = self._layer if self.pattern.by_layer else 0
        if not self._tables:
            return make(layer=layer, tables={})
        key = (*asked, layer, self._row)
        if key not in self._masks:
            if len(self._masks) >= 64:                      # decoding asks at a new length each step
                self._masks.pop(next(iter(self._masks)))
            self._masks[key] = make(layer=layer, tables={name: self._real(name, table) for name, table in self._tables.items()})
        return self._masks[key]

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

    @torch.no_grad()
    def _finite(self, k_BGSD: Tensor, index_BH1K: Tensor) -> bool:
        """Whether sums of the keys that are read are finite."""
        (b, h), G = index_BH1K.shape[:2], k_BGSD.shape[1]
        wide = torch.promote_types(k_BGSD.dtype, torch.float32)
        for i, row_K in enumerate(index_BH1K.clamp_min(0).flatten(0, 2)):
            k = k_BGSD if b == 1 else k_BGSD[i // h : i // h + 1]
            k = k if h == 1 else k[:, i % h * G // h : i % h * G // h + 1]
            if not k.index_select(2, row_K).sum(dtype=wide).isfinite():
                return False
        return True
