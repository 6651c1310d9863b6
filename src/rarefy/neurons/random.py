"""Baseline: inputs kept at random, the same ones for every row."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadInput
from ..selection import Selection, kept
from .linear import InputSparseLinear


class RandomNeurons(InputSparseLinear):
    """Keep a fixed set of inputs, drawn evenly by `seed`."""

    name = "neurons/random"

    index_K: Tensor

    def __init__(self, d_in: int, d_out: int, budget: float = 0.5, bias: bool = True, seed: int = 0) -> None:
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise BadInput(f"seed={seed!r} must be a whole number in 0..2**63 - 1")
        super().__init__(d_in, d_out, budget, bias)
        lottery_I = torch.rand(d_in, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("index_K", lottery_I.argsort(stable=True)[: kept(budget, d_in)])

    def select(self, x: Tensor) -> Selection:
        """The fixed set, for each row."""
        index = self.index_K.expand(*x.shape[:-1], -1)
        return Selection(self.d_in, x.gather(-1, index), index=index)
