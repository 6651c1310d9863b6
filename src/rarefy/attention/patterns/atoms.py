"""The leaves of patterns: runs of keys, marked keys or queries, lists of pairs, relations between labels.

Shape letters: Q = query blocks, N = key blocks, R = places in a block, X = (query block, key block) pairs, E = listed pairs, L = labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...errors import BadInput
from .grid import Bounds, Grid, Need, Scene, classes
from .pattern import Pattern

FAR = 1 << 40
"""Beyond every coordinate: the end of a run without an end."""

FEW = 24
"""Keys of a query up to which a list is compared, not searched."""

Span = Callable[[Tensor, Scene], tuple[Tensor, Tensor]]
"""(query coordinates, scene) -> first and last key coordinate, -FAR and FAR where open."""


class Run(Pattern):
    """Keys from a first to a last one; with `every` > 1 those at a distance of `offset` from the query, modulo `every`."""

    def __init__(self, text: str, span: Span, every: int = 1, offset: int = 0) -> None:
        super().__init__(text)
        self._span, self._every, self._offset = span, every, offset

    def holds(self, q: Tensor, k: Tensor, scene: Scene) -> Tensor:
        first, last = self._span(q, scene)
        inside = (k >= first) & (k <= last)
        return inside if self._every == 1 else inside & ((q - k - self._offset) % self._every == 0)

    def row(self, at: int, scene: Scene) -> Tensor:
        first, last = (int(end) for end in self._span(torch.tensor([at]), scene))
        first = max(first, 0)
        last = min(last, FAR if scene.length is None else scene.length - 1)
        if last >= FAR:
            raise BadInput(f"{self.text} has no last key in coordinates without an end")
        first += (at - first - self._offset) % self._every
        return torch.arange(first, max(first, last + 1), self._every)

    def bounds(self, grid: Grid) -> Bounds:
        first, last = self._span(grid.q.at, grid.scene)
        low, high = grid.k.low, grid.k.high
        maybe = (high >= first.amin(1)[:, None]) & (low <= last.amax(1)[:, None])
        surely = (low >= first.amax(1)[:, None]) & (high <= last.amin(1)[:, None])
        if self._every > 1:
            least, most = grid.q.low[:, None] - high - self._offset, grid.q.high[:, None] - low - self._offset
            maybe = maybe & (most.div(self._every, rounding_mode="floor") * self._every >= least)
            surely = surely & (least == most) & (least % self._every == 0)
        return maybe, surely

    def kinds(self, grid: Grid, row_X: Tensor, column_X: Tensor) -> list[Tensor]:
        """A tile is known by its distance and by where the runs of its queries begin and end, counted from the first query."""
        q = grid.q
        near = [torch.where(end.abs() >= FAR, end, end - q.first[:, None]) for end in self._span(q.at, grid.scene)]
        row_Q = classes(torch.cat([q.at - q.first[:, None], *near], 1))
        apart_X = q.first[row_X] - grid.k.first[column_X]
        if self._every > 1 and all(bool((end.abs() >= FAR).all()) for end in near):
            apart_X = apart_X % self._every
        return [row_Q[row_X], grid.k.shape[column_X], apart_X]


class Equal(Run):
    """The key with the query's own coordinate."""

    def __init__(self, text: str) -> None:
        super().__init__(text, lambda q, scene: (q, q))

    def bounds(self, grid: Grid) -> Bounds:
        """Labels in any order are looked up, block by block that holds them: ranges of labels would overlap where labels do not."""
        maybe, surely = super().bounds(grid)
        if grid.q.rising and grid.k.rising:
            return maybe, surely
        (label_q, row), (label_k, column) = (_held(side.at) for side in (grid.q, grid.k))
        first, stop = torch.searchsorted(label_k, label_q), torch.searchsorted(label_k, label_q, right=True)
        exact = torch.zeros(len(grid.q.at), len(grid.k.at), dtype=torch.bool)
        for i in range(int((stop - first).max()) if len(first) else 0):
            there = first + i < stop
            exact[row[there], column[(first + i)[there]]] = True
        return exact, surely


