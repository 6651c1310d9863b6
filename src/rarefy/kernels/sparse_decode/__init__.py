"""y_n = sum over kept pairs of value * table row, forward and backward proportional to what is kept.

Shape letters: N = rows, M = kept pairs, F = units, D = width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..routes import Routes
from .reference import sparse_decode_reference

__all__ = ["bag", "pair_products", "scatter_rows", "sparse_decode", "sparse_decode_reference"]


def bag(value_M: Tensor, routes: Routes, table_FD: Tensor) -> Tensor:
    """[N, D] weighted sums of table rows, each row read where it lies."""
    if not len(routes.unit_M):
        return table_FD.new_zeros(len(routes.offsets_N), table_FD.shape[1])
    return embedding_bag(routes.unit_M, table_FD, routes.offsets_N, mode="sum", per_sample_weights=value_M)


def pair_products(row_ND: Tensor, routes: Routes, table_FD: Tensor) -> Tensor:
    """[M] inner product of each pair's row and table row."""
    if not len(routes.unit_M):
        return row_ND.new_zeros(0)
    if row_ND.dtype in (torch.float32, torch.float64) and row_ND.device.type == "cpu":
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            row_ND.contiguous(), table_FD.contiguous(), routes.unit_M, routes.offsets_N, routes.row_M, 0
        )
    return (row_ND[routes.row_M] * table_FD[routes.unit_M]).sum(-1)


def scatter_rows(value_M: Tensor, routes: Routes, row_ND: Tensor) -> Tensor:
    """[F, D]: for each unit the weighted sum of the rows that use it, units taken in sorted order so that each is written once."""
    if not len(routes.unit_M):
        return row_ND.new_zeros(routes.units, row_ND.shape[1])
    return embedding_bag(
        routes.sorted_row_M, row_ND.contiguous(), routes.starts_F, mode="sum", per_sample_weights=value_M[routes.order_M].contiguous()
    )


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value_M, table_FD, routes):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(value_M, table_FD)
        ctx.routes = routes
        return bag(value_M, routes, table_FD)

    @staticmethod
    def backward(ctx, grad_ND):  # type: ignore[no-untyped-def]
        value_M, table_FD = ctx.saved_tensors
        grad_value = pair_products(grad_ND, ctx.routes, table_FD) if ctx.needs_input_grad[0] else None
        grad_table = scatter_rows(value_M, ctx.routes, grad_ND) if ctx.needs_input_grad[1] else None
        return grad_value, grad_table, None


def sparse_decode(value_M: Tensor, routes: Routes, table_FD: Tensor) -> Tensor:
    """[N, D] = sum over each row's pairs of value_M * table_FD[unit], differentiable in values and table."""
    return _Decode.apply(value_M.to(table_FD.dtype), table_FD, routes)      # autocast gives values in half precision
