"""Coordinate descent for the lasso (Friedman, Hastie & Tibshirani 2010), all rows at one coordinate at a time.

    z_f <- soft(c_f + ||d_f||^2 z_f, weight) / ||d_f||^2,   c = (x - z D) D' kept up to date through the Gram matrix

It needs the Gram matrix, F^2 numbers, and no step size; on coherent dictionaries it takes far fewer sweeps than FISTA takes steps.

Shape letters: B = rows, D = width, F = atoms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ista import Operator, Solved, check_problem, relative_gap
from .penalty import proximal
from .support import eager


@eager
@torch.no_grad()
def coordinate_descent(
    x_BD: Tensor, atoms_FD: Tensor, weight: float, *, positive: bool = False, start: Tensor | None = None, tolerance: float = 1e-6,
    most: int = 1000,
) -> Solved:
    """Codes min 1/2 ||x - z D||^2 + weight ||z||_1 of rows on a fixed dictionary; a row stops by its duality gap.

    Args:
        positive: codes >= 0. start: codes to begin at (default 0). tolerance: duality gap over 1/2 ||x||^2; at weight 0, largest
            change of a sweep over the largest code; in no case below 8 roundings. most: sweeps. An atom of length 0 keeps the code 0.

    Raises:
        BadInput: an argument out of range, or rows or atoms that are not finite.
    """
    check_problem(x_BD, atoms_FD, weight, tolerance, most, start)
    gram_FF = atoms_FD @ atoms_FD.T
    square_F = gram_FF.diagonal().tolist()
    codes_BF = x_BD.new_zeros(len(x_BD), len(atoms_FD)) if start is None else proximal("soft", start.to(x_BD), 0.0, 0.0, positive)
    steps_B, left_B = torch.zeros(len(x_BD), dtype=torch.long, device=x_BD.device), x_BD.new_zeros(len(x_BD))
    at, x, z_FB = torch.arange(len(x_BD), device=x_BD.device), x_BD, codes_BF.T.clone(memory_format=torch.contiguous_format)
    c_FB = atoms_FD @ x.T - gram_FF @ z_FB
    before_FB, own = z_FB.clone(), Operator(lambda z: z @ atoms_FD, lambda r: r @ atoms_FD.T, 0.0)        # no step size is needed
    for count in range(most + 1):
        if weight > 0:
            left = relative_gap(x, own, z_FB.T, weight, positive)
        elif count:
            left = (z_FB - before_FB).abs().amax(0) / z_FB.abs().amax(0).clamp_min(torch.finfo(x.dtype).tiny)
        else:
            left = x.new_full((len(x),), torch.inf)
        codes_BF[at], steps_B[at], left_B[at] = z_FB.T, count, left
        going = left > max(tolerance, 8 * torch.finfo(x.dtype).eps)
        if not going.any() or count == most:
            break
        if not going.all():
            at, x, z_FB, c_FB = at[going], x[going], z_FB[:, going], c_FB[:, going]
        before_FB = z_FB.clone()
        for f, square in enumerate(square_F):
            if square > 0:
                new_B = proximal("soft", c_FB[f] + square * z_FB[f], 1.0, weight, positive) / square
                c_FB.addr_(gram_FF[f], z_FB[f] - new_B)
                z_FB[f] = new_B
    return Solved(codes_BF, steps_B, left_B)
