"""A series of dictionaries over the checkpoints of one training run (SAE-Track; Xu et al. 2024, arXiv 2412.17626).

Dictionary k begins from dictionary k - 1 and is trained for far fewer steps, so that latent f stays the same latent. Over
such a series a feature is seen to form (its strongest tokens become alike) and to drift (its direction turns).

Shape letters: N = rows (tokens), D = width, F = latents, K = strongest rows of a latent, C = checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import BadInput


@dataclass(frozen=True)
class Drift:
    """How decoder directions turn over a series of dictionaries."""

    to_previous_CF: Tensor
    """Cosine of each latent's direction with that of the checkpoint before; the first row, which has none, is 1."""
    to_last_CF: Tensor
    """Cosine with its direction at the last checkpoint."""


def drift(decoders_FD: Sequence[Tensor]) -> Drift:
    """Cosines of decoder rows along a series, latent by latent.

    Raises:
        BadInput: no decoder, or not all of one shape.
    """
    if not decoders_FD or len({tuple(w.shape) for w in decoders_FD}) != 1:
        raise BadInput(f"a series needs decoders of one shape; got {[list(w.shape) for w in decoders_FD]}")
    unit_CFD = normalize(torch.stack([w.detach().float() for w in decoders_FD]), dim=-1)
    before_CFD = torch.cat([unit_CFD[:1], unit_CFD[:-1]])
    return Drift((unit_CFD * before_CFD).sum(-1), (unit_CFD * unit_CFD[-1]).sum(-1))


def identity_kept(old_FD: Tensor, new_FD: Tensor) -> float:
    """Share of latents whose nearest direction (greatest cosine) in the new dictionary is that of the latent of the same number.

    A latent without direction (a row of zeros) is nearest to none.
    """
    if old_FD.shape != new_FD.shape:
        raise BadInput(f"dictionaries of {list(old_FD.shape)} and {list(new_FD.shape)} have no latents in common; compare equal shapes")
    old, new = (normalize(w.detach().float(), dim=-1) for w in (old_FD, new_FD))
    same = 0
    for number_M in torch.arange(len(old)).split(1024):
        value_M, nearest_M = (old[number_M] @ new.T).max(-1)
        same += int(((nearest_M == number_M.to(nearest_M.device)) & (value_M > 0)).sum())
    return same / len(old)


def formation(x_ND: Tensor, at_FK: Tensor) -> Tensor:
    """[F]: how much more alike the rows of a latent are to one another than rows are in general (the paper's progress measure).

    The mean cosine over pairs of the latent's rows less the mean over all pairs of different rows. About 0 while the rows
    have nothing in common but what all have, and growing as the feature forms.

    Args:
        x_ND: activations of one checkpoint.
        at_FK: numbers of rows that stand for each latent at every checkpoint, such as its strongest at the last one; -1 fills
            up where there are fewer. A latent with fewer than two gives NaN.
    """
    if x_ND.ndim != 2 or len(x_ND) < 2 or at_FK.ndim != 2 or (at_FK.numel() and int(at_FK.max()) >= len(x_ND)):
        raise BadInput(f"rows {list(x_ND.shape)} and places {list(at_FK.shape)} must be [N, D] with N >= 2 and [F, K] of row numbers below N")
    unit_ND = normalize(x_ND.double(), dim=-1)
    sum_FD = torch.zeros(len(at_FK), x_ND.shape[1], dtype=torch.float64, device=x_ND.device)
    for at_F in at_FK.T:
        there_F = at_F >= 0
        sum_FD += unit_ND[at_F.clamp_min(0)] * there_F[:, None]
    return _pairs(sum_FD, (at_FK >= 0).sum(-1)) - _pairs(unit_ND.sum(0), torch.tensor(len(x_ND)))


def _pairs(sum_D: Tensor, count: Tensor) -> Tensor:
    """Mean cosine over pairs of different unit vectors from their sum: |sum|^2 holds each pair twice and each vector with itself."""
    return torch.where(count >= 2, (sum_D.square().sum(-1) - count) / (count * (count - 1)), torch.nan)
