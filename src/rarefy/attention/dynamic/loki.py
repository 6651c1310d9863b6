"""Loki (Singhania et al. 2024, arXiv 2406.02542): keys lie near few directions, which suffice to rank them.

Offline, the principal components of each head's keys. Queries and keys are turned into that basis, which leaves products as they are;
the first d components give approximate scores of all keys, and the best are attended to exactly.

Shape letters as in scores.py; R = components kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...method import fraction
from ...selection import kept
from ..heads import per_head
from .ranked import Ranked


class Loki(Ranked):
    """Top keys by q . k over principal components of the keys, as they are after rotation by position.

    Args:
        budget: fraction of the keys that a query can see.
        rank: fraction of components that score.
    """

    name = "attention/loki"
    basis_GDD: Tensor

    def __init__(self, budget: float = 0.25, rank: float = 0.25) -> None:
        super().__init__(budget, 1, 1)
        self.rank = fraction("rank", rank)

    def shapes(self, H: int, G: int, D: int) -> Mapping[str, tuple[int, ...]]:
        """basis_GDD: components in columns, that of the largest variance first."""
        return {"basis_GDD": (G, D, D)}

    def gather(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Mapping[str, Tensor]:
        """Moments of the keys."""
        k_GXD = k_BGSD.double().transpose(0, 1).flatten(1, 2)
        return {"square": k_GXD.mT @ k_GXD, "sum": k_GXD.sum(1), "count": k_GXD.new_tensor(k_GXD.shape[1])}

    def settle(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Eigenvectors of the covariance, each with its largest entry positive."""
        mean_GD = sums["sum"] / sums["count"]
        basis = torch.linalg.eigh(sums["square"] / sums["count"] - mean_GD[:, :, None] * mean_GD[:, None]).eigenvectors.flip(-1)
        return {"basis_GDD": basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()}

    def _first(self, D: int) -> Tensor:
        return self.basis_GDD[..., : kept(self.rank, D)]

    def describe(self, k_BGSD: Tensor) -> Tensor:
        """[B, G, S, R] first components of each key."""
        return k_BGSD @ self._first(k_BGSD.shape[-1]).to(k_BGSD.dtype)

    def low(self, q_BHTD: Tensor) -> Tensor:
        """First components of the queries, in the basis of the keys they meet."""
        return q_BHTD @ per_head(self._first(q_BHTD.shape[-1])[None], q_BHTD.shape[1])[0].to(q_BHTD.dtype)

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """A product over the components kept, and the turn of the query."""
        return 2 * heads * kept(self.rank, width) * (keys + width)
