"""y = W (x * kept) + b, reading only the columns of W whose input is kept.

Shape letters: N = rows, I = inputs, O = outputs, K = kept inputs of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import BadInput
from .cpu import available, sparse_row
from .reference import gather_linear_reference

FEW_ROWS = 8
"""Above this many rows each weight serves many rows and a dense product wins, without counting what is kept."""
GATHER_UP_TO = 0.75
"""Few rows are gathered while all of them together keep at most this many times I inputs; a dense product reads I once."""

__all__ = ["gather_linear", "gather_linear_reference", "gathers"]


def gathers(rows: int, kept: int, inputs: int) -> bool:
    """Whether `rows` rows that keep `kept` inputs in all are gathered row by row rather than masked."""
    return 0 < rows <= FEW_ROWS and kept <= GATHER_UP_TO * inputs


def gather_linear(x_NI: Tensor, kept_NI: Tensor, columns_IO: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """[N, O] from rows [N, I], their kept inputs [N, I] bool and the transposed weight [I, O].

    Few rows without gradients read only the kept rows of `columns_IO`: in place with numba on CPU, else by a torch
    gather. Many rows, or a call that needs gradients, use one masked dense product.
    """
    if x_NI.shape != kept_NI.shape or columns_IO.shape[0] != x_NI.shape[-1]:
        raise BadInput(f"shapes {list(x_NI.shape)}, {list(kept_NI.shape)} and {list(columns_IO.shape)} do not fit together")
    rows, inputs = x_NI.shape
    inside = [t for t in (x_NI, columns_IO, bias_O) if t is not None]
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in inside)
    if grad or torch.compiler.is_compiling() or not gathers(rows, 0, inputs):
        return gather_linear_reference(x_NI, kept_NI, columns_IO, bias_O)
    index = [kept_I.nonzero().squeeze(-1) for kept_I in kept_NI]
    if not gathers(rows, sum(len(index_K) for index_K in index), inputs):
        return gather_linear_reference(x_NI, kept_NI, columns_IO, bias_O)
    if available(x_NI, columns_IO):
        return torch.stack([sparse_row(x_I, at, columns_IO, bias_O) for x_I, at in zip(x_NI, index, strict=True)])
    out = torch.stack([x_I[at] @ columns_IO.index_select(0, at) for x_I, at in zip(x_NI, index, strict=True)])
    return out if bias_O is None else out + bias_O
