"""What stands at an attention site while `calibrate` passes text through a model.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .errors import BadInput
from .method import Sparse


class Watched:
    """Stands at an attention site during calibration: shows a method what comes by, and attends to everything."""

    def __init__(self, method: Sparse, read: Callable[[], None]) -> None:
        self.method, self.read = method, read

    def __call__(self) -> None:
        """Nothing; attention is reached through `attend`."""

    def attend(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, *, scale: float, causal: bool = True, padding_BS: Tensor | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Dense attention; the method sees queries in units in which their logits are q k / sqrt(D), and no padding."""
        if not causal:
            raise BadInput(f"{self.method.name}: calibrate observes causal attention; layer {layer} looks both ways")
        seen_q = q_BHTD * (scale * q_BHTD.shape[-1] ** 0.5)
        if padding_BS is None:
            self.method.observe(seen_q, k_BGTD, v_BGTD)
        else:
            for b, real_S in enumerate(padding_BS):
                self.method.observe(*(x[b : b + 1, :, real_S] for x in (seen_q, k_BGTD, v_BGTD)))
        self.read()
        mask = None if padding_BS is None else torch.ones_like(padding_BS[0]).diag().expand(len(padding_BS), -1, -1) | padding_BS[:, None]
        mask = None if mask is None else mask.tril()[:, None]
        return scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
