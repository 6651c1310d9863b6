"""y = W (x * kept) + b, reading only the columns of W whose input is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import BadInput
from .cpu import available, sparse_rows
from .reference import gather_linear_reference

FEW_ROWS = 4
"""Up to this many rows the columns are gathered row by row; above it each weight serves many rows and a dense product wins."""

__all__ = ["gather_linear", "gather_linear_reference"]


def gather_linear(x_NI: Tensor, kept_NI: Tensor, columns_IO: Tensor, bias_O: Tensor | None) -> Tensor:
    """[N, O] from rows [N, I], their kept inputs [N, I] bool and the transposed weight [I, O].

    Few rows without gradients read only the kept rows of `columns_IO`: in place with numba on CPU, else by a torch
    gather. Many rows, or a call that needs gradients, use one masked dense product.
    """
    if x_NI.shape != kept_NI.shape or columns_IO.shape[0] != x_NI.shape[-1]:
        raise BadInput(f"shapes {list(x_NI.shape)}, {list(kept_NI.shape)} and {list(columns_IO.shape)} do not fit together")
    grad = torch.is_grad_enabled() and (x_NI.requires_grad or columns_IO.requires_grad)
    if len(x_NI) == 0 or len(x_NI) > FEW_ROWS or grad or torch.compiler.is_compiling():
        return gather_linear_reference(x_NI, kept_NI, columns_IO, bias_O)
    if available(x_NI, columns_IO):
        out = sparse_rows(x_NI, kept_NI, columns_IO)
    else:
        rows = []
        for x_I, kept_I in zip(x_NI, kept_NI, strict=True):
            at = kept_I.nonzero()[:, 0]
            rows.append(x_I[at] @ columns_IO.index_select(0, at))
        out = torch.stack(rows)
    return out if bias_O is None else out + bias_O
