"""Archetypal and relaxed archetypal autoencoder (RA-SAE; Fel et al. 2025, "Archetypal SAE: Adaptive and Stable Dictionary
Learning for Concept Extraction in Large Vision Models", arXiv 2502.12892).

The decoder is tied to the data: D = s (W C + Lambda) (eq. 4), the rows of C points of the data (K-means centroids), those of W convex
weights, ||Lambda_i|| <= delta, s a learned scale. With delta = 0 every row, but for s, lies in the data's convex hull. W and
Lambda are brought back to these sets after each step; the encoder is TopK's.

Departures: points are of centred rows, as the decoder adds b_dec; how many there are is set by hand or by the width, as they
are found in the first rows shown (`initialise`), not in a whole data set.

Shape letters: N = rows, E = output width, F = latents, P = points.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..errors import BadInput
from ..method import Loss, not_negative, positive
from .dictionary import Widths
from .topk import TopK

_ROUNDS = 20


class Archetypal(TopK):
    """TopK whose decoder rows are mixtures of data points.

    `W_dec_FD` is made of its parts after each step, so that in use it costs what TopK costs; a step of training adds a product
    of [F, P] and [P, E].

    Args:
        points: centroids P; 0 means F / 4. Fewer rows than that at `initialise` are used several times each.
        delta: greatest distance of a row from the hull, in units of the scaled rows, whose length is about sqrt(E); a large one
            leaves the decoder free.
        seed: of the first mixtures and the encoder; the points do not depend on it. Others as for TopK.
    """

    name = "latents/archetypal"

    point_PE: Tensor
    placed: Tensor

    def __init__(
        self, d_in: Widths, width: int, k: int = 32, d_out: Widths = 0, points: int = 0, delta: float = 1.0, aux_alpha: float = 1 / 32,
        aux_k: int = 0, dead_after: int = 10_000_000, seed: int = 0, skip: bool | str = False,
    ) -> None:
        super().__init__(d_in, width, k, d_out, aux_alpha, aux_k, dead_after, seed, skip)
        self.points = positive("points", points) if points else max(1, width // 4)
        self.delta = not_negative("delta", delta)
        generator = torch.Generator().manual_seed(seed)
        chosen_F = torch.randint(self.points, (width,), generator=generator)
        mix_FP = torch.rand(width, self.points, generator=generator)
        mix_FP = mix_FP / mix_FP.sum(-1, keepdim=True) + torch.nn.functional.one_hot(chosen_F, self.points)
        self.mix_FP, self.relax_FE = nn.Parameter(mix_FP / 2), nn.Parameter(torch.zeros(width, self.d_out))
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("point_PE", normalize(torch.randn(self.points, self.d_out, generator=generator), dim=-1))
        self.register_buffer("placed", torch.zeros((), dtype=torch.long))
        del self.W_dec_FD                                       # no parameter any more, but made of parameters
        self.register_buffer("W_dec_FD", self.composed().detach())

    def composed(self) -> Tensor:
        """[F, E] s (W C + Lambda), differentiable in its parts."""
        return self.log_scale.exp() * (self.mix_FP @ self.point_PE + self.relax_FE)

    @torch.no_grad()
    def initialise(self, x: Tensor, y: Tensor | None = None) -> None:
        """Scale, centre, points, and a scale that makes decoder rows 1 long on average; the encoder starts as the decoder.

        Only the first call counts: shown a larger sample before training, the dictionary keeps its points.
        """
        if self.placed:
            return
        super().initialise(x, y)
        y = x if y is None else y
        y = y if self.W_skip_ED is None else y - self.skipped(x)
        self.point_PE.copy_(centroids(y.float() * self.scale_out.float() - self.b_dec_D.float(), self.points))
        self.log_scale.zero_()
        self.log_scale.sub_(self.composed().norm(dim=-1).mean().clamp_min(1e-6).log())
        self.W_dec_FD.copy_(self.composed())
        if not self.transcodes:
            self.W_enc_FD.copy_(normalize(self.W_dec_FD, dim=-1))
        self.placed.fill_(1)

    def latent_loss(self, x: Tensor, y: Tensor) -> Loss:
        """As TopK, with gradients to what the decoder is made of."""
        kept = self.W_dec_FD
        self._buffers["W_dec_FD"] = self.composed()
        try:
            return super().latent_loss(x, y)
        finally:
            self._buffers["W_dec_FD"] = kept

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Convex weights, ||Lambda_i|| <= delta, and the decoder made of them; a row of weights left without any is spread evenly."""
        mix_FP = self.mix_FP.clamp_(min=0)
        sum_F1 = mix_FP.sum(-1, keepdim=True)
        mix_FP.copy_(torch.where(sum_F1 > 0, mix_FP / sum_F1, 1 / self.points))
        self.relax_FE.mul_((self.delta / self.relax_FE.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1))
        self.W_dec_FD.copy_(self.composed())


def centroids(row_NE: Tensor, points: int) -> Tensor:
    """[P, E] K-means centroids (Lloyd's rounds from rows drawn with a fixed seed); a centre without rows stays where it was.

    Raises:
        BadInput: there are no rows.
    """
    if not len(row_NE):
        raise BadInput("there are no rows to find points in")
    drawn_P = torch.randperm(len(row_NE), generator=torch.Generator().manual_seed(0)).repeat(-(-points // len(row_NE)))[:points]
    centre_PE = row_NE[drawn_P.to(row_NE.device)].clone()
    for _ in range(_ROUNDS):
        nearest_N = (row_NE @ centre_PE.T - centre_PE.square().sum(-1) / 2).argmax(-1)
        count_P1 = torch.bincount(nearest_N, minlength=points)[:, None].to(row_NE)
        sum_PE = torch.zeros_like(centre_PE).index_add_(0, nearest_N, row_NE)
        centre_PE = torch.where(count_P1 > 0, sum_PE / count_P1.clamp_min(1), centre_PE)
    return centre_PE
