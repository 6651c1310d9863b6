"""TEAL (Liu et al. 2024, arXiv 2408.14690): zero the inputs whose magnitude is below a calibrated threshold (sec. 4.1).

The threshold is the quantile of |x| that drops 1 - budget of all inputs seen, read from a histogram so that memory
does not grow with the data and split batches give the same as whole ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadInput
from ..selection import Selection, check_finite, threshold
from .linear import InputSparseLinear

OCTAVES, FINE = 48, 256
"""The histogram of |x| covers 2^-32 to 2^16 with 256 bins an octave: thresholds are right to 0.3 %."""


class Teal(InputSparseLinear):
    """Keep inputs with |x| above tau. The count varies by row; the budget holds on average over the calibration data."""

    name = "neurons/teal"
    fitted = "calibrated"

    def __init__(self, d_in: int, d_out: int, budget: float = 0.5, bias: bool = True) -> None:
        super().__init__(d_in, d_out, budget, bias)
        self.register_buffer("hist_H", torch.zeros(OCTAVES * FINE + 1, dtype=torch.long))
        self.register_buffer("tau", torch.full((), torch.nan))

    def observe(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add |x| of rows [N, I] to the histogram."""
        check_finite(x, f"calibration input of {self.name}")
        size = x.detach().abs().float().flatten()
        bin_N = ((size.clamp_min(2.0**-33).log2() + 32) * FINE).floor().clamp(-1, OCTAVES * FINE - 1).long() + 1
        self.hist_H += torch.bincount(bin_N, minlength=len(self.hist_H))

    def finish(self) -> None:
        """Choose tau: the upper edge of the bin at which 1 - budget of the inputs is reached."""
        total = int(self.hist_H.sum())
        if not total:
            raise BadInput(f"{self.name} has seen no calibration rows; call observe, or calibrate(model, plan, batches)")
        if self._budget == 1:
            self.tau.fill_(-1.0)
            return
        below = self.hist_H.cumsum(0)
        at = int(torch.searchsorted(below, round((1 - self._budget) * total)))
        self.tau.fill_(2.0 ** (at / FINE - 32))

    def select(self, x: Tensor) -> Selection:
        """Inputs above the threshold."""
        if torch.isnan(self.tau):
            raise BadInput(f"{self.name} is not calibrated yet; call calibrate(model, plan, batches) first")
        chosen = threshold(x.detach().abs(), self.tau.to(x.dtype))
        return Selection(self.d_in, x, mask_=chosen.mask)
