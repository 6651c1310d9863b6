"""Magnitude pruning (Han et al. 2015, arXiv 1506.02626): score = |W|."""

from __future__ import annotations

from torch import Tensor

from .linear import MaskedLinear


class Magnitude(MaskedLinear):
    """Keep the largest weights of each output (or of the whole layer with group="layer", as in the paper)."""

    name = "weights/magnitude"

    def scores(self) -> Tensor:
        """[O, I] |W|."""
        return self.weight_OI.detach().abs().float()
