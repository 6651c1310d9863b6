"""Baseline: key blocks kept at random.

Shape letters as in block.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.block_attention import blocks_of
from .block import BlockAttention
from .lottery import drawn


class RandomBlocks(BlockAttention):
    """A fixed lottery over (query position, key block), the same in prefill and decoding; the own block always wins."""

    name = "attention/random"

    def __init__(self, budget: float = 0.25, block: int = 16, query_block: int = 1, seed: int = 0) -> None:
        super().__init__(budget, block, query_block)
        self.seed = seed

    def scores(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> Tensor:
        """A hash of query block, key block, head and seed, in [0, 1)."""
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        Q, N = blocks_of(T, S, self.block, rows)
        row_Q = torch.arange((S - T) // rows, (S - T) // rows + Q, device=q_BHTD.device)
        col_N = torch.arange(N, device=q_BHTD.device)
        head_H = torch.arange(q_BHTD.shape[1], device=q_BHTD.device)
        return drawn(row_Q[:, None], col_N, head_H[:, None, None], self.seed).float().expand(q_BHTD.shape[0], -1, -1, -1)
