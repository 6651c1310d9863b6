"""The largest of W (x - centre) + b, a row or a batch, without keeping W x + b: one dense product, one selection, a sparse backward.

Shape letters: N = rows, F = units, K = kept units of a row, M = kept pairs, D = width, C = rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from .. import native, pool
from ..routes import Routes
from ..sparse_decode import bag, pair_products, scatter_rows
from ..top_k import top_k
from .reference import encode_batch_top_k_reference, encode_group_max_reference, encode_top_k_reference

__all__ = [
    "encode_batch_top_k", "encode_batch_top_k_reference", "encode_group_max", "encode_group_max_reference", "encode_pairs",
    "encode_top_k", "encode_top_k_reference",
]

BYTES_AT_ONCE = 1 << 30
"""Pre-activations that exist at a time elsewhere, so that a wide dictionary's batch need not fit a device's memory beside it."""
ROWS_AT_ONCE = 256
"""Rows of pre-activations that exist at a time on the CPU, small enough to be still in cache when they are selected from."""


def _screened(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor, k: int, coarse: bool, absolute: bool) -> tuple[Tensor, Tensor]:
    """(values, units), each [N, K]."""
    if x_ND.dtype == torch.float32 and native.serves(x_ND, weight_FD, bias_F):
        from .screen import pays, screened_top_k

        if pays(len(x_ND), len(weight_FD), x_ND.shape[1], k):
            x_ND, weight_FD, bias_F = (t.detach().contiguous() for t in (x_ND, weight_FD, bias_F))
            value_NK, index_NK, done_N = screened_top_k(x_ND, weight_FD, bias_F, k, coarse, absolute)
            if not done_N.all():
                value_NK[~done_N], index_NK[~done_N] = _plain(x_ND[~done_N], weight_FD, bias_F, k, absolute)
            return value_NK, index_NK
    return _plain(x_ND, weight_FD, bias_F, k, absolute)


def _in_chunks(x_ND: Tensor) -> bool:
    return x_ND.device.type == "cpu" and not torch.compiler.is_compiling() and len(x_ND) > ROWS_AT_ONCE


def _plain(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor, k: int, absolute: bool) -> tuple[Tensor, Tensor]:
    if not absolute:
        return _from_products(x_ND, weight_FD, bias_F, k, lambda pre_CF: top_k(pre_CF, k))
    # Sizes lie beside the products, whose signs are still needed.
    chunk = pool.empty((ROWS_AT_ONCE, len(weight_FD)), x_ND.dtype) if _in_chunks(x_ND) else None
    return _from_products(x_ND, weight_FD, bias_F, k, lambda pre_CF: top_k(torch.abs(pre_CF, out=None if chunk is None else chunk[: len(pre_CF)]), k))


def _largest_of_groups(pre_NF: Tensor, groups: int) -> Tensor:
    """[N, G] units; torch.max takes the first of equals."""
    inside_NG = pre_NF.unflatten(-1, (groups, -1)).max(-1).indices
    return inside_NG + torch.arange(groups, device=pre_NF.device) * (pre_NF.shape[-1] // groups)


def _from_products(
    x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor, k: int, choose: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """(values, units), each [N, K], the units being those that `choose` takes of all products of some rows."""
    if not _in_chunks(x_ND):
        rows = max(1, BYTES_AT_ONCE // (len(weight_FD) * x_ND.element_size()))
        if len(x_ND) > rows and not torch.compiler.is_compiling():
            parts = [_from_products(x_CD, weight_FD, bias_F, k, choose) for x_CD in x_ND.split(rows)]
            return torch.cat([value for value, _ in parts]), torch.cat([index for _, index in parts])
        pre_NF = linear(x_ND, weight_FD, bias_F)
        index_NK = choose(pre_NF)
        return pre_NF.gather(-1, index_NK), index_NK
    value_NK, index_NK = x_ND.new_empty(len(x_ND), k), torch.empty(len(x_ND), k, dtype=torch.long)
    buffer_CF = pool.empty((ROWS_AT_ONCE, len(weight_FD)), x_ND.dtype)
    for value_CK, index_CK, x_CD in zip(value_NK.split(ROWS_AT_ONCE), index_NK.split(ROWS_AT_ONCE), x_ND.split(ROWS_AT_ONCE), strict=True):
        pre_CF = torch.addmm(bias_F, x_CD, weight_FD.T, out=buffer_CF[: len(x_CD)])
        index_CK.copy_(choose(pre_CF))
        torch.gather(pre_CF, -1, index_CK, out=value_CK)
    return value_NK, index_NK


def _whole_batch(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """(values [M], units [M], edges [N + 1]): those of the `keep` largest of the batch that are positive."""
    n, units = len(x_ND), len(weight_FD)
    if _in_chunks(x_ND):
        pre_NF = pool.empty((n, units), x_ND.dtype)
        for x_CD, pre_CF in zip(x_ND.split(ROWS_AT_ONCE), pre_NF.split(ROWS_AT_ONCE), strict=True):
            torch.addmm(bias_F, x_CD, weight_FD.T, out=pre_CF)
    else:
        pre_NF = linear(x_ND, weight_FD, bias_F)
    flat = pre_NF.reshape(-1)
    at_M = top_k(flat[None], keep)[0].sort().values if keep else torch.zeros(0, dtype=torch.long, device=x_ND.device)
    at_M = at_M[flat[at_M] > 0]
    count_N = torch.bincount(at_M // units, minlength=n)
    return flat[at_M], at_M % units, pad(count_N.cumsum(0), (1, 0))


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, centre_D, weight_FD, bias_F, select):  # type: ignore[no-untyped-def]
        if centre_D is not None:
            out = pool.empty(tuple(x_ND.shape), x_ND.dtype) if _in_chunks(x_ND) and x_ND.dtype == centre_D.dtype else None
            x_ND = torch.sub(x_ND, centre_D, out=out)
        value, unit, edges_N1 = select(x_ND, weight_FD, bias_F)
        ctx.routes = Routes.from_index(unit, len(weight_FD)) if edges_N1 is None else Routes(unit, edges_N1, len(weight_FD))
        ctx.save_for_backward(x_ND, weight_FD)
        ctx.mark_non_differentiable(unit, *([] if edges_N1 is None else [edges_N1]))
        return value, unit, edges_N1

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
        (x_ND, weight_FD), needs = ctx.saved_tensors, ctx.needs_input_grad
        grad_M = grad.reshape(-1)
        grad_x = bag(grad_M, ctx.routes, weight_FD) if needs[0] else None
        grad_weight = scatter_rows(grad_M, ctx.routes, x_ND) if needs[2] else None
        grad_bias = grad_M.new_zeros(ctx.routes.units).index_add_(0, ctx.routes.unit_M, grad_M) if needs[1] or needs[3] else None
        grad_centre = -(grad_bias @ weight_FD) if needs[1] else None          # the sum over rows of -grad_x, without grad_x
        return grad_x, grad_centre, grad_weight, grad_bias, None


def _encode(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor, centre_D: Tensor | None, select: Callable) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(x_ND.device.type, enabled=False):
        return _Encode.apply(x_ND.to(weight_FD.dtype), centre_D, weight_FD, bias_F, select)


def encode_top_k(
    x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor, k: int, centre_D: Tensor | None = None, *, absolute: bool = False,
) -> tuple[Tensor, Tensor]:
    """(values, units), each [N, K]: the k largest entries of W (x - centre) + b of each row, in no particular order.

    Differentiable in x, W, b and centre through the values; gradients touch chosen units only. Values are inner products in
    the dtype of the tensors, and so is the choice; of equal values the lower unit is chosen. Under autocast to bfloat16 the
    choice is that of a bfloat16 product, where such products are fast, and the values are as before.

    Args:
        centre_D: subtracted from every row; None means 0. absolute: the k largest in absolute value; values keep their sign.
    """
    kind = x_ND.device.type
    coarse = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
    return _encode(x_ND, weight_FD, bias_F, centre_D, lambda x, w, b: (*_screened(x, w, b, k, coarse, absolute), None))[:2]


def encode_group_max(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor, groups: int, centre_D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(values, units), each [N, G]: the largest entry of W (x - centre) + b in each of G runs of F / G units.

    Differentiable as encode_top_k; of equal values the lower unit is chosen.

    Args:
        groups: G, a divisor of F. centre_D: subtracted from every row; None means 0.
    """
    def select(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_from_products(x, w, b, groups, lambda pre_NF: _largest_of_groups(pre_NF, groups)), None

    return _encode(x_ND, weight_FD, bias_F, centre_D, select)[:2]


def encode_batch_top_k(
    x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor, keep: int, centre_D: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The `keep` largest entries of W (x - centre) + b of the whole batch, less those that are not positive.

    Returns values [M] and their units [M], rows one after another, and edges [N + 1]: the pairs of row n are
    edges[n] .. edges[n + 1]. Of equal values the one in the earlier row, then of the lower unit, is chosen. Differentiable
    as encode_top_k.

    Args:
        keep: in 0..N * F. centre_D: subtracted from every row; None means 0.
    """
    return _encode(x_ND, weight_FD, bias_F, centre_D, lambda x, w, b: _whole_batch(x, w, b, keep))


def encode_chosen(
    x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor, choose: Callable[[Tensor], Tensor], centre_D: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As encode_batch_top_k, of the entries that a rule of any kind keeps.

    Args:
        choose: W (x - centre) + b [N, F] -> mask [N, F]; called once, without gradients.
    """
    def select(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pre_NF = linear(x_ND, weight_FD, bias_F)
        mask_NF = choose(pre_NF)
        return pre_NF[mask_NF], mask_NF.nonzero()[:, 1], pad(mask_NF.sum(-1).cumsum(0), (1, 0))

    return _encode(x_ND, weight_FD, bias_F, centre_D, select)


def encode_pairs(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor, unit_M: Tensor, edges_N1: Tensor) -> Tensor:
    """[M] entries of W x + b at pairs chosen beforehand, differentiable as encode_top_k; no other entry is computed.

    Args:
        unit_M: int64 unit of each pair. edges_N1: the pairs of row n are edges[n] .. edges[n + 1].
    """

    def there(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value_M = pair_products(x_ND.contiguous(), Routes(unit_M, edges_N1, len(weight_FD)), weight_FD.contiguous())
        return value_M + bias_F[unit_M], unit_M.clone(), edges_N1.clone()

    return _encode(x_ND, weight_FD, bias_F, None, there)[0]
