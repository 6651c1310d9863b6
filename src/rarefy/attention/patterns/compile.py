"""From a pattern to a block mask, a strip of query blocks at a time, never the [T, S] matrix.

Bounds settle most tiles. Of those left open, tiles with one code look the same inside, so that one of them is evaluated
for all: a stride over 128k tokens has as many different tiles as its stride has remainders.

Shape letters: T = queries, S = keys, Q = query blocks, N = key blocks, R = queries in a block, M = keys in a block,
X = open tiles, P = distinct tiles, H = heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import BadInput
from ...kernels.block_attention.mask import BlockMask, blocks_of
from ...method import positive
from .atoms import FAR, Run
from .grid import Coords, Grid, Need, Scene, classes, code
from .pattern import Both, Pattern

STRIP = 1 << 22
"""Tiles looked at at once."""
PAIRS = 1 << 23
"""Pairs evaluated at once."""
CAUSAL = Run("causal()", lambda q, scene: (torch.full_like(q, -FAR), q))


class _Cut(NamedTuple):
    """A pattern of one head, cut in tiles."""

    blocks_QN: Tensor
    number_QN: Tensor
    """int32: -1 whole, else which of the tiles."""
    tiles_PRM: Tensor


class Frame(NamedTuple):
    """Sequence and tile sizes."""

    T: int
    S: int
    block: int
    query_block: int
    causal: bool


@torch.compiler.disable()  # numpy inside; a mask is data, not a part of the graph
def compiled(
    pattern: Pattern, T: int, S: int, *, block: int, query_block: int, causal: bool, heads: int = 1, layer: int = 0,
    tables: Mapping[str, Tensor] | None = None,
) -> BlockMask:
    """See `Pattern.block_mask`."""
    positive("block", block)
    positive("query_block", query_block)
    if not 0 <= T <= S:
        raise BadInput(f"T={T} queries at the end of S={S} keys: T must be in 0..S")
    frame, (one_H, needs) = Frame(T, S, block, query_block, causal), of_heads(pattern, heads, layer)
    if not needs:
        return (_step if T == 1 else _static)(one_H, frame)
    made = [merged(one_H, frame, scene) for scene in scenes(pattern, needs, S, tables)]
    return made[0] if len(made) == 1 else stacked(made, frame)


@torch.compiler.disable()
def newest(pattern: Pattern, S: int, *, heads: int = 1, layer: int = 0, tables: Mapping[str, Tensor] | None = None) -> Tensor:
    """[b, h, 1, K] positions of the keys that the newest of S queries attends to, rising, -1 behind the last; b and h are 1 where all share.

    Atoms name the keys of one query, so that a decoding step costs what it keeps and not what it could see.

    Raises:
        BadInput: as `Pattern.block_mask`.
    """
    one_H, needs = of_heads(pattern, heads, layer)
    if not needs:
        return _newest(one_H, S)
    made = [_rows(one_H, scene) for scene in scenes(pattern, needs, S, tables)]
    K = max(index.shape[-1] for index in made)
    return torch.cat([pad(index, (0, K - index.shape[-1]), value=-1) for index in made])


@lru_cache(maxsize=8)
def _newest(one_H: tuple[Pattern, ...], S: int) -> Tensor:
    """Kept for the other layers of a step."""
    return _rows(one_H, Scene(S))


def _rows(one_H: tuple[Pattern, ...], scene: Scene) -> Tensor:
    """[1, H or 1, 1, K]."""
    S, rows = scene.size("a step"), {}
    for one in dict.fromkeys(one_H):
        keep_S = torch.zeros(S, dtype=torch.bool)
        keep_S[one.row(S - 1, scene)] = True
        rows[one] = keep_S.nonzero()[:, 0]
    K = max(1, *map(len, rows.values()))
    each = [rows[one] for one in (one_H if len(rows) > 1 else one_H[:1])]
    return torch.stack([pad(row, (0, K - len(row)), value=-1) for row in each])[None, :, None]


@lru_cache(maxsize=64)
def of_heads(pattern: Pattern, heads: int, layer: int) -> tuple[tuple[Pattern, ...], frozenset[Need]]:
    """(the pattern of each head, or of all; what they read)."""
    one_H = tuple(pattern.at(h, heads, layer) for h in range(heads)) if pattern.by_head else (pattern.at(0, heads, layer),)
    return one_H, frozenset().union(*(one.reads() for one in one_H))


def scenes(pattern: Pattern, needs: frozenset[Need], S: int, tables: Mapping[str, Tensor] | None) -> list[Scene]:
    """The tables of each sequence; one for all where none is of a batch."""
    given = {name: table.cpu() for name, table in (tables or {}).items()}
    batch = {need.name: len(given[need.name]) for need in needs if need.name in given and given[need.name].ndim == need.ndim + 1}
    if len(set(batch.values())) > 1:
        raise BadInput(f"the bound tables are of different batches: {batch}")
    made = []
    for b in range(next(iter(batch.values()), 1)):
        mine = {name: table[b] if name in batch else table for name, table in given.items()}
        for need in needs:
            if need.name in mine and not need.fits(mine[need.name], S):
                has = list(given[need.name].shape)
                raise BadInput(f"{need.name!r} of {pattern} must have {need.wanted(S)}, or one dim more for a batch; it has shape {has}")
        made.append(Scene(S, mine))
    return made


@lru_cache(maxsize=16)
def _static(one_H: tuple[Pattern, ...], frame: Frame) -> BlockMask:
    return merged(one_H, frame, Scene(frame.S))


@lru_cache(maxsize=8)
def _step(one_H: tuple[Pattern, ...], frame: Frame) -> BlockMask:
    """Decoding asks at another length each step: a store of its own, so that steps do not push prefills out."""
    return merged(one_H, frame, Scene(frame.S))


def merged(one_H: tuple[Pattern, ...], frame: Frame, scene: Scene) -> BlockMask:
    """[1, H or 1, Q, N], each distinct pattern cut once."""
    cuts = {one: _cut(one, frame, scene) for one in dict.fromkeys(one_H)}
    if len(cuts) == 1:
        one_H = one_H[:1]
    starts = dict(zip(cuts, np.cumsum([0, *(len(cut.tiles_PRM) for cut in cuts.values())]).tolist(), strict=False))
    blocks = torch.stack([cuts[one].blocks_QN for one in one_H])[None]
    number = torch.stack([torch.where(cuts[one].number_QN >= 0, cuts[one].number_QN + starts[one], -1) for one in one_H])[None]
    return _distinct(blocks, number, torch.cat([cut.tiles_PRM for cut in cuts.values()]), frame)


def stacked(masks: list[BlockMask], frame: Frame) -> BlockMask:
    """One mask a sequence, as one of a batch."""
    h = max(mask.blocks.shape[1] for mask in masks)
    blocks, numbers, tiles, start = [], [], [], 0
    for mask in masks:
        number = torch.full_like(mask.blocks, -1, dtype=torch.int32) if mask.partial is None else mask.partial
        blocks.append(mask.blocks.expand(-1, h, -1, -1))
        numbers.append(torch.where(number >= 0, number + start, -1).expand(-1, h, -1, -1))
        if mask.tiles is not None:
            tiles.append(mask.tiles)
            start += len(mask.tiles)
    held = torch.cat(tiles) if tiles else torch.zeros(0, frame.query_block, frame.block, dtype=torch.bool)
    return _distinct(torch.cat(blocks), torch.cat(numbers), held, frame)


def _distinct(blocks: Tensor, number: Tensor, tiles_PRM: Tensor, frame: Frame) -> BlockMask:
    """Tiles of equal content under one number."""
    if not len(tiles_PRM):
        return BlockMask(blocks, None, None, frame.block, frame.query_block)
    kind_P = classes(tiles_PRM.flatten(1))
    first = torch.full((int(kind_P.max()) + 1,), len(kind_P)).scatter_reduce_(0, kind_P, torch.arange(len(kind_P)), "amin")
    number = torch.where(number >= 0, kind_P[number.clamp_min(0)], -1)
    return BlockMask(blocks, number.int(), tiles_PRM[first], frame.block, frame.query_block)


def _one(pattern: Pattern, frame: Frame, scene: Scene) -> _Cut:
    """A single query, the newest: its row is short enough to look at pair by pair."""
    S, M = frame.S, frame.block
    keep_S = torch.zeros(S, dtype=torch.bool)
    keep_S[pattern.row(S - 1, scene)] = True
    filled = pad(keep_S, (0, -S % M), value=True).view(-1, M)       # keys that do not exist do not make a block partial
    some_N, all_N = pad(keep_S, (0, -S % M)).view(-1, M).any(1), filled.all(1)
    part_N = some_N & ~all_N
    number_N = torch.where(part_N, part_N.cumsum(0) - 1, -1).int()
    return _Cut(some_N[None], number_N[None], filled[part_N][:, None])


def _cut(pattern: Pattern, frame: Frame, scene: Scene) -> _Cut:
    T, S, M, R, causal = frame
    if T == R == 1:
        return _one(pattern, frame, scene)
    Q, N = blocks_of(T, S, M, R)
    place_QR = ((S - T) // R + torch.arange(Q))[:, None] * R + torch.arange(R)
    place_NM = torch.arange(N)[:, None] * M + torch.arange(M)
    there_QR, there_NM = (place_QR >= S - T) & (place_QR < S), place_NM < S
    q_QR, k = place_QR.clamp(S - T, max(S - 1, 0)), Coords(place_NM.clamp_max(S - 1))
    seen = Both(pattern, CAUSAL) if causal else pattern
    edge_Q, edge_N = classes(there_QR), classes(there_NM)
    blocks_QN, number_QN = torch.zeros(Q, N, dtype=torch.bool), torch.full((Q, N), -1, dtype=torch.int32)
    tiles, count = [torch.zeros(0, R, M, dtype=torch.bool)], 0
    rows = max(1, STRIP // max(N, 1))
    for start in range(0, Q, rows):
        at = slice(start, start + rows)
        grid = Grid(Coords(q_QR[at]), k, scene)
        maybe, surely = (x.expand(len(grid.q.at), N) for x in grid.bounds(seen))
        blocks_QN[at] = surely
        row_X, column_X = (maybe & ~surely).nonzero(as_tuple=True)
        if not len(row_X):
            continue
        name_X = code([edge_Q[at][row_X], edge_N[column_X], *seen.codes(grid, row_X, column_X)])
        _, one, kind_X = np.unique(name_X.numpy(), return_index=True, return_inverse=True)
        one, kind_X = torch.from_numpy(one), torch.from_numpy(kind_X).flatten()
        state_P = torch.empty(len(one), dtype=torch.int32)
        for part in torch.arange(len(one)).split(max(1, PAIRS // (R * M))):
            r, c = row_X[one[part]], column_X[one[part]]
            there = there_QR[at][r][:, :, None] & there_NM[c][:, None]
            q, key = grid.q.at[r][:, :, None], k.at[c][:, None]
            tile = seen.holds(q, key, scene).expand(there.shape) & there
            shut = ~there | (key > q) if causal else ~there
            open_ = ~(tile | shut).flatten(1).all(1) & tile.flatten(1).any(1)
            state_P[part] = torch.where(tile.flatten(1).any(1), -1, -2).int()
            state_P[part[open_]] = torch.arange(count, count + int(open_.sum()), dtype=torch.int32)
            count += int(open_.sum())
            tiles.append((tile | ~there)[open_])
        state_X = state_P[kind_X]
        blocks_QN[start + row_X, column_X] = state_X > -2
        number_QN[start + row_X, column_X] = state_X.clamp_min(-1)
    return _Cut(blocks_QN, number_QN, torch.cat(tiles))
