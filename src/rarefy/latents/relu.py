"""ReLU autoencoder with an L1 penalty (Bricken et al. 2023; loss of Anthropic's April 2024 update).

L = || x - x_hat ||^2 + l1 * sum_i f_i ||W_dec,i||. The decoder is free: the penalty's norms take the constraint's place.

Shape letters: B = rows, D = width, F = latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadInput
from ..method import Loss, not_negative
from ..selection import Selection, check_finite, threshold
from .dictionary import Dictionary, diagnostics


class ReLU(Dictionary):
    """Latents are the positive pre-activations.

    Args:
        l1: weight of the penalty, on squared error a channel. warmup: steps over which it rises from 0.
    """

    name = "latents/relu"

    steps: Tensor

    def __init__(
        self, d_in: int, width: int, d_out: int = 0, l1: float = 0.02, warmup: int = 100, dead_after: int = 1_000_000, seed: int = 0,
    ) -> None:
        super().__init__(d_in, width, d_out, seed)
        if l1 < 0 or warmup < 0:
            raise BadInput(f"l1={l1} and warmup={warmup} must be >= 0")
        self.l1, self.warmup, self.dead_after = l1, warmup, not_negative("dead_after", dead_after)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @property
    def budget(self) -> float:
        """1: any number of latents may be active."""
        return 1.0

    def select(self, x: Tensor) -> Selection:
        """Positive pre-activations."""
        check_finite(x, f"input of {self.name}")
        return threshold(self.pre_activations(x), 0.0)

    def loss(self, x: Tensor, y: Tensor) -> Loss:
        """mse + l1."""
        self.check_rows(x, y)
        f_BF = self.pre_activations(x).relu()
        y_hat = self.in_units(f_BF @ self.W_dec_FD + self.b_dec_D)
        mse = self.error(y_hat, y)
        rise = min(1.0, int(self.steps) / self.warmup) if self.warmup else 1.0
        penalty = self.l1 * rise * (f_BF * self.W_dec_FD.norm(dim=-1)).sum(-1).mean() / self.d_out
        on = f_BF.detach() > 0
        self.fired(on.any(0).nonzero()[:, 0], len(x))
        parts = {"mse": mse, "l1": penalty, **diagnostics(y, y_hat, on.sum() / max(1, len(x)))}
        parts["dead"] = (self.idle_F > self.dead_after).float().mean()
        return Loss(mse + penalty, parts)

    def before_step(self) -> None:
        """Nothing: decoder norms are free."""

    def after_step(self, step: int) -> None:
        """Count steps for the warm-up; decoder norms are free."""
        self.steps += 1
