"""Gated autoencoder (Rajamanoharan et al. 2024, arXiv 2404.16014).

pi = W_gate (x - b_dec) + b_gate decides which latents are on, W_mag (x - b_dec) + b_mag how much, with the rows of
W_mag those of W_gate times exp(r_mag) (eq. 6, 7). Loss (eq. 8): reconstruction + l1 * sum ReLU(pi) + the error of
decoding ReLU(pi) with a frozen decoder, which trains the gate.

Shape letters: B = rows, D = width, F = latents.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..method import Loss, not_negative
from ..selection import Selection, check_finite
from .dictionary import Widths
from .penalised import Penalised


class Gated(Penalised):
    """A gate that picks and a magnitude that measures, so that sparsity does not shrink.

    Args:
        l1: weight of the gate's penalty. warmup: steps over which it rises from 0.
    W_enc_FD is W_gate and b_enc_F is b_gate.
    """

    name = "latents/gated"

    def __init__(
        self, d_in: Widths, width: int, d_out: Widths = 0, l1: float = 0.02, warmup: int = 100, dead_after: int = 1_000_000, seed: int = 0,
        skip: bool | str = False,
    ) -> None:
        super().__init__(d_in, width, d_out, warmup, dead_after, seed, skip)
        self.l1 = not_negative("l1", l1)
        self.r_mag_F, self.b_mag_F = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        product = self.centred(x) @ self.W_enc_FD.T
        return product + self.b_enc_F, product * self.r_mag_F.exp() + self.b_mag_F

    def select(self, x: Tensor) -> Selection:
        """Latents whose gate is open and whose magnitude is positive."""
        check_finite(x, f"input of {self.name}")
        gate, magnitude = self._parts(x)
        return Selection(self.width, magnitude, mask_=(gate > 0) & (magnitude > 0))

    def latent_loss(self, x: Tensor, y: Tensor) -> Loss:
        """mse + l1 of the gate + the gate's own reconstruction through the detached decoder."""
        gate_BF, magnitude_BF = self._parts(x)
        on_BF = (gate_BF > 0).to(gate_BF)
        f_BF = on_BF * magnitude_BF.relu()
        y_hat = self.in_units(f_BF @ self.W_dec_FD + self.b_dec_D)
        open_BF = gate_BF.relu()
        frozen = self.in_units(open_BF @ self.W_dec_FD.detach() + self.b_dec_D.detach())
        penalty = self.l1 * self.rise * self.price(open_BF) / self.d_out
        return self.settled(f_BF, y, y_hat, mse=self.error(y_hat, y), l1=penalty, aux=self.error(frozen, y))
