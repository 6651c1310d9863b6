"""TalkMosaic's probabilistic FlashAttention (2024): a tile is computed with some probability. Shape letters as in scores.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..random import RandomBlocks


class RandomTiles(RandomBlocks):
    """Each tile kept with probability `budget`, the query's own always; the lottery is a function of position, head and seed.

    The paper's abstract gives no rule; this is the plain one.
    """

    name = "attention/random_tiles"

    def rule(self, score_BHQN: Tensor, visible_Q: Tensor) -> Tensor:
        """Where the lottery falls below the budget."""
        return (score_BHQN < self._budget) & (score_BHQN > -torch.inf) | (score_BHQN == torch.inf)
