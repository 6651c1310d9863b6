"""What a dictionary looks like without any ground truth: dead, dense and duplicate latents, and where its error lies.

Shape letters: N = rows, D = width, G = latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import BadInput
from ..method import positive
from .learned import Learned

DENSE = 0.1
"""Share of rows above which a latent is dense."""
DUPLICATE = 0.95
"""Cosine of decoder rows above which two latents are duplicates."""
_AT_ONCE = 1024


@dataclass(frozen=True)
class Geometry:
    """Shares of all latents."""

    dead: float
    """On in none of the rows read."""
    dense: float
    """On in more than a tenth of them."""
    duplicate: float
    """Living, with another living latent at a cosine above 0.95."""
    nearest: float
    """Mean over living latents of the largest cosine with another; 0 where fewer than two live."""


def geometry(learned: Learned) -> Geometry:
    """Count them."""
    fired_G = learned.codes.fired
    alive_G = fired_G > 0
    most = nearest_other(learned.decoder[alive_G])
    return Geometry(
        float((~alive_G).double().mean()), float((fired_G > DENSE * learned.codes.n).double().mean()),
        int((most > DUPLICATE).sum()) / learned.width, float(most.mean()) if len(most) > 1 else 0.0,
    )


def nearest_other(rows_GD: Tensor) -> Tensor:
    """[G] largest cosine of each row with another; -1 where there is no other. Memory is that of 1,024 rows against all."""
    unit_GD = normalize(rows_GD.float(), dim=-1)
    most_G = torch.full((len(unit_GD),), -1.0)
    for at in torch.arange(len(unit_GD)).split(_AT_ONCE):
        if len(unit_GD) < 2:
            break
        cosine_CG = unit_GD[at] @ unit_GD.T
        cosine_CG[torch.arange(len(at)), at] = -1.0
        most_G[at] = cosine_CG.amax(1)
    return most_G


def fvu_by(x_ND: Tensor, x_hat_ND: Tensor, group_N: Tensor) -> Tensor:
    """[groups] FVU within each group of rows (norm decile, position): squared error over squared distance to the mean of all rows.

    NaN for a group without rows or without variance.

    Args:
        group_N: int64 >= 0.
    """
    if x_ND.shape != x_hat_ND.shape or group_N.shape != x_ND.shape[:1]:
        raise BadInput(f"x {list(x_ND.shape)}, x_hat {list(x_hat_ND.shape)} and group {list(group_N.shape)} must share their rows")
    x = x_ND.double()
    error_N, spread_N = (x - x_hat_ND.double()).pow(2).sum(1), (x - x.mean(0)).pow(2).sum(1)
    count = int(group_N.max()) + 1
    total = [torch.zeros(count, dtype=torch.float64).index_add_(0, group_N, v) for v in (error_N, spread_N)]
    return total[0] / torch.where(total[1] > 0, total[1], torch.nan)


def norm_groups(x_ND: Tensor, groups: int = 10) -> Tensor:
    """[N] number of each row's group by its norm, the shortest first, groups as even as they can be."""
    positive("groups", groups, len(x_ND))
    rank_N = x_ND.double().norm(dim=1).argsort().argsort()
    return rank_N * groups // len(x_ND)
