"""The k largest of W (x - centre) + b a row, without keeping W x + b: one dense product, one selection, a sparse backward.

Shape letters: N = rows, F = units, K = kept, D = width, M = N * K.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import native, pool
from ..routes import Routes
from ..sparse_decode import bag, scatter_rows
from ..top_k import top_k
from .reference import encode_top_k_reference

__all__ = ["encode_top_k", "encode_top_k_reference"]

ROWS_AT_ONCE = 256
"""Rows of pre-activations that exist at a time on the CPU, small enough to be still in cache when they are selected from."""


def _select(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor, k: int, coarse: bool) -> tuple[Tensor, Tensor]:
    """(values, units), each [N, K]."""
    if x_ND.dtype == torch.float32 and native.serves(x_ND, weight_FD, bias_F):
        from .screen import pays, screened_top_k

        if pays(len(x_ND), len(weight_FD), x_ND.shape[1], k):
            x_ND, weight_FD, bias_F = (t.detach().contiguous() for t in (x_ND, weight_FD, bias_F))
            value_NK, index_NK, done_N = screened_top_k(x_ND, weight_FD, bias_F, k, coarse)
            if not done_N.all():
                value_NK[~done_N], index_NK[~done_N] = _plain(x_ND[~done_N], weight_FD, bias_F, k)
            return value_NK, index_NK
    return _plain(x_ND, weight_FD, bias_F, k)


def _plain(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
    n, units = len(x_ND), len(weight_FD)
    if x_ND.device.type != "cpu" or torch.compiler.is_compiling() or n <= ROWS_AT_ONCE:
        pre_NF = linear(x_ND, weight_FD, bias_F)
        index_NK = top_k(pre_NF, k)
        return pre_NF.gather(-1, index_NK), index_NK
    value_NK, index_NK = x_ND.new_empty(n, k), torch.empty(n, k, dtype=torch.long)
    buffer_CF = pool.empty((ROWS_AT_ONCE, units), x_ND.dtype)
    for start in range(0, n, ROWS_AT_ONCE):
        at = slice(start, start + ROWS_AT_ONCE)
        pre_CF = torch.addmm(bias_F, x_ND[at], weight_FD.T, out=buffer_CF[: len(x_ND[at])])
        index_NK[at] = top_k(pre_CF, k)
        torch.gather(pre_CF, -1, index_NK[at], out=value_NK[at])
    return value_NK, index_NK


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, centre_D, weight_FD, bias_F, k, coarse):  # type: ignore[no-untyped-def]
        x_ND = x_ND if centre_D is None else x_ND - centre_D
        value_NK, index_NK = _select(x_ND, weight_FD, bias_F, k, coarse)
        ctx.routes = Routes.from_index(index_NK, len(weight_FD))
        ctx.save_for_backward(x_ND, weight_FD)
        ctx.mark_non_differentiable(index_NK)
        return value_NK, index_NK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NK, _):  # type: ignore[no-untyped-def]
        (x_ND, weight_FD), needs = ctx.saved_tensors, ctx.needs_input_grad
        grad_M = grad_NK.reshape(-1)
        grad_x = bag(grad_M, ctx.routes, weight_FD) if needs[0] else None
        grad_weight = scatter_rows(grad_M, ctx.routes, x_ND) if needs[2] else None
        grad_bias = grad_M.new_zeros(ctx.routes.units).index_add_(0, ctx.routes.unit_M, grad_M) if needs[1] or needs[3] else None
        grad_centre = -(grad_bias @ weight_FD) if needs[1] else None          # the sum over rows of -grad_x, without grad_x
        return grad_x, grad_centre, grad_weight, grad_bias, None, None


def encode_top_k(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor, k: int, centre_D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(values, units), each [N, K]: the k largest entries of W (x - centre) + b of each row, in no particular order.

    Differentiable in x, W, b and centre through the values; gradients touch chosen units only. Values are inner products in
    the dtype of the tensors, and so is the choice; of equal values the lower unit is chosen. Under autocast to bfloat16 the
    choice is that of a bfloat16 product, where such products are fast, and the values are as before.

    Args:
        centre_D: subtracted from every row; None means 0.
    """
    coarse = torch.is_autocast_enabled(x_ND.device.type) and torch.get_autocast_dtype(x_ND.device.type) == torch.bfloat16
    with torch.autocast(x_ND.device.type, enabled=False):
        return _EncodeTopK.apply(x_ND.to(weight_FD.dtype), centre_D, weight_FD, bias_F, k, coarse)
