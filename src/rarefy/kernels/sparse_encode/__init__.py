"""The k largest of W x + b a row, without keeping W x + b: one dense product, one selection, a sparse backward.

Shape letters: N = rows, F = units, K = kept, D = width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..routes import Routes
from ..sparse_decode import bag, scatter_rows
from .reference import encode_top_k_reference

__all__ = ["encode_top_k", "encode_top_k_reference"]

ROWS_AT_ONCE = 512
"""Rows of pre-activations that exist at a time: the buffer is used again for each chunk and each step, since mapping
fresh pages for a [2048, F] temporary costs as much as filling it."""
_buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def _buffer(rows: int, units: int, like: Tensor) -> Tensor:
    key = (like.device, like.dtype)
    held = _buffers.get(key)
    if held is None or held.numel() < rows * units:
        held = _buffers[key] = torch.empty(rows * units, device=like.device, dtype=like.dtype)
    return held[: rows * units].view(rows, units)


def _select(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
    n, units = len(x_ND), len(weight_FD)
    value_NK = x_ND.new_empty(n, k)
    index_NK = torch.empty(n, k, dtype=torch.long, device=x_ND.device)
    for start in range(0, n, ROWS_AT_ONCE):
        rows = slice(start, min(n, start + ROWS_AT_ONCE))
        pre = torch.addmm(bias_F, x_ND[rows], weight_FD.T, out=_buffer(rows.stop - start, units, x_ND))
        torch.topk(pre, k, dim=-1, sorted=False, out=(value_NK[rows], index_NK[rows]))
    return value_NK, index_NK


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, weight_FD, bias_F, k):  # type: ignore[no-untyped-def]
        value_NK, index_NK = _select(x_ND, weight_FD, bias_F, k)
        ctx.routes = Routes.from_index(index_NK, len(weight_FD))
        ctx.save_for_backward(x_ND, weight_FD)
        ctx.mark_non_differentiable(index_NK)
        return value_NK, index_NK

    @staticmethod
    def backward(ctx, grad_NK, _):  # type: ignore[no-untyped-def]
        x_ND, weight_FD = ctx.saved_tensors
        grad_M = grad_NK.reshape(-1)
        grad_x = bag(grad_M, ctx.routes, weight_FD) if ctx.needs_input_grad[0] else None
        grad_weight = scatter_rows(grad_M, ctx.routes, x_ND) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros(ctx.routes.units, dtype=grad_M.dtype, device=grad_M.device).index_add_(0, ctx.routes.unit_M, grad_M)
        return grad_x, grad_weight, grad_bias if ctx.needs_input_grad[2] else None, None


def encode_top_k(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, units), each [N, K]: the k largest entries of x W^T + b of each row, in no particular order.

    Differentiable in x, W and b through the values; gradients touch chosen units only.
    """
    return _EncodeTopK.apply(x_ND, weight_FD, bias_F, k)
