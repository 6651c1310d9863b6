"""TEAL (Liu et al. 2024, arXiv 2408.14690): zero the inputs whose magnitude is below a calibrated threshold (sec. 4.1).

The threshold is the quantile of |x| that drops 1 - budget of all inputs seen, read from a histogram so that memory
does not grow with the data and split batches give the same as whole ones.
"""

from __future__ import annotations

from torch import Tensor

from .calibrated import ThresholdLinear, wide


class Teal(ThresholdLinear):
    """Keep inputs with |x| above tau. The count varies by row; the budget holds on average over the calibration data."""

    name = "neurons/teal"

    def __init__(self, d_in: int, d_out: int, budget: float = 0.5, bias: bool = True) -> None:
        super().__init__(d_in, d_out, budget, bias)

    def scores(self, x: Tensor) -> Tensor:
        """[..., I] |x|."""
        return wide(x).abs()
