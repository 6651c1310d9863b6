"""The definition: scatter the values into a dense [N, F] and multiply."""

from __future__ import annotations

from torch import Tensor

from ..routes import Routes


def sparse_decode_reference(value_M: Tensor, routes: Routes, table_FD: Tensor) -> Tensor:
    """See sparse_decode."""
    dense_NF = value_M.new_zeros(routes.rows, routes.units)
    return dense_NF.index_put((routes.row_M, routes.unit_M), value_M, accumulate=True) @ table_FD
