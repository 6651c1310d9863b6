"""ReLU autoencoder with an L1 penalty (Bricken et al. 2023; loss of Anthropic's April 2024 update).

L = || x - x_hat ||^2 + l1 * sum_i f_i ||W_dec,i||. The decoder is free: the penalty's norms take the constraint's place.

Shape letters: B = rows, D = width, F = latents.
"""

from __future__ import annotations

from torch import Tensor

from ..method import Loss, not_negative
from ..selection import Selection, check_finite, threshold
from .dictionary import Widths
from .penalised import Penalised


class ReLU(Penalised):
    """Latents are the positive pre-activations.

    Args:
        l1: weight of the penalty, on squared error a channel. warmup: steps over which it rises from 0.
    """

    name = "latents/relu"

    def __init__(
        self, d_in: Widths, width: int, d_out: Widths = 0, l1: float = 0.02, warmup: int = 100, dead_after: int = 1_000_000, seed: int = 0,
        skip: bool | str = False,
    ) -> None:
        super().__init__(d_in, width, d_out, warmup, dead_after, seed, skip)
        self.l1 = not_negative("l1", l1)

    def select(self, x: Tensor) -> Selection:
        """Positive pre-activations."""
        check_finite(x, f"input of {self.name}")
        return threshold(self.pre_activations(x), 0.0)

    def latent_loss(self, x: Tensor, y: Tensor) -> Loss:
        """mse + l1."""
        f_BF = self.pre_activations(x).relu()
        y_hat = self.in_units(f_BF @ self.W_dec_FD + self.b_dec_D)
        penalty = self.l1 * self.rise * self.price(f_BF) / self.d_out
        return self.settled(f_BF, y, y_hat, mse=self.error(y_hat, y), l1=penalty)

    def paid(self, f_BF: Tensor) -> Tensor:
        """[B, F] f_i ||W_dec,i||; of a crosscoder the norms are summed over sites."""
        return f_BF * self.decoder_norms().sum(-1)

    def before_step(self) -> None:
        """Nothing: decoder norms are free."""

    def after_step(self, step: int) -> None:
        """Count steps for the warm-up; decoder norms are free."""
        self.steps += 1
