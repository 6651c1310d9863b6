"""Patterns say which (query, key) pairs attention may look at, and combine with |, &, ~, a head and a layer at a time.

A pattern is a tree. Its leaves (atoms.py) answer three questions: which pairs (`holds`), what is certain of a whole tile
(`bounds`), and which tiles must look the same inside (`codes`). From these a block mask is made without the [T, S] matrix.

Shape letters: T = queries, S = keys, Q = query blocks, N = key blocks, X = (query block, key block) pairs, H = heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...cost import Cost
from ...errors import BadInput
from .grid import Bounds, Coords, Grid, Need, Scene, among, classes

if TYPE_CHECKING:
    from ...kernels.block_attention.mask import BlockMask

Rule = Callable[[Tensor, Tensor], Tensor]


class Pattern:
    """A named predicate on pairs. Made by the words of words.py, by `parse`, or here from any predicate on positions.

    Args:
        text: the expression that makes it; `parse(str(pattern))` gives it back where it was made of words.
        rule: (query positions, key positions), broadcasting -> bool.
        needs: metadata that it reads.
    """

    def __init__(self, text: str, rule: Rule | None = None, needs: Sequence[Need] = ()) -> None:
        self.text, self._rule, self._needs = text, rule, frozenset(needs)

    def holds(self, q: Tensor, k: Tensor, scene: Scene) -> Tensor:
        """Whether pairs of coordinates, broadcasting, are allowed."""
        if self._rule is None:
            raise NotImplementedError
        return self._rule(q, k)

    def row(self, at: int, scene: Scene) -> Tensor:
        """[K] keys of the query at one coordinate, in any order, repeats allowed; unless an atom knows them, every pair is looked at."""
        key = torch.arange(scene.size(str(self)))
        return key[self.holds(torch.tensor([at]), key, scene).expand(len(key))]

    def bounds(self, grid: Grid) -> Bounds:
        """What is certain of each tile; an unknown rule promises nothing."""
        return torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool)

    def codes(self, grid: Grid, row_X: Tensor, column_X: Tensor) -> list[Tensor]:
        """Columns [X]: tiles that agree in all of them have the same pairs allowed; by default every tile is its own."""
        decided, surely = grid.decided(self, row_X, column_X)
        return [torch.where(decided, -1 - surely.long(), c) for c in self.kinds(grid, row_X, column_X)]

    def kinds(self, grid: Grid, row_X: Tensor, column_X: Tensor) -> list[Tensor]:
        """`codes` of tiles that bounds leave open."""
        return [row_X * len(grid.k.at) + column_X]

    @property
    def parts(self) -> tuple[Pattern, ...]:
        """The patterns it is made of."""
        return ()

    def at(self, head: int = 0, heads: int = 1, layer: int = 0) -> Pattern:
        """The pattern of one head of one layer, without choices by head or layer."""
        return self

    @property
    def by_head(self) -> bool:
        """Whether heads may differ."""
        return any(part.by_head for part in self.parts)

    @property
    def by_layer(self) -> bool:
        """Whether layers may differ."""
        return any(part.by_layer for part in self.parts)

    @property
    def worded(self) -> bool:
        """Whether it is made of words only, so that its text says all."""
        return self._rule is None and all(part.worded for part in self.parts)

    def reads(self) -> frozenset[Need]:
        """The metadata it needs."""
        return self._needs.union(*(part.reads() for part in self.parts))

    def __or__(self, other: Pattern) -> Pattern:
        return Either(self, other)

    def __and__(self, other: Pattern) -> Pattern:
        return Both(self, other)

    def __invert__(self) -> Pattern:
        return Not(self)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Pattern({self.text})"

    def __eq__(self, other: object) -> bool:
        """By text; what is not made of words is itself only."""
        return self is other or isinstance(other, Pattern) and self.text == other.text and self.worded and other.worded

    def __hash__(self) -> int:
        return hash(self.text)

    def allowed(self, q: Tensor, k: Tensor) -> Tensor:
        """The predicate at positions, for the first head and layer; refuses a pattern that needs the sequence's length or metadata."""
        return self.at().holds(q, k, Scene())

    def mask(
        self, T: int, S: int, *, causal: bool = True, head: int = 0, heads: int = 1, layer: int = 0, tables: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """[T, S] bool for queries at the last T of S positions: the definition, pair by pair, of one head and one sequence.

        Raises:
            BadInput: metadata that is missing, too short or of a batch; more queries than keys.
        """
        if not 0 <= T <= S:
            raise BadInput(f"T={T} queries at the end of S={S} keys: T must be in 0..S")
        one, given = self.at(head, heads, layer), tables or {}
        for need in one.reads():
            if need.name in given and not need.fits(given[need.name], S):
                has = list(given[need.name].shape)
                raise BadInput(f"{need.name!r} of {self} must have {need.wanted(S)} here, for one sequence; it has shape {has}")
        q, k = torch.arange(S - T, S)[:, None], torch.arange(S)
        out = one.holds(q, k, Scene(S, given)).expand(T, S)
        return out & (k <= q) if causal else out

    def block_mask(
        self, T: int, S: int, *, block: int, query_block: int, causal: bool = True, heads: int = 1, layer: int = 0,
        tables: Mapping[str, Tensor] | None = None,
    ) -> BlockMask:
        """The pattern cut in blocks, [1, H or 1, Q, N]; metadata [B, S] gives [B, H or 1, Q, N]. Compiled once a shape.

        Raises:
            BadInput: metadata that is missing or too short, a per-head list that does not divide the heads.
        """
        from .compile import compiled

        return compiled(self, T, S, block=block, query_block=query_block, causal=causal, heads=heads, layer=layer, tables=tables)

    def density(
        self, S: int, *, causal: bool = True, heads: int = 1, layer: int = 0, tables: Mapping[str, Tensor] | None = None, block: int = 64,
    ) -> float:
        """Pairs allowed of the pairs of S queries and keys (causal: of those not ahead), exactly, over all heads."""
        from .count import kept_pairs, visible_pairs
        from .lists import apart

        how = {"block": block, "query_block": block, "causal": causal, "heads": heads, "layer": layer, "tables": tables}
        made, index = apart(self, S, S, **how) or (self.block_mask(S, S, **how), None)
        listed = 0.0 if index is None else int((index >= 0).sum()) / (index.shape[0] * index.shape[1])
        return (kept_pairs(made, S, S, causal) / made.blocks.shape[:2].numel() + listed) / visible_pairs(S, S, causal) if S else 1.0

    def cost(
        self, S: int, *, width: int = 64, heads: int = 1, block: int = 64, causal: bool = True, layer: int = 0,
        tables: Mapping[str, Tensor] | None = None,
    ) -> tuple[Cost, Cost]:
        """(allowed pairs alone, every pair of the tiles touched) a query, all heads: 4 D flops a pair; keys and values once a tile row, float32."""
        from .count import kept_pairs

        made = self.block_mask(S, S, block=block, query_block=block, causal=causal, heads=heads, layer=layer, tables=tables)
        rows = made.blocks.shape[0] * made.blocks.shape[1] / heads
        tiles, pairs = int(made.blocks.sum()) / rows, kept_pairs(made, S, S, causal) / rows
        read = 8 * width * tiles * block / S
        return Cost(4 * width * pairs / S, read), Cost(4 * width * tiles * block * block / S, read)

    def compile(self, T: int, S: int, *, size: int, query_block: int, causal: bool = True) -> Tensor:
        """[Q, N] bool: key blocks in which some pair of a query block is allowed, of the first head."""
        return self.at().block_mask(T, S, block=size, query_block=query_block, causal=causal).blocks[0, 0]


class _Joined(Pattern):
    """Two patterns or one, joined pair by pair."""

    def __init__(self, text: str, *parts: Pattern) -> None:
        super().__init__(text)
        self._parts = parts

    @property
    def parts(self) -> tuple[Pattern, ...]:
        return self._parts

    def at(self, head: int = 0, heads: int = 1, layer: int = 0) -> Pattern:
        now = [part.at(head, heads, layer) for part in self._parts]
        return self if all(a is b for a, b in zip(now, self._parts, strict=True)) else self._again(*now)

    def _again(self, *parts: Pattern) -> Pattern:
        raise NotImplementedError

    def codes(self, grid: Grid, row_X: Tensor, column_X: Tensor) -> list[Tensor]:
        return [column for part in self._parts for column in part.codes(grid, row_X, column_X)]


class Either(_Joined):
    """Pairs that one or the other allows."""

    def __init__(self, left: Pattern, right: Pattern) -> None:
        super().__init__(f"({left} | {right})", left, right)

    def _again(self, *parts: Pattern) -> Pattern:
        return Either(*parts)

    def holds(self, q: Tensor, k: Tensor, scene: Scene) -> Tensor:
        return self._parts[0].holds(q, k, scene) | self._parts[1].holds(q, k, scene)

    def row(self, at: int, scene: Scene) -> Tensor:
        return torch.cat([part.row(at, scene) for part in self._parts])

    def bounds(self, grid: Grid) -> Bounds:
        (maybe, surely), (perhaps, certainly) = (grid.bounds(part) for part in self._parts)
        return maybe | perhaps, surely | certainly


class Both(_Joined):
    """Pairs that both allow."""

    def __init__(self, left: Pattern, right: Pattern) -> None:
        super().__init__(f"({left} & {right})", left, right)

    def _again(self, *parts: Pattern) -> Pattern:
        return Both(*parts)

    def holds(self, q: Tensor, k: Tensor, scene: Scene) -> Tensor:
        return self._parts[0].holds(q, k, scene) & self._parts[1].holds(q, k, scene)

    def row(self, at: int, scene: Scene) -> Tensor:
        mine = self._parts[0].row(at, scene)
        return mine[among(mine, self._parts[1].row(at, scene))]

    def bounds(self, grid: Grid) -> Bounds:
        (maybe, surely), (perhaps, certainly) = (grid.bounds(part) for part in self._parts)
        return maybe & perhaps, surely & certainly


class Not(_Joined):
    """Pairs that it does not allow."""

    def __init__(self, part: Pattern) -> None:
        super().__init__(f"~{part}", part)

    def _again(self, *parts: Pattern) -> Pattern:
        return Not(*parts)

    def holds(self, q: Tensor, k: Tensor, scene: Scene) -> Tensor:
        return ~self._parts[0].holds(q, k, scene)

    def row(self, at: int, scene: Scene) -> Tensor:
        key = torch.arange(scene.size(str(self)))
        return key[~among(key, self._parts[0].row(at, scene))]

    def bounds(self, grid: Grid) -> Bounds:
        maybe, surely = grid.bounds(self._parts[0])
        return ~surely, ~maybe


class Choice(Pattern):
    """Another pattern for each head or layer: by equal shares of the heads, by turns, or some against the rest.

    Args:
        pick: (head, heads, layer) -> which of `options`.
        axis: "head" or "layer".
    """

    def __init__(self, text: str, options: Sequence[Pattern], pick: Callable[[int, int, int], int], axis: str) -> None:
        super().__init__(text)
        self._options, self._pick, self._axis = tuple(options), pick, axis

    @property
    def parts(self) -> tuple[Pattern, ...]:
        return self._options

    @property
    def by_head(self) -> bool:
        return self._axis == "head" or super().by_head

    @property
    def by_layer(self) -> bool:
        return self._axis == "layer" or super().by_layer

    def at(self, head: int = 0, heads: int = 1, layer: int = 0) -> Pattern:
        return self._options[self._pick(head, heads, layer)].at(head, heads, layer)

    def holds(self, q: Tensor, k: Tensor, scene: Scene) -> Tensor:
        raise BadInput(f"{self.text} differs between {self._axis}s: ask for one with .at(head, heads, layer)")


class PerHead(Pattern):
    """An atom that is another one in each head."""

    def __init__(self, text: str, make: Callable[[int, int], Pattern]) -> None:
        super().__init__(text)
        self._make = make

    @property
    def by_head(self) -> bool:
        return True

    def at(self, head: int = 0, heads: int = 1, layer: int = 0) -> Pattern:
        return self._make(head, heads)

    def reads(self) -> frozenset[Need]:
        return self._make(0, 1).reads()


class Lift(Pattern):
    """A pattern over other coordinates: numbers of blocks, coordinates of a grid, metadata.

    Args:
        to: (positions, scene) -> coordinates; negative where a position has none, which allows nothing.
        key_to: the same for keys, where they are placed otherwise than queries.
        length: scene -> how many coordinates there are.
        again: makes the same lift of another pattern.
        needs: tables that `to` reads.
        back: key coordinates -> the positions that have them, where that can be told without looking at all positions.
    """

    def __init__(
        self, text: str, part: Pattern, to: Callable[[Tensor, Scene], Tensor], length: Callable[[Scene], int | None],
        again: Callable[[Pattern], Pattern], needs: Sequence[Need] = (), key_to: Callable[[Tensor, Scene], Tensor] | None = None,
        back: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(text, needs=needs)
        self._part, self._to, self._key_to, self._length, self._again, self._back = part, to, key_to or to, length, again, back
        self._last: tuple[Any, ...] = ()

    @property
    def parts(self) -> tuple[Pattern, ...]:
        return (self._part,)

    def at(self, head: int = 0, heads: int = 1, layer: int = 0) -> Pattern:
        now = self._part.at(head, heads, layer)
        return self if now is self._part else self._again(now)

    def of(self, part: Pattern) -> Pattern:
        """The same lift of another pattern."""
        return self._again(part)

    def _above(self, scene: Scene) -> Scene:
        return Scene(self._length(scene), scene.tables)

    def holds(self, q: Tensor, k: Tensor, scene: Scene) -> Tensor:
        q, k = self._to(q, scene), self._key_to(k, scene)
        return self._part.holds(q, k, self._above(scene)) & (q >= 0) & (k >= 0)

    def row(self, at: int, scene: Scene) -> Tensor:
        here, length = int(self._to(torch.tensor([at]), scene)), scene.size(str(self))
        if here < 0:
            return torch.arange(0)
        above = self._above(scene)
        if self._back is None:
            return among(self._key_to(torch.arange(length), scene), self._part.row(here, above)).nonzero()[:, 0]
        if (last := self._last)[:1] != ((here, above.length),) or self.reads():      # steps within a block see the same blocks; threads write it too
            last = self._last = (here, above.length), self._back(self._part.row(here, above))
        return last[1][last[1] < length]

    def _grid(self, grid: Grid) -> Grid:
        def make() -> Grid:
            q, k = self._to(grid.q.at, grid.scene), self._key_to(grid.k.at, grid.scene)
            return Grid(Coords(q), Coords(k), self._above(grid.scene))

        return grid.lifted(self, make)

    def bounds(self, grid: Grid) -> Bounds:
        above = self._grid(grid)
        maybe, surely = above.bounds(self._part)
        some = (above.q.high >= 0)[:, None] & (above.k.high >= 0)
        return maybe & some, surely & (above.q.low >= 0)[:, None] & (above.k.low >= 0)

    def codes(self, grid: Grid, row_X: Tensor, column_X: Tensor) -> list[Tensor]:
        above = self._grid(grid)
        columns = self._part.codes(above, row_X, column_X)
        for side, at_X in ((above.q, row_X), (above.k, column_X)):
            if bool((side.low < 0).any()):
                columns.append(classes(side.at < 0)[at_X])
        return columns
