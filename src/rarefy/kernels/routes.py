"""Which rows use which units, in both directions, worked out once for every kernel that needs it.

Shape letters: N = rows, M = kept (row, unit) pairs, F = units, K = kept units of a row.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from . import native


class Routes:
    """Pairs in row order, each row's one after another; and sorted by unit when that is asked for.

    Args:
        unit_M: int64 unit of each pair.
        edges_N1: int64 [N + 1], the pairs of row n are edges_N1[n] .. edges_N1[n + 1].
        units: F.
    """

    def __init__(self, unit_M: Tensor, edges_N1: Tensor, units: int) -> None:
        self.unit_M, self.edges_N1, self.units = unit_M, edges_N1, units

    @classmethod
    def from_index(cls, index_NK: Tensor, units: int) -> Routes:
        """The same number K of units in every row."""
        n, k = index_NK.shape
        return cls(index_NK.reshape(-1), torch.arange(n + 1, device=index_NK.device) * k, units)

    @classmethod
    def from_mask(cls, mask_NF: Tensor) -> Routes:
        """Any number of units a row."""
        ends_N = mask_NF.sum(-1).cumsum(0)
        return cls(mask_NF.nonzero()[:, 1], torch.nn.functional.pad(ends_N, (1, 0)), mask_NF.shape[1])

    @property
    def rows(self) -> int:
        """N."""
        return len(self.edges_N1) - 1

    @cached_property
    def row_M(self) -> Tensor:
        """Row of each pair."""
        at_N = torch.arange(self.rows, device=self.unit_M.device)
        return torch.repeat_interleave(at_N, self.edges_N1.diff(), output_size=len(self.unit_M))

    @cached_property
    def _by_unit(self) -> tuple[Tensor, Tensor, Tensor]:
        if native.serves(self.unit_M, self.edges_N1, dtypes=(torch.long,)):
            from .sparse_decode.cpu import sort_by_unit

            unit_M, edges_N1 = native.array(self.unit_M), native.array(self.edges_N1)
            order_M, row_M = torch.empty(len(unit_M), dtype=torch.long), torch.empty(len(unit_M), dtype=torch.long)
            edges_F1 = torch.zeros(self.units + 1, dtype=torch.long)
            sort_by_unit(unit_M, edges_N1[:-1], edges_N1[1:], order_M.numpy(), row_M.numpy(), edges_F1.numpy())
            return order_M, row_M, edges_F1
        order_M = self.unit_M.argsort(stable=True)
        count_F = torch.bincount(self.unit_M, minlength=self.units)
        return order_M, self.row_M[order_M], torch.nn.functional.pad(count_F.cumsum(0), (1, 0))

    @property
    def order_M(self) -> Tensor:
        """Pairs sorted by unit, those of a unit by row."""
        return self._by_unit[0]

    @property
    def sorted_row_M(self) -> Tensor:
        """Row of each pair in that order."""
        return self._by_unit[1]

    @property
    def edges_F1(self) -> Tensor:
        """[F + 1], the pairs of unit f are order_M[edges_F1[f] : edges_F1[f + 1]]."""
        return self._by_unit[2]
