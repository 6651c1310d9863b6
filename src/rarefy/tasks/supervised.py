"""Dictionaries made from labels: what a sparse dictionary could at best do for given concepts (Makelov et al. 2024).

Two kinds, both with codes 1 where a row has the concept: conditional means, d_c = mean(x | c) - mean(x), which ignore that
concepts occur together; and least squares, which share out what co-occurring concepts explain. Their three axes:
approximation (FVU and the loss when spliced), control (`disentangle.control`), interpretability (`match`).

Shape letters: N = rows, D = width, F = latents, C = concepts, L = thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput
from .codes import Codes, Lens


@dataclass(frozen=True)
class Supervised:
    """One direction a concept."""

    mean_D: Tensor
    """What a row without any concept is taken for."""
    direction_CD: Tensor

    def __call__(self, y_NC: Tensor) -> Tensor:
        """[..., D] rows as their concepts have it."""
        return y_NC.to(self.direction_CD) @ self.direction_CD + self.mean_D

    def lens(self, y_NC: Tensor) -> Lens:
        """The concepts as codes: how far each moves a row, along a direction of length 1, so that the strongest is the one that matters most."""
        row_M, latent_M = y_NC.nonzero(as_tuple=True)
        length_C = self.direction_CD.norm(dim=-1)
        return Lens(Codes.sparse(latent_M, length_C[latent_M], row_M, *y_NC.shape), self.direction_CD / length_C.clamp_min(1e-12)[:, None])


def conditional_means(x_ND: Tensor, y_NC: Tensor) -> Supervised:
    """d_c = mean(x | c) - mean(x). Raises BadInput for a concept that no row has."""
    count_C = y_NC.sum(0)
    if (count_C == 0).any():
        raise BadInput(f"no row has concept {int((count_C == 0).nonzero()[0])}; leave it out")
    mean_D = x_ND.mean(0)
    return Supervised(mean_D, y_NC.to(x_ND).T @ x_ND / count_C[:, None] - mean_D)


def least_squares(x_ND: Tensor, y_NC: Tensor) -> Supervised:
    """min sum |x - mean - y V|^2 with a free mean; of several solutions the one of least norm (concepts may imply each other)."""
    design_NC = torch.cat([y_NC.double(), torch.ones(len(y_NC), 1, dtype=torch.float64)], 1)
    gram_CC, target_CD = design_NC.T @ design_NC, design_NC.T @ x_ND.double()
    solved_CD = (torch.linalg.pinv(gram_CC, hermitian=True, rtol=1e-10) @ target_CD).float()
    return Supervised(solved_CD[-1], solved_CD[:-1])


SHARES = (0.0, 0.125, 0.25, 0.5)
"""Thresholds, as shares of each latent's strongest activation on side 0."""


@dataclass(frozen=True)
class Match:
    """Each concept's best latent."""

    f1_C: Tensor
    """On side 1."""
    latent_C: Tensor
    """Latent and threshold were chosen on side 0."""

    @property
    def f1(self) -> float:
        """Mean over concepts."""
        return float(self.f1_C.mean())


def match(codes: Codes, y_NC: Tensor, side_N: Tensor) -> Match:
    """F1 of the single latent that predicts each concept best by being active, or above a share of its strongest activation."""
    chosen, held = (codes.take((side_N == s).nonzero()[:, 0]) for s in (0, 1))
    most_F = _most(chosen)
    score_LFC = torch.stack([_f1(chosen, share * most_F, y_NC[side_N == 0]) for share in SHARES])
    at_C = score_LFC.flatten(0, 1).argmax(0)
    level_C, latent_C = at_C // codes.width, at_C % codes.width
    held_LFC = torch.stack([_f1(held, share * most_F, y_NC[side_N == 1]) for share in SHARES])
    return Match(held_LFC[level_C, latent_C, torch.arange(y_NC.shape[1])], latent_C)


def _most(codes: Codes) -> Tensor:
    if codes.dense_NF is not None:
        return codes.dense_NF.amax(0).clamp_min(0)
    return torch.zeros(codes.width).scatter_reduce(0, codes.latent_M, codes.value_M, "amax")


def _f1(codes: Codes, over_F: Tensor, y_NC: Tensor) -> Tensor:
    """[F, C] F1 of each latent's being above its threshold, for each concept, at the frequencies that there are."""
    both_F = codes.over(over_F).sums(torch.cat([y_NC.float(), torch.ones(len(y_NC), 1)], 1))
    hits_FC, fires_F1 = both_F[:, :-1], both_F[:, -1:]
    return 2 * hits_FC / (fires_F1 + y_NC.sum(0)).clamp_min(1)
