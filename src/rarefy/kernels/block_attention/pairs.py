"""Pairs of a block mask counted tile by tile, exactly: equal tiles once, and one by one only those that the diagonal or an end cuts.

Shape letters: Q = query blocks, N = key blocks, R = queries in a block, M = keys in a block, P = distinct tiles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .mask import BlockMask

AT_ONCE = 1 << 23
"""Pairs expanded at a time."""


def visible_pairs(T: int, S: int, causal: bool) -> int:
    """Pairs that exist for T queries at the end of S keys; causal: those whose key is not ahead."""
    return T * S - T * (T - 1) // 2 if causal else T * S


def kept_pairs(mask: BlockMask, T: int, S: int, causal: bool) -> int:
    """Pairs that the mask keeps, over all of its rows and heads."""
    Q, N = mask.blocks.shape[2:]
    R, M, first = mask.query_block, mask.block, (S - T) // mask.query_block
    row_Q, column_N = torch.arange(Q), torch.arange(N)
    ragged_Q = ((first + row_Q) * R < S - T) | ((first + row_Q + 1) * R > S)
    cut_QN = ragged_Q[:, None] | ((column_N + 1) * M > S)
    blocks, number = mask.blocks.cpu(), None if mask.partial is None else mask.partial.cpu()
    if causal:
        cut_QN = cut_QN | ((column_N + 1) * M - 1 > (first + row_Q)[:, None] * R)
        blocks = blocks & (column_N * M <= (first + row_Q + 1)[:, None] * R - 1)
    clean = blocks & ~cut_QN
    if number is None or mask.tiles is None:
        return int(clean.sum()) * R * M + _cut(blocks & cut_QN, None, None, (T, S, R, M, first), causal)
    tiles = mask.tiles.cpu()
    size_P = torch.cat([tiles.flatten(1).sum(1), torch.tensor([R * M])])
    times_P = torch.bincount(torch.where(number < 0, len(tiles), number)[clean], minlength=len(size_P))
    return int((times_P * size_P).sum()) + _cut(blocks & cut_QN, number, tiles, (T, S, R, M, first), causal)


def _cut(chosen: Tensor, number: Tensor | None, tiles: Tensor | None, frame: tuple[int, int, int, int, int], causal: bool) -> int:
    T, S, R, M, first = frame
    total = 0
    for at in chosen.nonzero().split(max(1, AT_ONCE // (R * M))):
        query = (first + at[:, 2, None, None]) * R + torch.arange(R)[:, None]
        key = at[:, 3, None, None] * M + torch.arange(M)
        there = (query >= S - T) & (query < S) & (key < S)
        if causal:
            there = there & (key <= query)
        if number is not None and tiles is not None:
            mine = number[tuple(at.T)]
            there = there & ((mine < 0)[:, None, None] | tiles[mine.clamp_min(0)])
        total += int(there.sum())
    return total