def _held(at: Tensor) -> tuple[Tensor, Tensor]:
    """(labels that are one, blocks that hold them), sorted by label, each pair once."""
    block = torch.arange(len(at))[:, None].expand_as(at)
    pairs = torch.unique(torch.stack([at.flatten(), block.flatten()], 1)[at.flatten() >= 0], dim=0)
    return pairs[:, 0].contiguous(), pairs[:, 1]


class Marked(Pattern):
    """Pairs whose key (or query) is marked.

    Args:
        mark: (coordinates, scene) -> bool.
        side: "key" or "query".
        needs: tables that `mark` reads.
        places: (length) -> marked coordinates below it, where that can be told without looking at all.
    """

    def __init__(
        self, text: str, mark: Callable[[Tensor, Scene], Tensor], side: str, needs: Sequence[Need] = (),
        places: Callable[[int], Tensor] | None = None,
    ) -> None:
        super().__init__(text, needs=needs)
        self._mark, self._side, self._places = mark, side, places

    def holds(self, q: Tensor, k: Tensor, scene: Scene) -> Tensor:
        mine, other = (k, q) if self._side == "key" else (q, k)
        return self._mark(mine, scene) & torch.ones_like(other, dtype=torch.bool)

    def row(self, at: int, scene: Scene) -> Tensor:
        length = scene.size(self.text)
        if self._side == "query":
            return torch.arange(length if bool(self._mark(torch.tensor([at]), scene)) else 0)
        return self._mark(torch.arange(length), scene).nonzero()[:, 0] if self._places is None else self._places(length)

    def _hit(self, grid: Grid) -> Tensor:
        return self._mark((grid.k if self._side == "key" else grid.q).at, grid.scene)

    def bounds(self, grid: Grid) -> Bounds:
        hit = self._hit(grid)
        some, all_ = hit.any(1), hit.all(1)
        return (some[None], all_[None]) if self._side == "key" else (some[:, None], all_[:, None])

    def kinds(self, grid: Grid, row_X: Tensor, column_X: Tensor) -> list[Tensor]:
        return [classes(self._hit(grid))[column_X if self._side == "key" else row_X]]


class Listed(Pattern):
    """Pairs in a list.

    Args:
        pairs: (scene) -> [E, 2] query and key coordinates; of any order, repeats allowed, negative ones left out.
        needs: tables that `pairs` reads.
        keys: (query, scene) -> its keys, where a list of all pairs is more than it takes; negative ones are left out.
    """

    def __init__(
        self, text: str, pairs: Callable[[Scene], Tensor], needs: Sequence[Need] = (), keys: Callable[[int, Scene], Tensor] | None = None,
    ) -> None:
        super().__init__(text, needs=needs)
        self._pairs, self._keys = _kept(lambda scene: _sorted(pairs(scene))), keys

    def listed(self, scene: Scene) -> Tensor:
        """[E] query << 31 | key of each pair, rising, each once."""
        return self._pairs(scene)

    def row(self, at: int, scene: Scene) -> Tensor:
        if self._keys is None:
            listed = self._pairs(scene)
            key = listed[slice(*torch.searchsorted(listed, torch.tensor([at << 31, at + 1 << 31])).tolist())] & 0x7FFFFFFF
        else:
            key = self._keys(at, scene)
        return key[(key >= 0) & (key < scene.size(self.text))]

    def holds(self, q: Tensor, k: Tensor, scene: Scene) -> Tensor:
        listed = self._pairs(scene)
        if not len(listed):
            return torch.zeros(torch.broadcast_shapes(q.shape, k.shape), dtype=torch.bool)
        if (out := self._few(q, k, listed)) is not None:
            return out
        asked = (q << 31) | k
        found = torch.searchsorted(listed, asked.contiguous()).clamp_max(len(listed) - 1)
        return listed[found] == asked

    def _few(self, q: Tensor, k: Tensor, listed: Tensor) -> Tensor | None:
        """The same where a query has few keys: each compared with all of k, far sooner than every pair is looked up."""
        if q.ndim == 0 or q.shape[-1] != 1 or k.ndim == 0 or k.shape[-1] < FEW:
            return None
        first, stop = (torch.searchsorted(listed, ((q + i) << 31).contiguous()) for i in (0, 1))
        most = int((stop - first).max()) if q.numel() else 0
        if most > FEW:
            return None
        out = torch.zeros(torch.broadcast_shapes(q.shape, k.shape), dtype=torch.bool)
        for i in range(most):
            there = first + i < stop
            out |= torch.where(there, listed[(first + i).clamp_max(len(listed) - 1)] & 0x7FFFFFFF, -1) == k
        return out & (k >= 0) & (q >= 0)

    def bounds(self, grid: Grid) -> Bounds:
        maybe = torch.ones(len(grid.q.at), len(grid.k.at), dtype=torch.bool)
        if grid.q.rising and grid.k.rising:
            maybe.zero_()
            listed = self._pairs(grid.scene)
            (a, b), (c, d) = (_blocks_holding(side.low, side.high, at) for side, at in ((grid.q, listed >> 31), (grid.k, listed & 0x7FFFFFFF)))
            for i in range(int((b - a).max()) + 1 if len(listed) else 0):
                for j in range(int((d - c).max()) + 1):
                    there = (a + i <= b) & (c + j <= d)
                    maybe[(a + i)[there], (c + j)[there]] = True
        # Tiles within one query and one key coordinate are all or nothing.
        single = (grid.q.low == grid.q.high)[:, None] & (grid.k.low == grid.k.high)
        return maybe, maybe & single & self.holds(grid.q.low[:, None], grid.k.low, grid.scene) if bool(single.any()) else single


