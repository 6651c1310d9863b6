"""Wanda (Sun et al. 2023, arXiv 2306.11695): score = |W_oi| * ||X_i||_2, compared within each output (eq. 1, sec. 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadInput
from ..kernels.gather_linear.modules import check_width
from ..selection import check_finite
from .linear import MaskedLinear


class Wanda(MaskedLinear):
    """Keep the weights whose product with their input's norm over calibration data is largest.

    Buffers: square_I float64, the sum of x_i^2 over the rows observed; rows.
    """

    name = "weights/wanda"
    fitted = "calibrated"

    square_I: Tensor
    rows: Tensor
    finished: Tensor

    def __init__(self, d_in: int, d_out: int, budget: float = 0.5, n: int = 0, m: int = 0, bias: bool = True, group: str = "row") -> None:
        super().__init__(d_in, d_out, budget, n, m, bias, group)
        self.register_buffer("square_I", torch.zeros(d_in, dtype=torch.float64))
        self.register_buffer("rows", torch.zeros((), dtype=torch.long))
        self.register_buffer("finished", torch.zeros((), dtype=torch.bool))

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Keep the sums in float64 whatever dtype the weights are moved to."""
        super()._apply(fn, recurse)
        self.square_I = self.square_I.double()
        return self

    def observe(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add rows [N, I] to the input norms."""
        check_width(x, self.d_in, self.name)
        check_finite(x, f"calibration input of {self.name}")
        self.square_I += x.detach().flatten(0, -2).double().square().sum(0)
        self.rows += x.shape[:-1].numel()

    def finish(self) -> None:
        """Choose the mask."""
        self.mask_OI = self._choose()
        self.finished.fill_(True)

    def ready(self) -> None:
        """See MaskedLinear."""
        if not self.finished:
            raise BadInput(f"{self.name} is not calibrated yet; call calibrate(model, plan, batches) first")

    def scores(self) -> Tensor:
        """[O, I] |W_oi| * ||X_i||_2."""
        if not self.rows:
            raise BadInput(f"{self.name} has seen no calibration rows; call observe, or calibrate(model, plan, batches)")
        return self.weight_OI.detach().abs().float() * self.square_I.sqrt().float()
