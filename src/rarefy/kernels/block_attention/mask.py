"""Which pairs a pattern of blocks keeps: whole blocks, and blocks kept in part, whose pairs are listed once a distinct tile.

Shape letters: b, h = batch and heads of the mask (1 where all share), T = queries, S = keys, Q = query blocks, N = key blocks,
P = distinct tiles, R = queries in a block, M = keys in a block, X = (query block, key block) pairs at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import BadInput
from .pairs import kept_pairs, visible_pairs

Allowed = Callable[..., Tensor]
"""(query positions [...], key positions [...]) -> bool, for patterns finer than a block; may take head indices as a third argument.
It is asked at positions in 0 .. S - 1 alone, so that it may look them up in a table of S."""

_AT_ONCE = 1 << 20
"""Pairs expanded at a time."""


def blocks_of(T: int, S: int, block: int, query_block: int) -> tuple[int, int]:
    """(Q, N): how many query and key blocks T queries at the end of S keys fall into."""
    first = (S - T) // query_block
    return (-(-S // query_block) - first if T else 0), -(-S // block)


def by_head(allowed: Allowed) -> bool:
    """Whether a predicate wants the head as its third argument: it has three positional parameters without a default."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        given = inspect.signature(allowed).parameters.values()
    except (TypeError, ValueError):
        return False
    return sum(p.kind in kinds and p.default is p.empty for p in given) >= 3


def ask(allowed: Allowed, query: Tensor, key: Tensor, head: Tensor) -> Tensor:
    """The predicate at broadcasting positions; heads are passed to those that take them."""
    return allowed(query, key, head) if by_head(allowed) else allowed(query, key)


