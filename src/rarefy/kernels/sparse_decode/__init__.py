"""y_n = begin + sum over kept pairs of value * table row, forward and backward proportional to what is kept.

Shape letters: N = rows, M = kept pairs, F = units, D = width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .. import gpu, native, pool
from ..routes import Routes
from .reference import sparse_decode_reference

__all__ = ["bag", "pair_products", "rows_of", "scatter_rows", "sparse_decode", "sparse_decode_reference"]


def bag(value_M: Tensor, routes: Routes, table_FD: Tensor, begin_D: Tensor | None = None) -> Tensor:
    """[N, D] weighted sums of table rows, each row read where it lies, begun at `begin_D`."""
    return _sums(value_M, routes.unit_M, routes.edges_N1, table_FD, begin_D)


def scatter_rows(value_M: Tensor, routes: Routes, row_ND: Tensor) -> Tensor:
    """[F, D]: for each unit the weighted sum of the rows that use it, units taken in order so that each is written once."""
    return _sums(value_M[routes.order_M], routes.sorted_row_M, routes.edges_F1, row_ND, None)


def _sums(value_M: Tensor, index_M: Tensor, edges_N1: Tensor, table_FD: Tensor, begin_D: Tensor | None) -> Tensor:
    n, width = len(edges_N1) - 1, table_FD.shape[1]
    if gpu.serves(value_M, table_FD):
        from .triton import weighted_sums as sums_on_gpu

        return sums_on_gpu(value_M, index_M, edges_N1, table_FD, begin_D)
    if native.serves(value_M, table_FD):
        from .cpu import weighted_sums

        out_ND = pool.empty((n, width), table_FD.dtype)
        begin = table_FD.new_zeros(width) if begin_D is None else begin_D.to(table_FD.dtype)
        native.spread(weighted_sums, n, *map(native.array, (value_M, index_M, edges_N1, table_FD, begin)), out_ND.numpy())
        return out_ND
    if not len(index_M):
        out_ND = table_FD.new_zeros(n, width)
    else:
        out_ND = embedding_bag(index_M, table_FD.contiguous(), edges_N1[:-1], mode="sum", per_sample_weights=value_M.contiguous())
    return out_ND if begin_D is None else out_ND + begin_D


def pair_products(row_ND: Tensor, routes: Routes, table_FD: Tensor) -> Tensor:
    """[M] inner product of each pair's row and table row."""
    if gpu.serves(row_ND, table_FD):
        from .triton import products as products_on_gpu

        return products_on_gpu(row_ND, routes.unit_M, routes.edges_N1, table_FD)
    if native.serves(row_ND, table_FD):
        from .cpu import products

        out_M = torch.empty(len(routes.unit_M), dtype=row_ND.dtype)
        given = map(native.array, (row_ND, routes.unit_M, routes.edges_N1, table_FD))
        native.spread(products, routes.rows, *given, out_M.numpy())
        return out_M
    return (row_ND[routes.row_M] * table_FD[routes.unit_M]).sum(-1)


def _both(value_M: Tensor, routes: Routes, grad_ND: Tensor, table_FD: Tensor) -> tuple[Tensor, Tensor]:
    """(pair_products(grad), scatter_rows(grad)); compiled loops read the gradient once for both."""
    if gpu.serves(value_M, grad_ND, table_FD) or not native.serves(value_M, grad_ND, table_FD):
        return pair_products(grad_ND, routes, table_FD), scatter_rows(value_M, routes, grad_ND)
    from .cpu import both_gradients

    grad_M, grad_FD = torch.empty_like(value_M), pool.empty(tuple(table_FD.shape), table_FD.dtype)
    given = map(native.array, (value_M, routes.order_M, routes.sorted_row_M, routes.edges_F1, grad_ND, table_FD))
    native.spread(both_gradients, routes.units, *given, grad_M.numpy(), grad_FD.numpy())
    return grad_M, grad_FD


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value_M, table_FD, begin_D, routes):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(value_M, table_FD)
        ctx.routes = routes
        return bag(value_M, routes, table_FD, begin_D)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_ND):  # type: ignore[no-untyped-def]
        (value_M, table_FD), needs = ctx.saved_tensors, ctx.needs_input_grad
        grad_M = grad_FD = None
        if needs[0] and needs[1]:
            grad_M, grad_FD = _both(value_M, ctx.routes, grad_ND, table_FD)
        elif needs[0]:
            grad_M = pair_products(grad_ND, ctx.routes, table_FD)
        elif needs[1]:
            grad_FD = scatter_rows(value_M, ctx.routes, grad_ND)
        return grad_M, grad_FD, grad_ND.sum(0) if needs[2] else None, None


def sparse_decode(value_M: Tensor, routes: Routes, table_FD: Tensor, begin_D: Tensor | None = None) -> Tensor:
    """[N, D] = begin_D + sum over each row's pairs of value_M * table_FD[unit], differentiable in values, table and begin.

    Args:
        begin_D: what every row starts from; None means 0.
    """
    return _Decode.apply(value_M.to(table_FD.dtype), table_FD, begin_D, routes)      # autocast gives values in half precision


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table_FD, index_G):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index_G)
        ctx.shape = tuple(table_FD.shape)
        return table_FD.index_select(0, index_G)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_GD):  # type: ignore[no-untyped-def]
        grad_FD = pool.zeros(ctx.shape, grad_GD)
        return grad_FD.index_copy_(0, ctx.saved_tensors[0], grad_GD), None


def rows_of(table_FD: Tensor, index_G: Tensor) -> Tensor:
    """[G, D] the rows of a table at distinct indices; the gradient's [F, D] is memory that is used again."""
    return _Rows.apply(table_FD, index_G)
