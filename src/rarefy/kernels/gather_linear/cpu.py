"""CPU path: kept rows of the transposed weight are read in place, four at a time, and summed tile by tile.

bfloat16 travels as its 16 bits, widened to float32 by a shift, and sums in float32.

Shape letters: N = rows, I = inputs, O = outputs, K = kept inputs of a row.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ... import compiled

TILE = 2048
"""Outputs summed at a time: 8 KiB of sums stay in the first-level cache while the weight streams by."""
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@cache
def _kernels() -> tuple[Any, Any] | None:
    """(float32 and float64, bfloat16 as bits), or None without numba."""
    if not compiled.available():
        return None
    import numba
    import numpy as np

    math = {"contract", "reassoc", "nsz"}

    @compiled.loop(fastmath=math)
    def plain(x, index, columns, out, tile):  # type: ignore[no-untyped-def]
        kept = len(index)
        for start in range(0, len(out), tile):
            stop = min(len(out), start + tile)
            total = out[start:stop]
            k = 0
            while k + 4 <= kept:                   # the sums are loaded and stored once for four rows
                a, b, c, d = x[k], x[k + 1], x[k + 2], x[k + 3]
                p, q = columns[index[k], start:stop], columns[index[k + 1], start:stop]
                r, s = columns[index[k + 2], start:stop], columns[index[k + 3], start:stop]
                for o in range(len(total)):
                    total[o] += a * p[o] + b * q[o] + c * r[o] + d * s[o]
                k += 4
            while k < kept:
                a, p = x[k], columns[index[k], start:stop]
                for o in range(len(total)):
                    total[o] += a * p[o]
                k += 1

    @numba.njit(inline="always")
    def wide(bits):  # type: ignore[no-untyped-def]
        return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)

    @numba.njit(nogil=True, fastmath=math)
    def half(x, index, columns, out, tile):  # type: ignore[no-untyped-def]
        kept = len(index)
        for start in range(0, len(out), tile):
            stop = min(len(out), start + tile)
            total = out[start:stop]
            k = 0
            while k + 4 <= kept:
                a, b, c, d = x[k], x[k + 1], x[k + 2], x[k + 3]
                p, q = columns[index[k], start:stop], columns[index[k + 1], start:stop]
                r, s = columns[index[k + 2], start:stop], columns[index[k + 3], start:stop]
                for o in range(len(total)):
                    total[o] += a * wide(p[o]) + b * wide(q[o]) + c * wide(r[o]) + d * wide(s[o])
                k += 4
            while k < kept:
                a, p = x[k], columns[index[k], start:stop]
                for o in range(len(total)):
                    total[o] += a * wide(p[o])
                k += 1

    return plain, half


def available(x_NI: Tensor, columns_IO: Tensor) -> bool:
    """Whether this path serves these tensors: on the CPU, one of DTYPES, rows of the weight contiguous, numba installed."""
    return (
        x_NI.device.type == "cpu" and x_NI.dtype == columns_IO.dtype and x_NI.dtype in DTYPES
        and columns_IO.stride(1) == 1 and _kernels() is not None
    )


def sparse_row(x_I: Tensor, index_K: Tensor, columns_IO: Tensor, bias_O: Tensor | None) -> Tensor:
    """[O] for one row and its kept inputs, without gradients."""
    kernels = _kernels()
    assert kernels is not None
    is_half = x_I.dtype == torch.bfloat16
    sums = torch.float32 if is_half else x_I.dtype
    out_O = torch.zeros(columns_IO.shape[1], dtype=sums) if bias_O is None else bias_O.detach().to(sums, copy=True).contiguous()
    columns = columns_IO.detach()
    columns = columns.view(torch.uint16).numpy() if is_half else columns.numpy()
    x_K = x_I.detach().index_select(0, index_K).to(sums).numpy()
    kernels[is_half](x_K, index_K.numpy(), columns, out_O.numpy(), TILE)
    return out_O.to(x_I.dtype)
