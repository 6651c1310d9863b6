"""CPU path: kept rows of the transposed weight are read in place, in float32, and summed into one accumulator."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def _kernel() -> Any:
    try:
        import numba
    except ImportError:
        return None

    @numba.njit(cache=True, nogil=True, fastmath={"contract", "reassoc"})
    def run(x, kept, columns, out):  # type: ignore[no-untyped-def]
        for r in range(x.shape[0]):
            for o in range(out.shape[1]):
                out[r, o] = 0.0
            for i in range(x.shape[1]):
                if kept[r, i]:
                    v = x[r, i]
                    for o in range(out.shape[1]):
                        out[r, o] += v * columns[i, o]

    return run


def available(x_NI: Tensor, columns_IO: Tensor) -> bool:
    """Whether this path serves these tensors: float32 on CPU, rows of the weight contiguous, numba installed."""
    return (
        x_NI.device.type == "cpu" and x_NI.dtype == columns_IO.dtype == torch.float32 and columns_IO.is_contiguous()
        and _kernel() is not None
    )


def sparse_rows(x_NI: Tensor, kept_NI: Tensor, columns_IO: Tensor) -> Tensor:
    """[N, O] without bias."""
    out_NO = torch.empty(len(x_NI), columns_IO.shape[1])
    _kernel()(x_NI.detach().contiguous().numpy(), kept_NI.contiguous().numpy(), columns_IO.detach().numpy(), out_NO.numpy())
    return out_NO
