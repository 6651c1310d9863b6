"""Reading and writing the dense layers a sparse linear method stands in for.

Shape letters: I = inputs, O = outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...errors import BadInput, Unsupported


def is_transposed(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D, which keeps its weight [I, O]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def linear_parts(module: nn.Module, who: str) -> tuple[Tensor, Tensor | None]:
    """Weight [O, I] (a view on the module's own storage) and bias [O] or None of a Linear or Conv1D.

    Args:
        who: what asks, for the message.

    Raises:
        Unsupported: another kind of module, or a weight that is quantised or not in memory.
        BadInput: NaN or inf in the weight.
    """
    if not isinstance(module, nn.Linear) and not is_transposed(module):
        raise Unsupported(f"{who} does not stand in for a {type(module).__name__}; it takes nn.Linear and transformers' Conv1D")
    weight = module.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2:
        raise Unsupported(f"{who}: the weight of this {type(module).__name__} is quantised or packed; load the model without quantisation")
    if weight.device.type == "meta":
        raise Unsupported(f"{who}: the weight of this {type(module).__name__} is on the meta device; load the model into memory")
    if not torch.isfinite(weight.detach()).all():
        raise BadInput(f"{who}: the weight of this {type(module).__name__} holds NaN or inf")
    weight_OI = weight.detach().t() if is_transposed(module) else weight.detach()
    bias = module.bias
    return weight_OI, bias.detach() if isinstance(bias, Tensor) else None


def check_width(x: Tensor, d_in: int, who: str) -> None:
    """BadInput unless x is [..., d_in] of a floating type."""
    if x.ndim == 0 or x.shape[-1] != d_in or not x.is_floating_point():
        raise BadInput(f"{who}: rows of shape {list(x.shape)} and type {x.dtype} do not fit; give floats [..., {d_in}]")
