"""Maps without competition: a score's weight depends on that score alone, and a row need not sum to one."""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import closed, highest, opened


def relu(scores: Tensor, dim: int = -1) -> Tensor:
    """max(z, 0): rectified linear attention (Zhang, Titov & Sennrich 2021, arXiv 2104.07012), to be normalised after the values."""
    x = opened(scores, dim)
    highest(x.detach())
    return closed(x.clamp_min(0), scores, dim)


def sigmoid(scores: Tensor, bias: float | Tensor = 0.0, dim: int = -1) -> Tensor:
    """1 / (1 + exp(-(z + bias))); a bias of -log N keeps a row of N near a sum of one (Ramapuram et al. 2024, arXiv 2409.04431)."""
    x = opened(scores, dim)
    highest(x.detach())
    return closed(torch.sigmoid(x + bias), scores, dim)
