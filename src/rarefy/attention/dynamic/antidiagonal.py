"""XAttention (Xu et al. 2025, arXiv 2503.16428): the importance of a block from the antidiagonals of its tiles.

Logits are cut into tiles of `stride` x `stride`. The sum of a tile's antidiagonal touches each of its queries and each of its keys once, and
crosses every column and every diagonal, so heavy ones show in it. It is one product: queries of a tile written side by side in reverse, keys in
order. Softmax over a row of tiles of sum / (sqrt(D) stride), those ahead left out; a block's importance is what its tiles hold. A query
block keeps the first key block, its own, and then the heaviest: so many that they hold the share p (the paper's), or the budget's count.

For prefill: decoding steps are dense. The paper also searches a p for each head offline; here p is one, or fitted to the budget.
Shape letters as in scores.py; X, Y = query and key tiles, E = stride x D.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import BadInput
from ...method import positive
from ..block import BlockAttention
from ..heads import per_head
from .rules import TopP, tail_levels
from .scores import query_rows


class Antidiagonals(BlockAttention):
    """The score; queries and keys that fill up a tile count as zeros."""

    wants = ("cache",)
    prefill_only = True
    stride: int

    def _cut(self, stride: int) -> int:
        """`stride`, if blocks of queries and of keys are whole tiles."""
        positive("stride", stride)
        for what, size in (("block", self.block), ("query_block", self.query_block)):
            if size % stride:
                raise BadInput(f"stride={stride} does not divide {what}={size}: blocks are made of whole tiles")
        return stride

    def tiles(self, q_BHTD: Tensor, k_BGSD: Tensor) -> Tensor:
        """[B, H, X, Y] mean antidiagonal of each tile of q k / sqrt(D); tiles begin at multiples of the stride of the position."""
        S, s = k_BGSD.shape[2], self.stride
        q_BHXE = query_rows(q_BHTD, S, s, 0.0).flip(3).flatten(3)
        k_BGYE = pad(k_BGSD, (0, 0, 0, -S % s)).unflatten(2, (-1, s)).flatten(3)
        return q_BHXE @ per_head(k_BGYE, q_BHTD.shape[1]).mT * (q_BHTD.shape[-1] ** -0.5 / s)

    def scores(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> Tensor:
        """Sum over a block's tiles of their softmax among the tiles not ahead."""
        T, S, s = q_BHTD.shape[2], k_BGSD.shape[2], self.stride
        if rows == 1:                                                          # one query is no tile, and is served by every block
            return q_BHTD.new_ones(*q_BHTD.shape[:3], -(-S // self.block))
        tile = self.tiles(q_BHTD, k_BGSD)
        tile = tile.to(torch.promote_types(tile.dtype, torch.float32))
        X, Y = tile.shape[2:]
        if causal:
            at_X = (S - T) // s + torch.arange(X, device=tile.device)
            tile = tile.masked_fill(torch.arange(Y, device=tile.device) > at_X[:, None], -torch.inf)
        mass = tile.softmax(-1)
        per = self.block // s
        mass_BHXN = pad(mass, (0, -Y % per)).unflatten(-1, (-1, per)).sum(-1)
        lead = (S - T) // s % (rows // s)                                      # tiles of the first query block that came before
        return pad(mass_BHXN, (0, 0, lead, -(lead + X) % (rows // s))).unflatten(2, (-1, rows // s)).sum(3)

    def bounded(self, score_BHQN: Tensor, T: int, S: int, rows: int, causal: bool) -> tuple[Tensor, Tensor]:
        """As BlockAttention.bounded, with the first block always kept."""
        score, visible_Q = super().bounded(score_BHQN, T, S, rows, causal)
        score = score.clone()
        score[..., 0] = torch.inf
        return score, visible_Q

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """One product in `stride` of those of attention's logits."""
        return 2 * heads * width * keys / self.stride


class Antidiagonal(Antidiagonals):
    """The budget's share of each row.

    Args:
        budget: share of the visible key blocks; the first and the own one are kept also where that is more.
        stride: side of a tile; divides both blocks.
    """

    name = "attention/antidiagonal"

    def __init__(self, budget: float = 0.25, block: int = 64, query_block: int = 64, stride: int = 8) -> None:
        super().__init__(budget, block, query_block)
        self.stride = self._cut(stride)


class AntidiagonalTopP(TopP, Antidiagonals):
    """The fewest blocks whose tiles hold the share p.

    Args:
        budget: mean share of visible pairs, met by fitting p, unless `dial` sets p.
        dial: p (0.9 in the paper), or 0 to fit it.
        stride: side of a tile; divides both blocks.
    """

    name = "attention/antidiagonal_top_p"

    def __init__(self, budget: float = 0.25, block: int = 64, query_block: int = 64, dial: float = 0.0, stride: int = 8) -> None:
        super().__init__(budget, block, query_block, dial)
        self.stride = self._cut(stride)

    def levels(self, score_BHQN: Tensor, always_BHQN: Tensor) -> Tensor:
        """-log of the share of mass from here on, what is always kept before the rest."""
        return tail_levels(score_BHQN.clamp_min(0), always_BHQN)
