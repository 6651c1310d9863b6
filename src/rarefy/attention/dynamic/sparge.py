"""SpargeAttn (Zhang et al. 2025, arXiv 2502.18137): pooled products decide, but only where a block's tokens are alike.

Blocks of queries and keys are averaged; a block whose tokens point different ways is no mean of them, and is never passed over.
Of the others, each query block keeps the heaviest key blocks that together stay within a share of the softmax of pooled products, and the
heaviest in any case. A second stage passes over blocks far below the running maximum. The paper's 8-bit products are left out; a query's own
block is always kept beside, which the authors' code leaves to its rank.

Shape letters as in scores.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...errors import BadInput
from ...method import not_negative
from ..heads import per_head
from .blasst import block_maxima, gaps, smallest
from .rules import TopP, tail_levels
from .scores import key_blocks, key_means, query_rows


def likeness(x_ND: Tensor, there_N1: Tensor) -> Tensor:
    """[...] mean cosine of all pairs of rows of [..., M, D] that are there, themselves included."""
    unit = normalize(x_ND, dim=-1) * there_N1
    return unit.sum(-2).square().sum(-1) / there_N1.sum((-2, -1)).clamp_min(1).square()


class SpargeAttention(TopP):
    """Key blocks by top-p of pooled attention, with the guard of self-similarity.

    Args:
        budget: mean fraction of visible blocks, met by fitting the share, unless `dial` sets it.
        dial: the share of pooled attention kept (tau), in (0, 1), or 0.
        theta: mean cosine below which a block is never passed over, in [-1, 1]; 0 or less guards nothing, as a mean cosine with itself is above 0.
        skip: a kept block is passed over after all if its logits lie this far below the running maximum (-lambda); 0 never does.
    """

    name = "attention/sparge"
    wants = ("cache",)

    def __init__(
        self, budget: float = 0.25, block: int = 16, query_block: int = 1, dial: float = 0.0, theta: float = 0.0, skip: float = 0.0,
    ) -> None:
        super().__init__(budget, block, query_block, dial)
        if not -1 <= theta <= 1:
            raise BadInput(f"theta={theta!r} must be in [-1, 1]: a cosine")
        self.theta, self.skip = float(theta), not_negative("skip", skip)

    def pooled(self, q_BHTD: Tensor, S: int, rows: int) -> tuple[Tensor, Tensor]:
        """Mean query [B, H, Q, D] of each query block, and which of them are alike [B, H, Q]."""
        if rows == 1:
            return q_BHTD, torch.ones(q_BHTD.shape[:3], dtype=torch.bool, device=q_BHTD.device)
        held = query_rows(q_BHTD, S, rows, 0.0)
        there = query_rows(torch.ones_like(q_BHTD[..., :1]), S, rows, 0.0)
        return held.sum(3) / there.sum(3), likeness(held, there) >= self.theta

    def describe(self, k_BGSD: Tensor) -> Tensor:
        """[B, G, N, D + 1] mean key of each block, and how alike its keys are."""
        there = key_blocks(torch.ones_like(k_BGSD[..., :1]), self.block)
        return torch.cat((key_means(k_BGSD, self.block), likeness(key_blocks(k_BGSD, self.block), there)[..., None]), -1)

    def scores(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> Tensor:
        """Products of means / sqrt(D)."""
        mean_BHQD, _ = self.pooled(q_BHTD, k_BGSD.shape[2], rows)
        return mean_BHQD @ per_head(self.summary(k_BGSD)[..., :-1], q_BHTD.shape[1]).mT * q_BHTD.shape[-1] ** -0.5

    def levels(self, score_BHQN: Tensor, always_BHQN: Tensor) -> Tensor:
        """-log(mass lighter than a block), by mass alone; a level off the scale counts as its end, so that a fitted dial can reach it."""
        mass = score_BHQN.to(torch.promote_types(score_BHQN.dtype, torch.float32)).softmax(-1).nan_to_num(0.0)
        return tail_levels(mass, within=True).clamp_max(self.span[1])

    def reached(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> tuple[Tensor, Tensor]:
        """As `levels` says, with unlike blocks at -inf; pooled attention is of the blocks that are alike, a query's own among them."""
        H, S = q_BHTD.shape[1], k_BGSD.shape[2]
        unlike_BHN = per_head(self.summary(k_BGSD)[..., -1] < self.theta, H)
        _, alike_BHQ = self.pooled(q_BHTD, S, rows)
        raw = self.scores(q_BHTD, k_BGSD, rows, causal)
        score, _ = self.bounded(raw, q_BHTD.shape[2], S, rows, causal)
        seen, own = score > -torch.inf, score == torch.inf
        guarded = (unlike_BHN[:, :, None] | ~alike_BHQ[..., None]) & seen
        level = self.levels(raw.masked_fill(guarded | ~seen, -torch.inf), own & ~guarded).masked_fill(own | guarded, -torch.inf)
        if self.skip:
            gap = smallest(gaps(block_maxima(q_BHTD, k_BGSD, self.block, causal)), S, rows)
            level = level.masked_fill((gap > self.skip) & (score < torch.inf), torch.inf)
        return level, seen

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """A product a block of queries and keys, and the likeness of every key."""
        return 2 * heads * width * keys / self.block / self.query_block + 4 * heads * width
