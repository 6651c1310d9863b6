"""Data with a known sparse dictionary, and how well a learned one recovers it.

x = codes @ dictionary + noise, the generative model of sparse coding (Olshausen & Field 1996); the dictionary has more
rows than x has dimensions, so that no rotation finds it.

Shape letters: N = rows, D = width, F = true features, G = learned features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import BadInput
from ..method import positive
from ..selection import check_finite


@dataclass(frozen=True)
class Planted:
    """Rows and what they are made of."""

    x: Tensor
    """[N, D] float32."""
    codes: Tensor
    """[N, F] float32, zero or positive."""
    dictionary: Tensor
    """[F, D] float32, rows of length 1."""


def make(
    n: int, d: int, features: int, l0: float, *, noise: float = 0.0, correlation: float = 0.0, group: int = 8,
    skew: float = 0.0, seed: int = 0,
) -> Planted:
    """Draw a random dictionary and rows that use about `l0` of its features each.

    Feature f is on with its own rate, independently or together with its group, at a strength uniform in [0.5, 1.5].

    Args:
        n: rows. d: width. features: F. l0: mean number of features a row, in (0, F].
        noise: root mean square of the Gaussian noise over that of the signal, >= 0.
        correlation: in [0, 1): of the Gaussians (one factor a group) behind features of the same group.
        group: features a group.
        skew: rates fall as rank^-skew; 0 makes them equal. A rate never exceeds 1, and the mean stays l0 / F.
        seed: the dictionary and the rows are functions of it.

    Raises:
        BadInput: an argument out of range.
    """
    check_sizes(n, d, features, l0, noise)
    positive("group", group)
    if not 0 <= correlation < 1:
        raise BadInput(f"correlation={correlation} must be in [0, 1)")
    if not (math.isfinite(skew) and skew >= 0):
        raise BadInput(f"skew={skew} must be finite and at least 0")
    generator = seeded(seed)
    dictionary_FD = torch.nn.functional.normalize(torch.randn(features, d, generator=generator), dim=-1)
    rate_F = _rates(features, l0, skew)
    own_NF = torch.randn(n, features, generator=generator)
    shared_NC = torch.randn(n, -(-features // group), generator=generator)
    z_NF = math.sqrt(correlation) * shared_NC.repeat_interleave(group, 1)[:, :features] + math.sqrt(1 - correlation) * own_NF
    on_NF = z_NF < torch.special.ndtri(rate_F)      # a Gaussian copula: each rate is exact whatever the correlation
    codes_NF = (0.5 + torch.rand(n, features, generator=generator)) * on_NF
    x_ND = codes_NF @ dictionary_FD
    if noise:
        x_ND = x_ND + noise * x_ND.square().mean().sqrt() * torch.randn(n, d, generator=generator)
    return Planted(x_ND, codes_NF, dictionary_FD)


def check_sizes(n: int, d: int, features: int, l0: float, noise: float) -> None:
    """Raise BadInput if what every kind of planted data is given is out of range."""
    for name, size in (("n", n), ("d", d), ("features", features)):
        positive(name, size)
    if not 0 < l0 <= features:
        raise BadInput(f"l0={l0} must be in (0, {features}]: features that a row uses")
    if not (math.isfinite(noise) and noise >= 0):
        raise BadInput(f"noise={noise} must be finite and at least 0")


def seeded(seed: int) -> torch.Generator:
    """Salted: a method initialised from the plain seed would otherwise draw the very same dictionary and need no training."""
    return torch.Generator().manual_seed((seed + 0x9E3779B97F4A7C15) % 2**63)


def _rates(features: int, l0: float, skew: float) -> Tensor:
    """[F] rates that sum to l0: c * rank^-skew capped at 1, c by bisection."""
    shape_F = torch.arange(1, features + 1, dtype=torch.float64).pow(-skew)
    low, high = 0.0, float(1 / shape_F.min())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((middle * shape_F).clamp(max=1).sum()) < l0 else (low, middle)
    return (high * shape_F).clamp(max=1).float()


@dataclass(frozen=True)
class Recovery:
    """How near learned features are to true ones."""

    mmcs: float
    """Mean over true features of the best cosine with any learned one (mean max cosine similarity, Sharkey et al. 2022)."""
    mcc: float
    """Mean cosine under the best one-to-one match (mean correlation coefficient); a true feature without partner counts 0."""
    match: Tensor
    """[F] int64: learned feature matched to each true one, -1 where there are too few."""


def recovery(learned_GD: Tensor, dictionary_FD: Tensor) -> Recovery:
    """Compare directions; lengths do not matter, signs do. A learned row of zeros has cosine 0 with everything.

    Raises:
        BadInput: not two matrices of one width, an empty one, or values that are not finite.
    """
    if learned_GD.ndim != 2 or dictionary_FD.ndim != 2 or learned_GD.shape[1] != dictionary_FD.shape[1]:
        raise BadInput(f"learned {list(learned_GD.shape)} and dictionary {list(dictionary_FD.shape)} must be [G, D] and [F, D]")
    if not learned_GD.numel() or not dictionary_FD.numel():
        raise BadInput("recovery needs at least one learned and one true feature")
    check_finite(learned_GD, "learned")
    check_finite(dictionary_FD, "dictionary")
    unit = [torch.nn.functional.normalize(t.detach().cpu().double(), dim=-1) for t in (dictionary_FD, learned_GD)]
    cosine_FG = unit[0] @ unit[1].T
    match_F = assign(cosine_FG)
    there = match_F >= 0
    matched = cosine_FG[there.nonzero().flatten(), match_F[there]]
    return Recovery(float(cosine_FG.amax(1).mean()), float(matched.sum() / len(cosine_FG)), match_F)


def assign(score_FG: Tensor) -> Tensor:
    """[F] int64: a one-to-one match of rows to columns with the greatest total score; -1 for rows left over.

    Shortest augmenting paths with dual variables (Kuhn 1955; Jonker & Volgenant 1987), O(min^2 * max). Of several best matches,
    which one is not said.
    """
    cost = -score_FG.detach().cpu().double().numpy()
    flip = cost.shape[0] > cost.shape[1]
    row_of = _paths()(np.ascontiguousarray(cost.T if flip else cost))
    if flip:
        return torch.from_numpy(row_of)
    out = np.full(len(cost), -1, dtype=np.int64)
    columns = (row_of >= 0).nonzero()[0]
    out[row_of[columns]] = columns
    return torch.from_numpy(out)


def _paths() -> Callable[[np.ndarray], np.ndarray]:
    """The compiled loops where numba is there: 4,096 x 4,096 in seconds instead of minutes."""
    try:
        from .assignment import shortest_paths
    except ImportError:
        return _shortest_paths
    return shortest_paths


def _shortest_paths(cost: np.ndarray) -> np.ndarray:
    """Row matched to each column (-1: none); every row is matched. Needs rows <= columns."""
    rows, columns = cost.shape
    u, v = np.zeros(rows), np.zeros(columns)
    row_of = np.full(columns, -1, dtype=np.int64)
    for first in range(rows):
        shortest, came_from = np.full(columns, np.inf), np.full(columns, -1, dtype=np.int64)
        done, row, column, reached = np.zeros(columns, dtype=bool), first, -1, 0.0
        while True:
            through = reached + cost[row] - u[row] - v
            better = ~done & (through < shortest)
            shortest[better], came_from[better] = through[better], column
            column = int(np.where(done, np.inf, shortest).argmin())
            reached = shortest[column]
            if row_of[column] < 0:
                break
            done[column] = True
            row = int(row_of[column])
        inside = done.nonzero()[0]
        u[first] += reached
        u[row_of[inside]] += reached - shortest[inside]
        v[inside] += shortest[inside] - reached
        while column >= 0:
            before = came_from[column]
            row_of[column] = first if before < 0 else row_of[before]
            column = int(before)
    return row_of

