"""Mutual Choice autoencoder (Ayonrinde 2024, "Adaptive Sparse Allocation with Mutual Choice & Feature Choice Sparse
Autoencoders", arXiv 2411.02124).

Rows and latents are matched where it helps most: the M = k B largest ReLU affinities of a batch are kept, as in BatchTopK.
What differs is the auxiliary loss (aux_zipf): not only dead latents are asked to explain the error, but all that fire less
than Zipf's law has it for their rank.

Departures: the paper names no allowance for noise; here a latent is under-used below `slack` times its Zipf rate, with
firing rates as running means over batches. In use a batch is replaced by the threshold of BatchTopK, so that a row does not
depend on its neighbours.

Shape letters: F = latents, G = under-used latents, M = kept (row, latent) pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..method import fraction, not_negative
from .batch_topk import BatchTopK
from .dictionary import Widths
from .zipf import zipf_rates


class MutualChoice(BatchTopK):
    """BatchTopK whose under-used latents share in explaining the error.

    Args:
        exponent: of Zipf's law. slack: share of the Zipf rate of its rank below which a latent is under-used.
        aux_k: under-used latents a row that share in explaining the error; 0 means D / 2. Others as for BatchTopK.
    """

    name = "latents/mutual_choice"

    rate_F: Tensor

    def __init__(
        self, d_in: Widths, width: int, k: int = 32, d_out: Widths = 0, exponent: float = 1.0, slack: float = 0.1, aux_alpha: float = 1 / 32,
        aux_k: int = 0, dead_after: int = 10_000_000, momentum: float = 0.99, seed: int = 0, skip: bool | str = False,
    ) -> None:
        super().__init__(d_in, width, k, d_out, aux_alpha, aux_k, dead_after, momentum, seed, skip)
        self.exponent, self.slack = not_negative("exponent", exponent), fraction("slack", slack)
        self.register_buffer("rate_F", torch.full((width,), k / width))

    def needy(self) -> Tensor:
        """[G] latents that fire less than `slack` of the Zipf rate of their rank."""
        target_F = zipf_rates(self.width, self.k, self.exponent).to(self.rate_F)
        rate_F, order_F = self.rate_F.sort(descending=True, stable=True)
        return order_F[rate_F < self.slack * target_F]

    @torch.no_grad()
    def fired(self, unit_M: Tensor, rows: int) -> None:
        """Count idle rows, and move the firing rates towards those of this batch."""
        super().fired(unit_M, rows)
        share_F = torch.bincount(unit_M, minlength=self.width).to(self.rate_F) / max(1, rows)
        self.rate_F.lerp_(share_F, 1 - self.momentum)
