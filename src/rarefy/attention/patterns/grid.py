"""Sequences cut in blocks, and what a pattern can know of a (query block, key block) pair without looking inside.

Shape letters: Q = query blocks, N = key blocks, R = places in a block, X = (query block, key block) pairs at a time, C = columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import BadInput

if TYPE_CHECKING:
    from .pattern import Pattern

Bounds = tuple[Tensor, Tensor]
"""(maybe, surely) bool, broadcasting to [Q, N]: not maybe = no pair of the tile is allowed; surely = every pair is."""


@dataclass(frozen=True, eq=False)
class Scene:
    """What a pattern may ask of the sequence it is laid over."""

    length: int | None = None
    """S, or None where a pair is looked at without its sequence."""
    tables: Mapping[str, Tensor] = field(default_factory=dict)
    """Metadata by name: an integer a position [S], or what a word says it needs (edges [E, 2], sets [sets, size], parents [documents])."""

    def size(self, asker: str) -> int:
        """S, for the pattern called `asker`."""
        if self.length is None:
            raise BadInput(f"{asker} depends on the length of the sequence: lay it over one with mask() or block_mask()")
        return self.length

    def table(self, name: str, asker: str) -> Tensor:
        """The bound tensor of this name as int64."""
        if name not in self.tables:
            known = ", ".join(sorted(self.tables)) or "nothing"
            raise BadInput(f"{asker} reads {name!r}, which is not bound (bound: {known}); bind it, as in method.bind({name}=tensor)")
        return self.tables[name].long()


class Need(NamedTuple):
    """A table that a pattern reads."""

    name: str
    ndim: int
    """Of one sequence; one dim more gives a table to each sequence of a batch."""
    by_position: bool
    """Whether it has an entry for each position."""

    def fits(self, table: Tensor, S: int) -> bool:
        """Whether a table can be read for one sequence of S positions."""
        return table.ndim == self.ndim and not (self.by_position and len(table) < S)

    def wanted(self, S: int) -> str:
        """The shape that fits, in words."""
        return f"[{S} or more]" if self.by_position else f"{self.ndim} dims"


def classes(rows_NC: Tensor) -> Tensor:
    """[N] int64: equal rows, equal number."""
    rows = np.ascontiguousarray(rows_NC.cpu().numpy())
    if rows.shape[1] == 0:
        return torch.zeros(len(rows), dtype=torch.long)
    flat = rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize))).ravel()
    return torch.from_numpy(np.unique(flat, return_inverse=True)[1].astype(np.int64)).flatten()


@dataclass(eq=False)
class Coords:
    """Coordinates of the places of each block: positions, or what a lift made of them."""

    at: Tensor
    """[blocks, R] int64."""

    @cached_property
    def low(self) -> Tensor:
        """[blocks] least coordinate."""
        return self.at.amin(1)

    @cached_property
    def high(self) -> Tensor:
        """[blocks] greatest coordinate."""
        return self.at.amax(1)

    @cached_property
    def first(self) -> Tensor:
        """[blocks] coordinate of the first place."""
        return self.at[:, 0]

    @cached_property
    def shape(self) -> Tensor:
        """[blocks] a number that blocks share whose coordinates differ by a shift only."""
        return classes(self.at - self.first[:, None])

    @cached_property
    def rising(self) -> bool:
        """Whether coordinates never fall from one block to the next."""
        return bool((self.low[1:] >= self.high[:-1]).all())


class Grid:
    """The tiles that query blocks and key blocks make; what each pattern said of them is kept."""

    def __init__(self, q: Coords, k: Coords, scene: Scene) -> None:
        self.q, self.k, self.scene = q, k, scene
        self._bounds: dict[int, tuple[Pattern, Bounds]] = {}
        self._lifted: dict[int, tuple[Pattern, Grid]] = {}

    def bounds(self, pattern: Pattern) -> Bounds:
        """What the pattern can rule out or promise."""
        if id(pattern) not in self._bounds:
            self._bounds[id(pattern)] = pattern, pattern.bounds(self)
        return self._bounds[id(pattern)][1]

    def lifted(self, pattern: Pattern, make: Callable[[], Grid]) -> Grid:
        """The grid in another pattern's coordinates, made once."""
        if id(pattern) not in self._lifted:
            self._lifted[id(pattern)] = pattern, make()
        return self._lifted[id(pattern)][1]

    def decided(self, pattern: Pattern, row_X: Tensor, column_X: Tensor) -> tuple[Tensor, Tensor]:
        """(decided, allowed where it is) of some tiles."""
        maybe, surely = (x.expand(len(self.q.at), len(self.k.at))[row_X, column_X] for x in self.bounds(pattern))
        return surely | ~maybe, surely


def code(columns: list[Tensor]) -> Tensor:
    """[X] int64: one number for each distinct row of columns [X]."""
    out, span = torch.zeros_like(columns[0]), 1
    for column in columns:
        least = int(column.min())
        wide = int(column.max()) - least + 1
        if span * wide >= 1 << 62:
            out = torch.unique(out, return_inverse=True)[1]
            span = int(out.max()) + 1
        if span * wide >= 1 << 62:
            column, least = torch.unique(column, return_inverse=True)[1], 0
            wide = int(column.max()) + 1
        out, span = out * wide + (column - least), span * wide
    return out


def among(these: Tensor, those: Tensor) -> Tensor:
    """[X] bool: which of these whole numbers stand among those."""
    if len(those) <= 1:
        return these == those if len(those) else torch.zeros_like(these, dtype=torch.bool)
    return torch.isin(these, those)
