"""Sparse canonical correlation with one view in its features and the other in its kernel (Hardoon & Shawe-Taylor 2011, "Sparse
Canonical Correlation Analysis", arXiv 0908.2724).

    min over w, e   ||X w - K e||^2 + mu ||w||_1 + gamma ||e without e_k||_1      with ||e||_inf = 1 by e_k = 1    (eq. 12-14)

for each index k in turn, which excludes e = 0: sample k of the second view is explained by few features of the first and few
other samples of the second. Each problem is convex; all are solved at once by coordinate descent, w and e in alternation, by
soft-thresholded least squares, with e_i cut to [-1, 1]. The paper leaves the constraint on w, e beyond this to the data (it
also has a form with e >= 0); further pairs come from deflation.

Shape letters: N = samples, D = features of the first view, B = indices k solved for, V = D + N coordinates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import BadInput
from ...method import not_negative, positive
from ...selection import check_finite


class Pair(NamedTuple):
    """One direction in each view."""

    w: Tensor
    """[D] weights of features of the first view."""
    e: Tensor
    """[N] weights of samples of the second; one is 1."""
    correlation: float
    """Of X w and K e over the samples fitted to; 0 where either is constant."""
    index: int
    """k."""


def _check(x_ND: Tensor, kernel_NN: Tensor, mu: float, gamma: float) -> None:
    if x_ND.ndim != 2 or not x_ND.numel() or kernel_NN.shape != (len(x_ND), len(x_ND)):
        raise BadInput(f"x {list(x_ND.shape)} and kernel {list(kernel_NN.shape)} must be [N, D] and [N, N]")
    check_finite(x_ND, "x")
    check_finite(kernel_NN, "kernel")
    not_negative("mu", mu)
    not_negative("gamma", gamma)


def correlations(a_BN: Tensor, b_BN: Tensor) -> Tensor:
    """[B] of rows; 0 where one is constant."""
    a, b = (v - v.mean(-1, keepdim=True) for v in (a_BN, b_BN))
    scale = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(scale > 0, (a * b).sum(-1) / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0.0)


@torch.no_grad()
def solve(
    x_ND: Tensor, kernel_NN: Tensor, mu: float, gamma: float, index_B: Tensor, *, most: int = 500, tolerance: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    """(w [B, D], e [B, N]) for each index k.

    Args:
        mu, gamma: weights. most: sweeps. tolerance: largest change of a sweep, in units of 1, the largest e.

    Raises:
        BadInput: shapes that do not fit, values that are not finite, weights below 0, or an index out of range.
    """
    _check(x_ND, kernel_NN, mu, gamma)
    n, d = x_ND.shape
    if index_B.numel() and not 0 <= int(index_B.min()) <= int(index_B.max()) < n:
        raise BadInput(f"index must be in 0..{n - 1}; it holds {int(index_B.min())} to {int(index_B.max())}")
    column_VN = torch.cat((x_ND.T, -kernel_NN.T))
    gram_VV = column_VN @ column_VN.T
    square = gram_VV.diagonal().tolist()
    value_VB = x_ND.new_zeros(d + n, len(index_B))
    value_VB[d + index_B, torch.arange(len(index_B))] = 1
    pull_VB = -(gram_VV @ value_VB)                         # half the negative gradient of the squares
    fixed_VB = torch.zeros_like(value_VB, dtype=torch.bool)
    fixed_VB[d + index_B, torch.arange(len(index_B))] = True
    for _ in range(positive("most", most)):
        before_VB = value_VB.clone()
        for v, size in enumerate(square):
            if size <= 0:
                continue
            best = pull_VB[v] / size + value_VB[v]
            new = (best.abs() - (mu if v < d else gamma) / 2 / size).clamp_min(0) * best.sign()
            new = new if v < d else torch.where(fixed_VB[v], 1.0, new.clamp(-1, 1))
            pull_VB.addr_(gram_VV[v], value_VB[v] - new)
            value_VB[v] = new
        if not len(index_B) or float((value_VB - before_VB).abs().max()) <= tolerance:
            break
    return value_VB[:d].T.contiguous(), value_VB[d:].T.contiguous()


def sparse_cca(x_ND: Tensor, kernel_NN: Tensor, mu: float, gamma: float, pairs: int = 1, *, indices: int = 0, seed: int = 0) -> list[Pair]:
    """Directions of greatest correlation, one pair after another; fewer than `pairs` where nothing correlates any more.

    Of the solutions for all indices k the one with the greatest correlation is taken; then both views lose what it explains:
    X <- (I - u u') X and K <- (I - v v') K (I - v v') with u, v the unit vectors along X w and K e.

    Args:
        x_ND, kernel_NN: centred by the caller where that is wanted. mu, gamma: weights of the two l1 norms.
        indices: how many k, drawn by `seed`, are tried for a pair; 0 tries all.

    Raises:
        BadInput: as for `solve`, or pairs or indices out of range.
    """
    _check(x_ND, kernel_NN, mu, gamma)
    n = len(x_ND)
    positive("pairs", pairs)
    generator, found = torch.Generator().manual_seed(seed), []
    at_B = torch.randperm(n, generator=generator)[: positive("indices", indices, n)] if indices else torch.arange(n)
    for _ in range(pairs):
        w_BD, e_BN = solve(x_ND, kernel_NN, mu, gamma, at_B)
        u_BN, v_BN = w_BD @ x_ND.T, e_BN @ kernel_NN.T
        corr_B = torch.where((w_BD != 0).any(-1), correlations(u_BN, v_BN).abs(), 0.0)
        best = int(corr_B.argmax())
        if not corr_B[best] > 0:
            break
        found.append(Pair(w_BD[best], e_BN[best], float(corr_B[best]), int(at_B[best])))
        u, v = (torch.nn.functional.normalize(s[best], dim=0)[:, None] for s in (u_BN, v_BN))
        x_ND = x_ND - u @ (u.T @ x_ND)
        kernel_NN = kernel_NN - v @ (v.T @ kernel_NN)
        kernel_NN = kernel_NN - (kernel_NN @ v) @ v.T
    return found
