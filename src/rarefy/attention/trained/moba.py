"""MoBA (Lu et al. 2025, arXiv 2502.13189): each query picks the key blocks whose mean key it matches best, and is trained so.

score(q, block i) = q . mean(keys of block i); blocks after the query's are not seen, its own is always among the top k and is
attended causally. The gate has no parameters: queries and keys learn to be picked through the attention they get.

Shape letters as in ../block.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import BadInput
from ..block import BlockAttention, highest
from .by_keys import by_keys


def block_means(k_BGSD: Tensor, block: int) -> Tensor:
    """[B, G, N, D] mean key of each block; of a short last block, of the keys it has. Half precision is summed in float32."""
    S, short = k_BGSD.shape[2], -k_BGSD.shape[2] % block
    wide = k_BGSD.float() if k_BGSD.element_size() < 4 else k_BGSD
    total = pad(wide, (0, 0, 0, short)).unflatten(2, (-1, block)).sum(3)
    count = total.new_full((total.shape[2], 1), block)
    count[-1:] = S - (total.shape[2] - 1) * block
    return (total / count).to(k_BGSD.dtype)


class MoBA(BlockAttention):
    """Top blocks by mean key, at every query and head; nothing to train but the model itself (`Trained`).

    Args:
        top: blocks a query attends to, its own included (the paper's k); 0 takes the budget's share of those it sees.
        budget: fraction of the visible key blocks, where top = 0.
        block: keys in a block. query_block: queries that share a choice in prefill; the paper's is 1.
        order: loop of the prefill's computation, with the same result: "keys" as in the paper's algorithm, or "queries".
    """

    name = "attention/moba"

    def __init__(self, budget: float = 0.25, block: int = 64, query_block: int = 1, top: int = 0, order: str = "keys") -> None:
        super().__init__(budget, block, query_block)
        if not isinstance(top, int) or isinstance(top, bool) or top < 0:
            raise BadInput(f"top={top!r} must be a whole number >= 0: blocks a query attends to, 0 for the budget's share")
        if order not in ("queries", "keys"):
            raise BadInput(f"order={order!r} must be queries or keys")
        self.top, self.order = top, order

    def scores(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> Tensor:
        """q . mean key; queries that share a choice are averaged, which averages their scores."""
        mean = block_means(k_BGSD, self.block).repeat_interleave(q_BHTD.shape[1] // k_BGSD.shape[1], 1)
        if rows == 1:
            return q_BHTD @ mean.mT
        lead = (k_BGSD.shape[2] - q_BHTD.shape[2]) % rows
        blocks = pad(q_BHTD, (0, 0, lead, -(lead + q_BHTD.shape[2]) % rows)).unflatten(2, (-1, rows)).sum(3)
        return blocks @ mean.mT                               # a sum for a mean: the order of a row's scores is the same

    def rule(self, score_BHQN: Tensor, visible_Q: Tensor) -> Tensor:
        """`top` blocks of each row, or the budget's share."""
        if not self.top:
            return super().rule(score_BHQN, visible_Q)
        return highest(score_BHQN, visible_Q.clamp_max(self.top)[:, None]) & (score_BHQN > -torch.inf) | (score_BHQN == torch.inf)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        if self.order == "queries" or self._rows(q.shape[2]) > 1 or q.shape[2] == 1 or not q.numel():
            return super()._attend(q, k, v, scale, causal)
        self._shape = (q.shape[1], q.shape[3], k.shape[2], q.shape[2])
        mask = self._chosen(q * (scale * q.shape[3] ** 0.5), k, v, causal)
        self._count(mask, q.shape[2], k.shape[2], causal)
        return by_keys(q, k, v, mask, block=self.block, scale=scale, causal=causal)

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """A product with the mean of each block."""
        return 2 * heads * width * keys / self.block