def _sorted(pairs_E2: Tensor) -> Tensor:
    """Query << 31 | key of each pair, rising, each once."""
    if pairs_E2.ndim != 2 or pairs_E2.shape[1] != 2:
        raise BadInput(f"a list of pairs must have shape [pairs, 2], not {list(pairs_E2.shape)}")
    pairs_E2 = pairs_E2[(pairs_E2 >= 0).all(1)]
    return torch.unique((pairs_E2[:, 0] << 31) | pairs_E2[:, 1])


def _kept(make: Callable[[Scene], Tensor]) -> Callable[[Scene], Tensor]:
    """`make`, whose last result is kept for the same length and tables."""
    last: list[tuple[Scene, Tensor]] = []

    def asked(scene: Scene) -> Tensor:
        held = last[:]                                      # another thread may ask at another length in between
        if held and held[0][0].length == scene.length and held[0][0].tables is scene.tables:
            return held[0][1]
        made = make(scene)
        last[:] = [(scene, made)]
        return made

    return asked


def _blocks_holding(low: Tensor, high: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """(first, last) block whose range holds a coordinate, of blocks in rising order; first > last where none does."""
    return torch.searchsorted(high, at.contiguous()), torch.searchsorted(low, at.contiguous(), right=True) - 1


class Related(Pattern):
    """Pairs of labels that a matrix relates.

    Args:
        matrix: (scene) -> [L, L] bool, query label by key label.
        needs: tables that `matrix` reads.
    """

    def __init__(self, text: str, matrix: Callable[[Scene], Tensor], needs: Sequence[Need] = ()) -> None:
        super().__init__(text, needs=needs)
        self._matrix = _kept(matrix)

    def holds(self, q: Tensor, k: Tensor, scene: Scene) -> Tensor:
        matrix = self._matrix(scene)
        L = len(matrix)
        known = (q >= 0) & (k >= 0) & (q < L) & (k < L)
        return matrix[q.clamp(0, L - 1), k.clamp(0, L - 1)] & known

    def bounds(self, grid: Grid) -> Bounds:
        """Labels present in each block, multiplied with the relation: exact."""
        matrix = self._matrix(grid.scene)
        L = len(matrix)
        # One column more for coordinates that are no label: related to nothing.
        related = torch.zeros(L + 1, L + 1)
        related[:L, :L] = matrix.float()
        labels = [torch.where((side.at < 0) | (side.at >= L), L, side.at) for side in (grid.q, grid.k)]
        there = [torch.zeros(len(at), L + 1).scatter_(1, at, 1.0) for at in labels]
        return there[0] @ related @ there[1].T > 0, ~(there[0] @ (1 - related) @ there[1].T > 0)

    def kinds(self, grid: Grid, row_X: Tensor, column_X: Tensor) -> list[Tensor]:
        return [classes(grid.q.at)[row_X], classes(grid.k.at)[column_X]]
