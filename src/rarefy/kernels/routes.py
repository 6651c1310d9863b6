"""Which rows use which units, in both directions, worked out once for every kernel that needs it.

Shape letters: N = rows, M = kept (row, unit) pairs, F = units.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Routes:
    """Pairs in row order: unit_M with offsets_N where each row starts; and sorted by unit when that is asked for.

    Args:
        unit_M: int64 unit of each pair, rows one after another.
        offsets_N: int64 start of each row's pairs.
        units: F.
    """

    def __init__(self, unit_M: Tensor, offsets_N: Tensor, units: int) -> None:
        self.unit_M, self.offsets_N, self.units = unit_M, offsets_N, units

    @classmethod
    def from_index(cls, index_NK: Tensor, units: int) -> Routes:
        """The same number K of units in every row."""
        n, k = index_NK.shape
        return cls(index_NK.reshape(-1), torch.arange(0, n * k, k, device=index_NK.device) if k else torch.zeros(n, dtype=torch.long), units)

    @classmethod
    def from_mask(cls, mask_NF: Tensor) -> Routes:
        """Any number of units a row."""
        count_N = mask_NF.sum(-1)
        return cls(mask_NF.nonzero()[:, 1], count_N.cumsum(0) - count_N, mask_NF.shape[1])

    @cached_property
    def row_M(self) -> Tensor:
        """Row of each pair."""
        ends = torch.cat([self.offsets_N[1:], self.offsets_N.new_tensor([len(self.unit_M)])])
        return torch.repeat_interleave(torch.arange(len(self.offsets_N), device=self.unit_M.device), ends - self.offsets_N)

    @cached_property
    def order_M(self) -> Tensor:
        """Pairs sorted by unit."""
        return self.unit_M.argsort()

    @cached_property
    def starts_F(self) -> Tensor:
        """Where each unit's pairs start in `order_M`."""
        count_F = torch.bincount(self.unit_M, minlength=self.units)
        return count_F.cumsum(0) - count_F

    @cached_property
    def sorted_row_M(self) -> Tensor:
        """Row of each pair in unit order."""
        return self.row_M[self.order_M]
