"""Thresholds on input scores, calibrated so that the asked fraction lies above.

Shape letters: I = inputs, Q = bins, ... = any leading dims.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadInput
from ..kernels.gather_linear.modules import check_width
from ..selection import Selection, check_finite
from . import histogram
from .linear import InputSparseLinear


class ThresholdLinear(InputSparseLinear):
    """Keeps inputs whose score exceeds one number for the layer. Subclasses give `scores`.

    The density is the budget on average over rows like those seen; a single row keeps what exceeds the threshold.
    """

    fitted = "calibrated"

    tau: Tensor
    ready: Tensor
    count_Q: Tensor

    def __init__(self, d_in: int, d_out: int, budget: float = 0.5, bias: bool = True) -> None:
        super().__init__(d_in, d_out, budget, bias)
        self.register_buffer("tau", torch.zeros((), dtype=torch.float64))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))
        self.register_buffer("count_Q", torch.zeros(histogram.BINS, dtype=torch.int64), persistent=False)

    def scores(self, x: Tensor) -> Tensor:
        """[..., I] importance of each input, >= 0, float32 or wider."""
        raise NotImplementedError

    @torch.no_grad()
    def observe(self, x: Tensor, y: Tensor | None = None) -> None:
        """Count the scores of rows [..., I] in a histogram of fixed size; y is not used.

        Raises:
            BadInput: another width, or NaN or inf in x; nothing is counted then.
        """
        check_width(x, self.d_in, self.name)
        check_finite(x, f"{self.name} calibration rows")
        histogram.add_to(self.count_Q, self.scores(x))

    def finish(self) -> None:
        """Set the threshold to the (1 - budget) quantile of the scores seen; at budget 1 everything is kept.

        Raises:
            BadInput: no rows were observed.
        """
        if not self.count_Q.any():
            if self.ready:
                return
            raise BadInput(f"{self.name} has seen no calibration rows; call observe() before finish()")
        self.tau.fill_(-1.0 if self.budget == 1 else histogram.quantile(self.count_Q, 1 - self.budget))
        self.ready.fill_(True)

    def select(self, x: Tensor) -> Selection:
        """Inputs of rows [..., I] whose score exceeds the threshold; the selection's weight is the input itself."""
        if not self.ready:
            raise BadInput(f"{self.name} is not calibrated yet; call calibrate(model, plan, batches) first")
        return Selection(self.d_in, x, mask_=self.scores(x.detach()) > self.tau)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Keep the threshold in float64 whatever dtype the weights are moved to."""
        tau = self.tau
        super()._apply(fn, recurse)
        self.tau = tau.to(self.tau.device)
        return self


def wide(x: Tensor) -> Tensor:
    """x in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
