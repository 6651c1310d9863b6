"""The heaviest units of a row that together reach a share of it (top-p), without sorting.

Shape letters: N = units of a row; X = rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import native


def reach(mass: Tensor, first: Tensor, rest: float) -> Tensor:
    """[..., N] bool: units whose mass and that of all lighter ones make `rest` of the row's or more; those of `first` count before all others.

    Of equally heavy units the one with the lower index counts first. Masses are not negative, sums float64.

    Args:
        mass: [..., N] float32 or float64.
        first: [..., N] bool, kept in any case.
        rest: 1 - p; 0 keeps everything.
    """
    N, first = mass.shape[-1], first.expand(mass.shape)
    if not mass.numel():
        return first.clone()
    if native.serves(mass, dtypes=(torch.float32,)):
        from .reach_loops import reach as run

        mass = mass.detach().contiguous().view(-1, N)
        out = np.empty(mass.shape, np.bool_)
        given = (mass.numpy(), mass.view(torch.int32).numpy(), first.contiguous().view(-1, N).numpy(), rest)
        native.spread(run, len(mass), *given, out, least=4)
        return torch.from_numpy(out).view(first.shape)
    wide = mass.detach().double()
    order = (wide + 2 * wide.sum(-1, keepdim=True) * first).argsort(dim=-1, descending=True, stable=True)
    sorted_ = wide.gather(-1, order)
    total = sorted_.sum(-1, keepdim=True)
    return torch.empty_like(first).scatter_(-1, order, sorted_.cumsum(-1) - sorted_ <= total - rest * total) | first
