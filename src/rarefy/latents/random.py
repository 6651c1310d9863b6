"""Baseline: random unit directions, the k largest inner products, weighted so that the squared error is least in scale.

With orthogonal directions the inner product would be the best weight; k random ones overlap, so one common factor,
fitted on the first batch by least squares, stands for what training would do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import Unsupported
from ..kernels.sparse_encode import encode_top_k
from ..method import Loss, positive
from ..selection import Selection, check_finite
from .dictionary import Dictionary


class RandomDictionary(Dictionary):
    """Directions that were never trained."""

    name = "latents/random"
    fitted = "none"

    factor: Tensor

    def __init__(self, d_in: int, width: int, k: int = 32, seed: int = 0) -> None:
        super().__init__(d_in, width, 0, seed)
        self.k = positive("k", k, width)
        self.register_buffer("factor", torch.ones(()))

    @property
    def budget(self) -> float:
        """k / F."""
        return self.k / self.width

    @torch.no_grad()
    def initialise(self, x: Tensor, y: Tensor | None = None) -> None:
        """Scale, centre and the common factor of the weights."""
        super().initialise(x)
        self.factor.fill_(1.0)
        part = self.decode(self.select(x)) * self.scale - self.b_dec_D
        self.factor.copy_((part * self.centred(x)).sum() / part.pow(2).sum().clamp_min(1e-12))

    def select(self, x: Tensor) -> Selection:
        """The k largest inner products."""
        check_finite(x, f"input of {self.name}")
        value, index = encode_top_k(self.centred(x).reshape(-1, self.d_in), self.W_enc_FD, self.b_enc_F, self.k)
        lead = (*x.shape[:-1], self.k)
        return Selection(self.width, (value.relu() * self.factor.to(value.dtype)).view(lead), index=index.view(lead))

    def loss(self, x: Tensor, y: Tensor) -> Loss:
        """Not trained."""
        raise Unsupported(f"{self.name} is a baseline and is not trained")
