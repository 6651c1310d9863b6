"""The definition: unkept inputs are zero."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_linear_reference(x_NI: Tensor, kept_NI: Tensor, columns_IO: Tensor, bias_O: Tensor | None) -> Tensor:
    """[N, O] = (x where kept, else 0) @ columns + bias."""
    out = torch.where(kept_NI, x_NI, x_NI.new_zeros(())) @ columns_IO
    return out if bias_O is None else out + bias_O
