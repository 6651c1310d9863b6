"""Methods whose queries each keep the keys of the largest products over a few channels: a prefill forms no matrix of pairs.

Shape letters as in scores.py; R = channels that rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.block_attention import available
from ...kernels.block_attention.ranked import ranked_attention
from ..block import AT_ONCE
from ..heads import per_head
from .by_lines import visible
from .fitted import Fitted


class Ranked(Fitted):
    """Write `low`, and `describe` for the keys' part of it."""

    unit = "key"
    by_query = True
    wants = ("cache",)

    def low(self, q_BHTD: Tensor) -> Tensor:
        """[B, H, T, R] what of a query meets `describe` of the keys."""
        raise NotImplementedError

    def scores(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> Tensor:
        """Products over the channels that rank."""
        return self.low(q_BHTD) @ per_head(self.summary(k_BGSD), q_BHTD.shape[1]).mT

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        (B, H, T, D), S = q.shape, k.shape[2]
        if not (causal and T > AT_ONCE and scale > 0 and available(q, k, v)):
            return super()._attend(q, k, v, scale, causal)
        self._fits(q, k)
        self._shape = (H, D, S, T)
        # Python's round, for exactly the count that `budget` promises
        keep_T = torch.tensor([max(1, round(self._budget * n)) for n in range(S - T + 1, S + 1)])
        self._kept, self._seen = self._kept + float(keep_T.sum()) * B * H, self._seen + float(visible(T, S) * B * H)
        return ranked_attention(q, k, v, self.low(q), self.summary(k), keep_T, scale=scale)
