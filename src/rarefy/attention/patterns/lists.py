"""Patterns with a list of single pairs in them (random graphs, edges), apart: the list query by query, the rest as blocks.

A random graph puts a pair into nearly every tile, so that a block mask of it is all tiles and saves nothing: 16 random keys a query at
32,768 tokens are 0.1 % of the pairs and half of all blocks. Outputs of both parts merge exactly by their log-sums.

Shape letters: T = queries, S = keys, H = heads, K = places in a query's list, E = listed pairs; b, h = 1 where all share.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...kernels.block_attention.mask import BlockMask
from .atoms import Listed
from .compile import Frame, merged, of_heads, scenes, stacked
from .grid import Scene
from .pattern import Either, Pattern
from .words import none

SPARSE = 40
"""A list is worked on by itself where queries have at most one key in so many: a key looked up costs that many in a tile."""

Parts = tuple[BlockMask, Tensor]
"""(the rest [b, h, Q, N], listed keys outside of it [b, h, T, K] with -1 behind the last)."""


@torch.compiler.disable()
def apart(
    pattern: Pattern, T: int, S: int, *, block: int, query_block: int, causal: bool, heads: int = 1, layer: int = 0,
    tables: Mapping[str, Tensor] | None = None,
) -> Parts | None:
    """The pattern in two parts without a common pair, or None where it has no list or too long a one.

    Raises:
        BadInput: as `Pattern.block_mask`.
    """
    one_H, needs = of_heads(pattern, heads, layer)
    if not any(_split(one)[1] for one in one_H):
        return None
    frame = Frame(T, S, block, query_block, causal)
    if not needs:
        return _static(one_H, frame)
    made = [_parts(one_H, frame, scene) for scene in scenes(pattern, needs, S, tables)]
    if any(one is None for one in made):
        return None
    masks, lists = zip(*(one for one in made if one is not None), strict=True)
    return (masks[0] if len(masks) == 1 else stacked(list(masks), frame)), _level(list(lists), 0)


@lru_cache(maxsize=8)
def _static(one_H: tuple[Pattern, ...], frame: Frame) -> Parts | None:
    return _parts(one_H, frame, Scene(frame.S))


def _parts(one_H: tuple[Pattern, ...], frame: Frame, scene: Scene) -> Parts | None:
    lists: dict[Pattern, Tensor] = {}
    for one in dict.fromkeys(one_H):
        rest, listed = _split(one)
        lists[one] = _keys(listed, rest, frame, scene)
        if lists[one].shape[-1] * SPARSE > frame.S:
            return None
    each = [lists[one][None, None] for one in (one_H if len(lists) > 1 else one_H[:1])]
    return merged(tuple(_split(one)[0] for one in one_H), frame, scene), _level(each, 1)


def _level(lists: list[Tensor], dim: int) -> Tensor:
    """Lists [.., T, K] side by side, filled up to the longest."""
    K = max(index.shape[-1] for index in lists)
    return torch.cat([pad(index, (0, K - index.shape[-1]), value=-1) for index in lists], dim)


@lru_cache(maxsize=64)
def _split(pattern: Pattern) -> tuple[Pattern, tuple[Listed, ...]]:
    """(what is left of an either-or, its lists)."""
    if isinstance(pattern, Listed):
        return none(), (pattern,)
    if not isinstance(pattern, Either):
        return pattern, ()
    (left, some), (right, more) = (_split(part) for part in pattern.parts)
    if not some and not more:
        return pattern, ()
    bare = [part for part in (left, right) if part != none()]
    return Either(*bare) if len(bare) == 2 else (bare or [none()])[0], some + more


def _keys(lists: tuple[Listed, ...], rest: Pattern, frame: Frame, scene: Scene) -> Tensor:
    """[T, K] keys of each query that a list names and the rest does not."""
    T, S = frame.T, frame.S
    pairs_E = torch.unique(torch.cat([one.listed(scene) for one in lists])) if lists else torch.zeros(0, dtype=torch.long)
    q, k = pairs_E >> 31, pairs_E & 0x7FFFFFFF
    there = (q >= S - T) & (q < S) & (k <= q if frame.causal else k < S)
    q, k = q[there], k[there]
    new = ~rest.holds(q, k, scene).expand(q.shape)
    row, k = q[new] - (S - T), k[new]
    count_T = torch.bincount(row, minlength=T)
    out = torch.full((T, max(1, int(count_T.max()) if T else 1)), -1)
    out[row, torch.arange(len(row)) - (count_T.cumsum(0) - count_T)[row]] = k
    return out
