"""Mean-pooled blocks: the block-sparse pattern of MInference (Jiang et al. 2024, arXiv 2407.02490), and the plainest score of blocks.

Shape letters as in scores.py.
"""

from __future__ import annotations

from torch import Tensor

from ..block import BlockAttention
from ..heads import per_head
from .scores import key_means, mean


class Pooled(BlockAttention):
    """Top blocks by (mean of a block's queries) . (mean of a block's keys).

    What trained gates are held against, and what blocks of tokens that differ defeat: see attention/sparge for a guard. A block's own keys are
    always kept; the paper's code lets them compete, and divides a last block that is short by its full size.
    """

    name = "attention/pooled"
    wants = ("cache",)

    def describe(self, k_BGSD: Tensor) -> Tensor:
        """[B, G, N, D] mean key of each block."""
        return key_means(k_BGSD, self.block)

    def scores(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> Tensor:
        """Products of means / sqrt(D)."""
        mean_BHQD = mean(q_BHTD, k_BGSD.shape[2], rows)
        return mean_BHQD @ per_head(self.summary(k_BGSD), q_BHTD.shape[1]).mT * q_BHTD.shape[-1] ** -0.5

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """A product a block of queries and keys."""
        return 2 * heads * width * keys / self.block / self.query_block
