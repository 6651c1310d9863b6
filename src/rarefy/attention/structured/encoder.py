"""The transformer layer that HAT and HDT are made of, and how positions are told.

Shape letters: B = batch, H = heads, T = tokens, D = head width, W = width (H D).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from ...errors import BadInput
from ...method import positive

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v [B, H, T, D] -> [B, H, T, D]; where keys are left out is its business."""


class Layer(nn.Module):
    """Attention and a feed-forward net, each after a norm and beside a residual.

    Args:
        width: W. heads: H, a divisor of it. wide: hidden units of the feed-forward net, 4 W unless told.

    Raises:
        BadInput: a width that the heads do not divide.
    """

    def __init__(self, width: int, heads: int, wide: int | None = None) -> None:
        super().__init__()
        positive("width", width)
        self.heads = positive("heads", heads, width)
        if width % heads:
            raise BadInput(f"width {width} is no multiple of {heads} heads")
        wide = positive("wide", 4 * width if wide is None else wide)
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, wide), nn.Linear(wide, width)

    def forward(self, x_BTW: Tensor, attend: Attend) -> Tensor:
        """[B, T, W]."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.before(x_BTW)).chunk(3, -1))
        x_BTW = x_BTW + self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        return x_BTW + self.down(gelu(self.up(self.between(x_BTW))))


def waves(place: Tensor, width: int) -> Tensor:
    """[..., width] sines and cosines of a place (Vaswani et al. 2017), float32; an odd width lacks the last cosine."""
    half = -(-width // 2)
    angle = place[..., None].float() * 10000.0 ** (-torch.arange(half, device=place.device) / half)
    return torch.cat([angle.sin(), angle.cos()], -1)[..., :width]
