"""WINA (Chen et al. 2025, arXiv 2505.19427): score input i by |x_i| * ||W_:,i||_2 and keep the top K (eq. 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cost import Cost
from ..errors import BadInput, Unsupported
from ..selection import Selection, kept, top_k
from .calibrated import ThresholdLinear, wide


class Wina(ThresholdLinear):
    """Keep the inputs with the largest share in the output's norm, bounding the error where columns are near orthogonal.

    Args:
        mode: "topk": the top round(budget * d_in) of each row, without calibration, as in the paper; "threshold": those
            above one calibrated number, as TEAL does.

    The norms are taken when the method is made, for reading the whole weight at each row would cost what is saved.
    """

    name = "neurons/wina"
    fitted = "none"

    norm_I: Tensor

    def __init__(self, d_in: int, d_out: int, budget: float = 0.5, bias: bool = True, mode: str = "topk") -> None:
        if mode not in ("topk", "threshold"):
            raise BadInput(f"mode={mode!r} must be 'topk' or 'threshold'")
        super().__init__(d_in, d_out, budget, bias)
        self.mode = mode
        self.fitted = "calibrated" if mode == "threshold" else "none"  # type: ignore[misc]
        self.register_buffer("norm_I", torch.zeros(d_in))

    def adopt(self) -> None:
        self.norm_I = torch.linalg.vector_norm(wide(self.columns_IO.detach()), dim=1)

    def scores(self, x: Tensor) -> Tensor:
        """[..., I] |x_i| * ||W_:,i||_2."""
        return wide(x).abs() * wide(self.norm_I)

    def observe(self, x: Tensor, y: Tensor | None = None) -> None:
        self._needs_threshold()
        super().observe(x, y)

    def finish(self) -> None:
        self._needs_threshold()
        super().finish()

    def _needs_threshold(self) -> None:
        if self.mode != "threshold":
            raise Unsupported(f"{self.name} with mode='topk' is not calibrated; use mode='threshold'")

    def select(self, x: Tensor) -> Selection:
        """Top K of |x_i| * ||W_:,i||, or all above the threshold; the selection's weight is x itself."""
        if self.mode == "threshold":
            return super().select(x)
        index = top_k(self.scores(x.detach()), kept(self._budget, self.d_in)).index
        assert index is not None
        return Selection(self.d_in, x.gather(-1, index), index=index)

    def cost(self, density: float | None = None) -> Cost:
        """Columns of kept inputs, and the norms."""
        return super().cost(density) + Cost(0, self.norm_I.numel() * self.norm_I.element_size())
