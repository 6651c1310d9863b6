"""SWAT (Fu et al. 2025, arXiv 2502.18845): a sliding window whose keys are weighed one by one, some heads for what is old, some for what is new.

    out_i = sum over the window's j of sigmoid(q_i k_j / sqrt(D) + s_h (i - j)) v_j
with balanced ALiBi: half the heads have slopes s_h < 0 and lean to recent keys, half s_h > 0 and hold on to old ones. Sizes are ALiBi's
(Press et al. 2022): 2^(-8 n / N) for the n-th of the N heads of a half. No weight competes with another, so there is no mass to drop on a
sink. For models trained with it; rotary positions are the model's own, queries and keys come rotated. (The authors'
published layer is softmax with plain ALiBi, other slopes among its comments; what stands here is the paper's sigmoid.)

Shape letters: B = batch, H = query heads, T = queries, S = keys, D = head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...method import positive
from ..heads import per_head
from .base import Structured, places

ROWS = 256
"""Queries worked on at a time."""


def slopes(heads: int) -> Tensor:
    """[H] float64: the first half negative, the second positive; of an odd number one more leans to recent keys."""
    recent, old = -(-heads // 2), heads // 2
    return torch.tensor([-(2.0 ** (-8 * n / recent)) for n in range(1, recent + 1)] + [2.0 ** (-8 * n / old) for n in range(1, old + 1)],
                        dtype=torch.float64)


class SWAT(Structured):
    """Sigmoid weights in a window.

    Args:
        window: nearest keys, the own among them; without causality as many to the other side.
    """

    name = "attention/swat"

    def __init__(self, window: int = 256) -> None:
        super().__init__()
        self.window = positive("window", window)

    def _weigh(self, q: Tensor, k_BHSD: Tensor, at_q: Tensor, at_k: Tensor, scale: float, causal: bool) -> Tensor:
        apart = at_q - at_k
        keep = (apart < self.window) & (apart >= 0 if causal else apart > -self.window)
        wide = torch.promote_types(q.dtype, torch.float32)
        lean = slopes(q.shape[1]).to(q.device, wide)[:, None, None] * apart.abs()
        score = (q @ k_BHSD.mT).to(wide) * scale + lean
        return (score.sigmoid() * keep).to(q.dtype)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        """Some queries at a time, with the keys of their windows only."""
        H, T, S = q.shape[1], q.shape[2], k.shape[2]
        at, j = places(T, S, q.device)
        outs = []
        for start in range(0, T, ROWS):
            stop = min(T, start + ROWS)
            first, last = S - T + start, S - T + stop
            near = slice(max(0, first - self.window + 1), last if causal else min(S, last + self.window - 1))
            weight = self._weigh(q[:, :, start:stop], per_head(k[:, :, near], H), at[start:stop], j[near], scale, causal)
            outs.append(weight @ per_head(v[:, :, near], H))
        return torch.cat(outs, 2)

    def weights(self, q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
        """Every sigmoid, those out of the window times 0."""
        return self._weigh(q, per_head(k, q.shape[1]), *places(q.shape[2], k.shape[2], q.device), scale, causal)

    def worked(self, T: int, S: int, causal: bool) -> float:
        """Keys in the window."""
        at = torch.arange(S - T, S)
        ahead = 0 if causal else (S - 1 - at).clamp_max(self.window - 1)
        return float(((at + 1).clamp_max(self.window) + ahead).sum())
