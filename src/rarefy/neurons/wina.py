"""WINA (Chen et al. 2025, arXiv 2505.19427): score input i by |x_i| * ||W_:,i||_2 and keep the top K (eq. 4)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..selection import Selection, kept, top_k
from .linear import InputSparseLinear


class Wina(InputSparseLinear):
    """Keep the inputs with the largest share in the output's norm, bounding the error where columns are near orthogonal."""

    name = "neurons/wina"

    def select(self, x: Tensor) -> Selection:
        """Top K of |x_i| * ||W_:,i||; the weight of the selection is x itself."""
        norm_I = self.columns_IO.detach().float().norm(dim=-1)
        chosen = top_k(x.detach().abs().float() * norm_I, kept(self._budget, self.d_in))
        assert chosen.index is not None
        return replace(chosen, weight=x.gather(-1, chosen.index))
