"""JumpReLU autoencoder (Rajamanoharan et al. 2024, arXiv 2407.14435).

f = z * 1[z > theta], theta learned a latent through a rectangle kernel (eq. 11, 12); loss (eq. 9) squared error +
sparsity * L0. With target_l0 > 0 the penalty is sparsity * (L0 / target_l0 - 1)^2 instead.

Shape letters: B = rows, D = width, F = latents.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..method import Loss
from ..selection import Selection, check_finite, threshold
from ..surrogate import jump_relu, step
from .dictionary import Widths
from .penalised import Penalised


class JumpReLU(Penalised):
    """A threshold of its own for every latent.

    Args:
        sparsity: weight of the penalty (a channel, as the squared error is). target_l0: latents a row to aim at; 0 penalises L0 itself.
        theta: initial threshold, bandwidth: of the kernel, in units of the scaled input. warmup: steps over which the
            penalty rises from 0.
    """

    name = "latents/jumprelu"

    def __init__(
        self, d_in: Widths, width: int, d_out: Widths = 0, sparsity: float = 0.002, target_l0: float = 0, theta: float = 0.001,
        bandwidth: float = 0.001, warmup: int = 100, dead_after: int = 1_000_000, seed: int = 0,
        skip: bool | str = False,
    ) -> None:
        super().__init__(d_in, width, d_out, warmup, dead_after, seed, skip)
        if sparsity < 0 or target_l0 < 0 or theta <= 0 or bandwidth <= 0:
            raise BadInput(f"theta={theta} and bandwidth={bandwidth} must be > 0; sparsity={sparsity}, target_l0={target_l0} >= 0")
        self.sparsity, self.target_l0, self.bandwidth = sparsity, target_l0, bandwidth
        self.log_theta_F = nn.Parameter(torch.full((width,), math.log(theta)))

    @property
    def budget(self) -> float:
        """Target L0 / F, or 1 where there is no target."""
        return min(1.0, self.target_l0 / self.width) if self.target_l0 else 1.0

    def select(self, x: Tensor) -> Selection:
        """Pre-activations above their threshold."""
        check_finite(x, f"input of {self.name}")
        return threshold(self.pre_activations(x), self.log_theta_F.exp())

    def latent_loss(self, x: Tensor, y: Tensor) -> Loss:
        """mse + l0."""
        pre_BF, theta_F = self.pre_activations(x).relu(), self.log_theta_F.exp()
        f_BF = jump_relu(pre_BF, theta_F, self.bandwidth)
        y_hat = self.in_units(f_BF @ self.W_dec_FD + self.b_dec_D)
        count = step(pre_BF, theta_F, self.bandwidth).sum(-1).mean()
        raw = (count / self.target_l0 - 1) ** 2 if self.target_l0 else count / self.d_out
        return self.settled(f_BF, y, y_hat, mse=self.error(y_hat, y), l0_penalty=self.sparsity * self.rise * raw)
