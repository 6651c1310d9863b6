"""What every neurons method shares: a linear layer that uses some of each row's inputs.

Shape letters: N = rows, I = inputs, O = outputs.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from ..cost import Cost
from ..kernels.gather_linear import gather_linear, gather_linear_reference
from ..kernels.gather_linear.modules import check_width, linear_parts
from ..method import Sparse, fraction, positive
from ..selection import Selection, check_finite


class InputSparseLinear(Sparse):
    """y = W (x * kept(x)) + b, the weight kept transposed so that an input's column lies together.

    Args:
        d_in, d_out: I and O.
        budget: fraction of inputs kept.
    """

    unit = "neuron"

    def __init__(self, d_in: int, d_out: int, budget: float = 0.5, bias: bool = True) -> None:
        super().__init__()
        self.d_in, self.d_out = positive("d_in", d_in), positive("d_out", d_out)
        self._budget = fraction("budget", budget)
        self.columns_IO = nn.Parameter(torch.zeros(d_in, d_out))
        self.bias_O = nn.Parameter(torch.zeros(d_out)) if bias else None

    @classmethod
    def for_module(cls, module: nn.Module, **arguments: Any) -> Self:
        """Stand in for a Linear or Conv1D, with a copy of its weight."""
        weight_OI, bias = linear_parts(module, cls.name)
        columns_IO = weight_OI.t()
        made = cls(*columns_IO.shape, bias=bias is not None, **arguments).to(columns_IO)
        with torch.no_grad():
            made.columns_IO.copy_(columns_IO)
            if bias is not None and made.bias_O is not None:
                made.bias_O.copy_(bias)
        made.adopt()
        return made

    def adopt(self) -> None:
        """Called once the weight is in place, for methods that look at it."""

    @property
    def budget(self) -> float:
        """Fraction of inputs kept."""
        return self._budget

    def select(self, x: Tensor) -> Selection:
        """Kept inputs of rows [..., I]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]; columns of dropped inputs are not read for few rows."""
        check_width(x, self.d_in, self.name)
        check_finite(x, f"input of {self.name}")
        kept_NI = self.select(x).mask.flatten(0, -2) if x.ndim > 1 else self.select(x[None]).mask
        out_NO = gather_linear(x.reshape(-1, self.d_in), kept_NI, self.columns_IO, self.bias_O)
        return out_NO.reshape(*x.shape[:-1], self.d_out)

    def reference(self, x: Tensor) -> Tensor:
        """The same by one masked dense product."""
        kept_NI = self.select(x.reshape(-1, self.d_in)).mask
        return gather_linear_reference(x.reshape(-1, self.d_in), kept_NI, self.columns_IO, self.bias_O).view(*x.shape[:-1], self.d_out)

    def cost(self, density: float | None = None) -> Cost:
        """Columns of kept inputs only."""
        return self.dense_cost() * (self._budget if density is None else density)

    def dense_cost(self) -> Cost:
        """A full matrix-vector product a row."""
        entries = self.columns_IO.numel()
        return Cost(2 * entries, entries * self.columns_IO.element_size())
