"""Matryoshka autoencoder over prefixes of latents (Bussmann et al. 2025, arXiv 2503.17547).

Widths m_1 < ... < m_L = F; the first m latents alone must reconstruct, for every m:
L = sum_l || x - f_{1..m_l} W_dec,{1..m_l} - b_dec ||^2 + AuxK, with f the BatchTopK latents of the whole width. Wide levels
can afford to split a concept; the narrow ones can't, which keeps general latents from being absorbed into special ones.

Departure: the mean over levels in place of the sum, so that learning rates and `aux_alpha` mean what they mean for BatchTopK.

Shape letters: B = rows, E = output width, F = latents, L = levels, M = kept (row, latent) pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.routes import Routes
from .batch_topk import BatchTopK
from .dictionary import Widths
from .nested import nested_sums, sizes


class Matryoshka(BatchTopK):
    """BatchTopK whose every prefix is a dictionary of its own; read by the threshold, as BatchTopK.

    Args:
        prefixes: rising widths, as counts ("256, 1024") or fractions of the width; the whole width is added. Others as for
            BatchTopK.
    """

    name = "latents/matryoshka"

    prefix_L: Tensor

    def __init__(
        self, d_in: Widths, width: int, k: int = 32, d_out: Widths = 0, prefixes: str = "1/16, 1/8, 1/4, 1/2", aux_alpha: float = 1 / 32,
        aux_k: int = 0, dead_after: int = 10_000_000, momentum: float = 0.99, seed: int = 0, skip: bool | str = False,
    ) -> None:
        super().__init__(d_in, width, k, d_out, aux_alpha, aux_k, dead_after, momentum, seed, skip)
        self.prefixes = tuple(dict.fromkeys((*sizes("prefixes", prefixes, width), width)))
        self.register_buffer("prefix_L", torch.tensor(self.prefixes), persistent=False)

    def compared(self, value_M: Tensor, routes: Routes, y_BE: Tensor) -> tuple[Tensor, Tensor]:
        """(reconstruction by all latents [B, E], squared error a channel, mean over prefixes)."""
        level_M = torch.bucketize(routes.unit_M, self.prefix_L, right=True)
        y_hat_LBE = nested_sums(value_M, routes, level_M, len(self.prefixes), self.W_dec_FD, self.b_dec_D)
        return y_hat_LBE[-1], (y_hat_LBE - y_BE).square().mean()