@dataclass(frozen=True)
class BlockMask:
    """Blocks kept, and which pairs of those that are kept in part.

    Args:
        blocks: [b, h, Q, N] bool; b and h are 1 where batch rows and heads share.
        partial: [b, h, Q, N] int32 or None: -1 where a chosen block is whole (apart from causality), else the row of `tiles`.
        tiles: [P, R, M] bool, the pairs allowed inside a block; None together with `partial`.
        block: M.
        query_block: R.

    Raises:
        BadInput: shapes or tile numbers that do not fit.
    """

    blocks: Tensor
    partial: Tensor | None
    tiles: Tensor | None
    block: int
    query_block: int

    def __post_init__(self) -> None:
        if self.block < 1 or self.query_block < 1:
            raise BadInput(f"block={self.block} and query_block={self.query_block} must be at least 1")
        if self.blocks.ndim != 4 or self.blocks.dtype != torch.bool:
            raise BadInput(f"blocks must be bool [b, h, Q, N], not {self.blocks.dtype} {list(self.blocks.shape)}")
        if (self.partial is None) != (self.tiles is None):
            raise BadInput("partial and tiles come together: numbers of tiles, and the tiles they number")
        if self.partial is None or self.tiles is None:
            return
        if self.partial.shape != self.blocks.shape or self.partial.dtype != torch.int32:
            raise BadInput(f"partial must be int32 {list(self.blocks.shape)} as blocks, not {self.partial.dtype} {list(self.partial.shape)}")
        if self.tiles.shape[1:] != (self.query_block, self.block) or self.tiles.dtype != torch.bool:
            need = f"[P, {self.query_block}, {self.block}]"
            raise BadInput(f"tiles must be bool {need}, not {self.tiles.dtype} {list(self.tiles.shape)}")
        if self.partial.numel() and not -1 <= int(self.partial.min()) <= int(self.partial.max()) < len(self.tiles):
            least, most = int(self.partial.min()), int(self.partial.max())
            raise BadInput(f"partial names tiles {least} .. {most}; there are {len(self.tiles)}, and -1 is a whole block")

    @classmethod
    def of(cls, blocks: Tensor, allowed: Allowed, T: int, S: int, *, block: int, query_block: int, heads: int = 1) -> BlockMask:
        """A predicate evaluated on the chosen blocks; those without an allowed pair are dropped, equal tiles are stored once.

        Args:
            blocks: [b, h, Q, N] bool.
            heads: H, for predicates that take the head; the mask then has a row for each.
        """
        head_H = torch.arange(heads, device=blocks.device)
        per_head = by_head(allowed)
        if per_head:
            blocks = blocks.expand(-1, heads, -1, -1)
        asked_HQN = blocks.any(0) if per_head else blocks.any(0).any(0, keepdim=True)
        within_R, within_M = torch.arange(query_block, device=blocks.device), torch.arange(block, device=blocks.device)
        number_HQN = torch.full(asked_HQN.shape, -2, dtype=torch.int32, device=blocks.device)
        tiles = torch.zeros(0, query_block, block, dtype=torch.bool, device=blocks.device)
        first = (S - T) // query_block
        for at_X3 in asked_HQN.nonzero().split(max(1, _AT_ONCE // (query_block * block))):
            head, row, column = at_X3.unbind(1)
            query = ((first + row)[:, None] * query_block + within_R)[:, :, None]
            key = (column[:, None] * block + within_M)[:, None]
            tile_XRM = ask(allowed, query.clamp_max(S - 1), key.clamp_max(S - 1), head_H[head][:, None, None]).expand(len(row), query_block, block)
            there = (query >= S - T) & (query < S) & (key < S)          # pairs that do not exist must not split equal tiles
            tile_XRM = tile_XRM | ~there
            whole_X, none_X = tile_XRM.all(-1).all(-1), ~(tile_XRM & there).any(-1).any(-1)
            number_X = torch.where(none_X, -2, -1).to(torch.int32)
            finer_X = ~(whole_X | none_X)
            if finer_X.any():
                tiles, number_X[finer_X] = _distinct(tiles, tile_XRM[finer_X])
            number_HQN[head, row, column] = number_X
        blocks = blocks & (number_HQN > -2)
        if not (number_HQN >= 0).any():
            return cls(blocks, None, None, block, query_block)
        return cls(blocks, number_HQN.clamp_min(-1).expand(blocks.shape), tiles, block, query_block)

    def pairs(self, T: int, S: int, causal: bool) -> Tensor:
        """[b, h, T, S] bool."""
        return self.rows(torch.arange(S - T, S, device=self.blocks.device), T, S, causal)

    def rows(self, at_T: Tensor, T: int, S: int, causal: bool) -> Tensor:
        """`pairs` of the queries at positions at_T only."""
        at_S = torch.arange(S, device=at_T.device)
        row_T, column_S = at_T // self.query_block - (S - T) // self.query_block, at_S // self.block
        keep = self.blocks[:, :, row_T][..., column_S]
        if self.partial is not None and self.tiles is not None:
            number = self.partial[:, :, row_T][..., column_S]
            inside = self.tiles[number.clamp_min(0), (at_T % self.query_block)[:, None], at_S % self.block]
            keep = keep & ((number < 0) | inside)
        return keep & (at_S <= at_T[:, None]) if causal else keep

    def visible(self, T: int, S: int, causal: bool) -> Tensor:
        """[Q, N] float64: pairs that exist in each block (and, causal, whose key is not ahead), chosen or not."""
        device = self.blocks.device
        at_T = torch.arange(S - T, S, device=device)
        last_T = at_T if causal else torch.full_like(at_T, S - 1)
        start_N = torch.arange(self.blocks.shape[-1], device=device) * self.block
        pairs_TN = (last_T[:, None] + 1 - start_N).minimum((S - start_N).clamp_max(self.block)).clamp_min_(0).double()
        if self.query_block == 1:
            return pairs_TN
        pairs_QN = torch.zeros(self.blocks.shape[2:], dtype=torch.float64, device=device)
        return pairs_QN.index_add_(0, at_T // self.query_block - (S - T) // self.query_block, pairs_TN)

    def density(self, T: int, S: int, causal: bool) -> float:
        """Pairs kept of pairs visible, exactly; 1 where nothing is visible."""
        total = visible_pairs(T, S, causal) * self.blocks.shape[0] * self.blocks.shape[1]
        return kept_pairs(self, T, S, causal) / total if total else 1.0


def _distinct(known_PRM: Tensor, tile_XRM: Tensor) -> tuple[Tensor, Tensor]:
    """(known tiles and new ones, the number of each given tile)."""
    flat = torch.cat([known_PRM, tile_XRM]).flatten(1)
    size = flat.shape[1]
    packed = torch.nn.functional.pad(flat, (0, -size % 8)).unflatten(1, (-1, 8)).to(torch.uint8)
    packed = (packed << torch.arange(8, device=flat.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    number = _numbers(packed)
    # unique sorts; tiles keep the place of their first occurrence, so that numbers already given stay
    first = torch.full((int(number.max()) + 1,), len(flat), device=flat.device).scatter_reduce_(
        0, number, torch.arange(len(flat), device=flat.device), "amin")
    order = first.argsort()
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=flat.device))
    return flat[first[order]].unflatten(1, tile_XRM.shape[1:]), place[number[len(known_PRM) :]].to(torch.int32)


def _numbers(packed: Tensor) -> Tensor:
    """Equal numbers for equal rows of bytes: rows are sorted by a hash, which is checked; by the bytes themselves if it fails."""
    words = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4)).contiguous().view(torch.int32).long() & 0xFFFFFFFF
    odd = torch.arange(1, words.shape[1] + 1, device=words.device) * 0x9E3779B97F4A7C1 | 1
    mixed = (words + odd) * odd
    hashed = ((mixed ^ (mixed >> 29)) * odd).sum(-1)
    _, number = torch.unique(hashed, return_inverse=True)
    at = torch.arange(len(number), device=number.device)
    first = torch.empty(int(number.max()) + 1, dtype=torch.long, device=number.device).scatter_(0, number, at)
    if torch.equal(packed[first[number]], packed):
        return number
    return torch.unique(packed, dim=0, return_inverse=True)[1]


def as_mask(mask: Any, block: int, query_block: int) -> BlockMask:
    """A bool tensor [b, h, Q, N] as a BlockMask of whole blocks; a BlockMask is checked against the sizes asked for."""
    if not isinstance(mask, BlockMask):
        return BlockMask(mask, None, None, block, query_block)
    if (mask.block, mask.query_block) != (block, query_block):
        given = f"the mask was cut in blocks of {mask.query_block} queries and {mask.block} keys"
        raise BadInput(f"{given}; block={block}, query_block={query_block} were asked for")
    return mask
