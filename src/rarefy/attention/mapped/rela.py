"""Rectified linear attention (Zhang, Titov & Sennrich 2021, arXiv 2104.07012): max(z, 0) in softmax's place, normalised behind the values.

Shape letters: B = batch, H = query heads, T = queries, S = keys, D = head width, N = H * D.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import maps
from ...errors import BadInput
from .base import MappedAttention

EPS = 1e-8


class ReLA(MappedAttention):
    """RMSNorm(relu(q k^T * scale) v) * sigmoid(w * .) over all heads together; a head may look at nothing.

    A pretrained softmax model does not survive the change: train with it.

    Args:
        heads, width: query heads and head width, for the gain and the gate [N], which are learned. With heads=0 there
            are none: the gain is one and there is no gate.
    """

    name = "attention/rela"

    def __init__(self, heads: int = 0, width: int = 0) -> None:
        super().__init__()
        if (heads > 0) != (width > 0) or heads < 0 or width < 0:
            raise BadInput(f"heads={heads}, width={width}: give both for a learned gain and gate, or neither")
        self.heads, self.width = heads, width
        self.gain_N = nn.Parameter(torch.ones(heads * width)) if heads else None
        self.gate_N = nn.Parameter(torch.zeros(heads * width)) if heads else None

    def weights(self, score_BHTS: Tensor, seen_BHT1: Tensor) -> Tensor:
        """max(z, 0)."""
        return maps.relu(score_BHTS)

    def naive(self, score_BHTS: Tensor, seen_BHT1: Tensor) -> Tensor:
        """max(z, 0)."""
        return torch.where(score_BHTS > 0, score_BHTS, torch.zeros_like(score_BHTS))

    def after(self, out_BHTD: Tensor) -> Tensor:
        """The norm over heads and channels, then the gate."""
        if self.heads and out_BHTD.shape[1::2] != (self.heads, self.width):
            raise BadInput(f"{self.name} was made for {self.heads} heads of {self.width}, and given {out_BHTD.shape[1]} of {out_BHTD.shape[3]}")
        flat_BTN = out_BHTD.transpose(1, 2).flatten(2)
        wide = flat_BTN.double() if flat_BTN.dtype == torch.float64 else flat_BTN.float()
        normed = wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
        if self.gain_N is not None and self.gate_N is not None:
            normed = normed * self.gain_N * torch.sigmoid(self.gate_N * wide)
        return normed.to(out_BHTD.dtype).unflatten(2, (out_BHTD.shape[1], -1)).transpose(1, 2)
