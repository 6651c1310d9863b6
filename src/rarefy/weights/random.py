"""Baseline: weights kept at random."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadInput
from .linear import MaskedLinear


class RandomWeights(MaskedLinear):
    """Keep weights drawn evenly, by `seed`."""

    name = "weights/random"

    def __init__(self, d_in: int, d_out: int, budget: float = 0.5, n: int = 0, m: int = 0, bias: bool = True, group: str = "row",
                 seed: int = 0) -> None:
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise BadInput(f"seed={seed!r} must be a whole number in 0..2**63 - 1")
        super().__init__(d_in, d_out, budget, n, m, bias, group)
        self.seed = seed

    def scores(self) -> Tensor:
        """[O, I] lottery numbers."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(self.d_out, self.d_in, generator=generator).to(self.weight_OI.device)
