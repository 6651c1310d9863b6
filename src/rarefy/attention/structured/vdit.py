"""Sparse patterns of video transformers, searched offline: they depend on layer and head, and little on what is shown.

    Sparse-vDiT (Chen et al. 2025, arXiv 2506.03065): per head, minimise sum over heads of |out_pattern - out_dense|^2 against the pairs kept
    Efficient-vDiT (Ding et al. 2025, arXiv 2502.06155): per layer, the sparsest mask whose output error stays within a tolerance
The first trades error and cost by a weight; here the cost is bounded by the budget instead, which picks from the same frontier. Counted pairs
are the cost in place of a table of kernel times.

Shape letters as in searched.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...method import not_negative
from ..heads import per_head
from ..trained.base import causal_mask
from .searched import Searched


def output_harm(q: Tensor, k: Tensor, v: Tensor, keep_RTS: Tensor) -> Tensor:
    """[H, R] sums of |out_pattern - out_dense|^2; a query left without keys gives zeros."""
    H, T, S = q.shape[1], q.shape[2], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    score, value = (q @ per_head(k, H).mT).to(wide) * q.shape[-1] ** -0.5, per_head(v, H).to(wide)
    score = score.masked_fill(~causal_mask(T, S, q.device), -torch.inf)
    dense, harm = score.softmax(-1) @ value, []
    for keep_TS in keep_RTS:
        some = keep_TS.any(-1, keepdim=True)
        out = (score.masked_fill(~keep_TS & some, -torch.inf).softmax(-1) * some) @ value
        harm.append((out - dense).square().sum((0, 2, 3)))
    return torch.stack(harm, 1)


class SparseVDiT(Searched):
    """Each head the pattern that, within the budget over all heads, changes outputs least. For videos give patterns over the frames' grid."""

    name = "attention/sparse_vdit"

    def __init__(
        self, budget: float = 0.25, options: str = "full(); window(64); window(16); lag(0) | lag(16) | lag(32); every(16) | own(); none()",
        block: int = 64, query_block: int = 64,
    ) -> None:
        super().__init__(budget, options, block, query_block)

    def harm(self, q: Tensor, k: Tensor, v: Tensor, keep_RTS: Tensor) -> Tensor:
        """Squared change of the output."""
        return output_harm(q, k, v, keep_RTS)


class EfficientVDiT(Searched):
    """The layer's heads all get the sparsest pattern whose output error is within the tolerance; the densest if none is.

    Args:
        tolerance: |out_pattern - out_dense|^2 as a part of |out_dense|^2, over the layer.
    """

    name = "attention/efficient_vdit"

    def __init__(self, tolerance: float = 0.1, options: str = "full(); window(128) | sinks(8); window(64) | sinks(4); window(16) | sinks(1)",
                 block: int = 64, query_block: int = 64) -> None:
        super().__init__(1.0, options, block, query_block)
        self.tolerance = not_negative("tolerance", tolerance)

    def harm(self, q: Tensor, k: Tensor, v: Tensor, keep_RTS: Tensor) -> Tensor:
        """Squared change of the output; the output itself is what no pair kept would change."""
        return output_harm(q, k, v, torch.cat([keep_RTS, torch.zeros_like(keep_RTS[:1])]))

    def settle(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Errors relative to the layer's output."""
        size = sums["harm"][:, -1].sum().clamp_min(1e-30)
        return super().settle({**sums, "harm": sums["harm"][:, :-1] / size * sums["seen"]})

    def pick(self, harm_HR: Tensor, share_HR: Tensor) -> Tensor:
        """One for all heads."""
        cost_R, fits_R = share_HR.mean(0), harm_HR.sum(0) <= self.tolerance
        best = cost_R.masked_fill(~fits_R, torch.inf).argmin() if bool(fits_R.any()) else cost_R.argmax()
        return best.expand(len(harm_HR))
