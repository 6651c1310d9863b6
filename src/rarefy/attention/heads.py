"""Key heads as query heads see them.

Shape letters: B = batch, G = key heads, H = query heads (a multiple of G).
"""

from __future__ import annotations

from torch import Tensor


def per_head(x_BG: Tensor, heads: int) -> Tensor:
    """[B, H, ...] of [B, G, ...]: each key head once a query head that reads it."""
    return x_BG.repeat_interleave(heads // x_BG.shape[1], 1)
