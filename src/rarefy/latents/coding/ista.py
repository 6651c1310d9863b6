"""ISTA and FISTA (Beck & Teboulle 2009): codes by proximal gradient steps, many rows at once.

    min_z 1/2 ||x - z D||^2 + weight * sum_f phi(z_f)        z <- prox(z - (z D - x) D' / L),  L = ||D||_2^2 exactly

A row stops by its own measure and leaves the batch, so that its code does not depend on its neighbours. Measures, relative:
the duality gap over 1/2 ||x||^2 for the convex penalty, so that a stopped row is proven that near the optimum; the length of
the next step over that of the code for the others, which have stationary points only.

Shape letters: B = rows, D = width, F = atoms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import BadInput
from ...method import not_negative, positive
from ...selection import check_finite
from .penalty import penalty as named
from .penalty import proximal
from .support import eager

_LOOK = 10
"""Iterations between looks at which rows are done."""


class Solved(NamedTuple):
    """Codes, and how they were come by."""

    codes: Tensor
    """[B, F]."""
    steps: Tensor
    """[B] int64, iterations (sweeps, for coordinate descent) made."""
    left: Tensor
    """[B] the stopping measure at the end; above the tolerance where `most` iterations were not enough."""


def check_problem(x_BD: Tensor, atoms_FD: Tensor, weight: float, tolerance: float, most: int, start: Tensor | None) -> None:
    """Raise BadInput for shapes that do not fit, values that are not finite, or numbers out of range."""
    if x_BD.ndim != 2 or atoms_FD.ndim != 2 or x_BD.shape[1] != atoms_FD.shape[1] or not atoms_FD.numel():
        raise BadInput(f"rows {list(x_BD.shape)} and atoms {list(atoms_FD.shape)} must be [B, D] and [F, D] with F and D at least 1")
    if start is not None and start.shape != (len(x_BD), len(atoms_FD)):
        raise BadInput(f"start has shape {list(start.shape)}; codes are {[len(x_BD), len(atoms_FD)]}")
    check_finite(x_BD, "rows to code")
    check_finite(atoms_FD, "atoms")
    not_negative("weight", weight)
    not_negative("tolerance", tolerance)
    positive("most", most)


def lipschitz(atoms_FD: Tensor) -> float:
    """||D||_2^2, the largest eigenvalue of the smaller of the two Gram matrices."""
    small = atoms_FD if atoms_FD.shape[0] <= atoms_FD.shape[1] else atoms_FD.T
    return float(torch.linalg.eigvalsh(small @ small.T)[-1])


class Operator(NamedTuple):
    """z -> z D as functions, for dictionaries that are never written out; rows and codes are flat."""

    synthesis: Callable[[Tensor], Tensor]
    """[B, F] -> [B, D]."""
    pull: Callable[[Tensor], Tensor]
    """Its adjoint, [B, D] -> [B, F]."""
    lipschitz: float
    """||D||_2^2, or a bound from above."""

    @classmethod
    def dense(cls, atoms_FD: Tensor) -> Operator:
        """Of a matrix."""
        return cls(lambda z: z @ atoms_FD, lambda r: r @ atoms_FD.T, lipschitz(atoms_FD))


def relative_gap(x_BD: Tensor, dictionary: Tensor | Operator, z_BF: Tensor, weight: float, positive: bool = False) -> Tensor:
    """[B] duality gap of the lasso at z over 1/2 ||x||^2, >= 0 up to rounding; 0 for a row of zeros whose code is 0.

    The dual point is the residual times the factor that is best among those that keep it feasible.
    """
    d = Operator.dense(dictionary) if isinstance(dictionary, Tensor) else dictionary
    r_BD = x_BD - d.synthesis(z_BF)
    pull_BF = d.pull(r_BD)
    size = pull_BF.clamp_min(0).amax(-1) if positive else pull_BF.abs().amax(-1)
    tiny = torch.finfo(x_BD.dtype).tiny
    most_B, square_B = weight / size.clamp_min(tiny), r_BD.square().sum(-1)
    factor_B = torch.minimum(most_B, ((r_BD * x_BD).sum(-1) / square_B.clamp_min(tiny)).clamp_min(0))
    primal_B = square_B / 2 + weight * z_BF.abs().sum(-1)
    dual_B = factor_B * (r_BD * x_BD).sum(-1) - factor_B.square() * square_B / 2
    return (primal_B - dual_B) / (x_BD.square().sum(-1) / 2).clamp_min(tiny)


@eager
@torch.no_grad()
def fista(
    x_BD: Tensor, atoms_FD: Tensor, weight: float, *, penalty: str = "soft", positive: bool = False, start: Tensor | None = None,
    tolerance: float = 1e-6, most: int = 1000, accelerate: bool = True,
) -> Solved:
    """Codes of rows on a fixed dictionary.

    Args:
        x_BD: rows. atoms_FD: of any length. weight: of the penalty. penalty: soft, hard, half, two_thirds or cel0.
        positive: codes >= 0. start: codes to begin at (default 0). tolerance: of the stopping measure; in no case below 8 roundings.
        most: iterations.
        accelerate: Nesterov's momentum, dropped by a row whenever it points uphill (O'Donoghue & Candes 2015, gradient
            scheme). Off, or with a penalty that is not convex: plain steps, each of which lowers the objective.

    Raises:
        BadInput: an argument out of range, or rows or atoms that are not finite.
    """
    check_problem(x_BD, atoms_FD, weight, tolerance, most, start)
    codes_BF = x_BD.new_zeros(len(x_BD), len(atoms_FD)) if start is None else start.to(x_BD)
    return descend(x_BD, Operator.dense(atoms_FD), codes_BF, weight, penalty, positive, tolerance, most, accelerate)


@torch.no_grad()
def descend(
    x_BD: Tensor, d: Operator, start_BF: Tensor, weight: float, penalty: str, positive: bool, tolerance: float, most: int, accelerate: bool,
) -> Solved:
    """`fista` for any linear dictionary; arguments as there, and unchecked."""
    convex, step = named(penalty).convex, 1 / max(d.lipschitz, torch.finfo(x_BD.dtype).tiny ** 0.5)
    codes_BF, steps_B, left_B = start_BF.clone(), torch.zeros(len(x_BD), dtype=torch.long, device=x_BD.device), x_BD.new_zeros(len(x_BD))

    def moved(x: Tensor, y: Tensor) -> Tensor:
        return proximal(penalty, y - step * d.pull(d.synthesis(y) - x), step, weight, positive)

    def measure(x: Tensor, z: Tensor) -> Tensor:
        if convex and weight > 0:
            return relative_gap(x, d, z, weight, positive)
        return (moved(x, z) - z).norm(dim=-1) / z.norm(dim=-1).clamp_min(torch.finfo(x.dtype).tiny ** 0.5)

    at, x, z = torch.arange(len(x_BD), device=x_BD.device), x_BD, proximal(penalty, codes_BF, 0.0, 0.0, positive)
    y, t = z, x_BD.new_ones(len(x_BD), 1)
    for count in range(most + 1):
        if count % _LOOK == 0 or count == most:
            left = measure(x, z)
            codes_BF[at], steps_B[at], left_B[at] = z, count, left
            going = left > max(tolerance, 8 * torch.finfo(x.dtype).eps)
            at, x, z, y, t = (v[going] for v in (at, x, z, y, t))
            if not len(at) or count == most:
                break
        new = moved(x, y)
        if accelerate and convex:
            uphill = ((y - new) * (new - z)).sum(-1, keepdim=True) > 0
            t_new = torch.where(uphill, 1.0, (1 + (1 + 4 * t.square()).sqrt()) / 2)
            y, t = torch.where(uphill, new, new + (t - 1) / t_new * (new - z)), t_new
        else:
            y = new
        z = new
    return Solved(codes_BF, steps_B, left_B)
