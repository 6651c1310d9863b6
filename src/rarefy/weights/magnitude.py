"""Magnitude pruning (Han et al. 2015, arXiv 1506.02626): score = |W|."""

from __future__ import annotations

from torch import Tensor

from .linear import MaskedLinear


class Magnitude(MaskedLinear):
    """Keep the largest weights of each output (or of the whole layer with group="layer", as in the paper)."""

    name = "weights/magnitude"

    def __init__(self, d_in: int, d_out: int, budget: float = 0.5, n: int = 0, m: int = 0, bias: bool = True, group: str = "row") -> None:
        super().__init__(d_in, d_out, budget, n, m, bias, group)

    def scores(self) -> Tensor:
        """[O, I] |W|."""
        return self.weight_OI.detach().abs().float()
