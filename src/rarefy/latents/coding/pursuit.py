"""Greedy codes of a fixed number of atoms, many rows at once: orthogonal matching pursuit and gradient pursuit.

Each step adds the atom not yet taken whose correlation with the residual, over its length, is largest. Orthogonal matching
pursuit (Pati, Rezaiifar & Krishnaprasad 1993) then solves least squares on all atoms taken; its non-negative form (Bruckstein,
Elad & Zibulevsky 2008) takes positive correlations and solves it over codes >= 0. Gradient pursuit (Blumensath & Davies 2008)
makes one exact line search along the gradient in place of the solve, and clips at 0 in its non-negative form.

Shape letters: B = rows, D = width, F = atoms, K = atoms taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import BadInput
from ...method import positive as whole
from .ista import check_problem
from .support import eager, positive_solve


def _least_squares(own_BKD: Tensor, x_BD: Tensor, z_BK: Tensor, live_BK: Tensor, positive: bool) -> Tensor:
    gram_BKK, b_BK = own_BKD @ own_BKD.mT, (own_BKD @ x_BD[:, :, None])[:, :, 0]
    if positive:
        return positive_solve(gram_BKK, b_BK, z_BK, live_BK)[0]
    held = torch.diag_embed((~live_BK).to(gram_BKK))
    solution_BK = torch.linalg.solve_ex(gram_BKK + held, b_BK)[0]
    return torch.where(torch.isfinite(solution_BK).all(-1, keepdim=True), solution_BK, z_BK)


def _line_search(own_BKD: Tensor, x_BD: Tensor, z_BK: Tensor, live_BK: Tensor, positive: bool) -> Tensor:
    r_BD = x_BD - (z_BK[:, None] @ own_BKD)[:, 0]
    way_BK = (own_BKD @ r_BD[:, :, None])[:, :, 0]
    if positive:
        way_BK = torch.where((z_BK <= 0) & (way_BK < 0), 0.0, way_BK)
    way_BD = (way_BK[:, None] @ own_BKD)[:, 0]
    size_B1 = way_BD.square().sum(-1, keepdim=True)
    far = (r_BD * way_BD).sum(-1, keepdim=True) / torch.where(size_B1 > 0, size_B1, 1.0)
    z_BK = z_BK + far * way_BK
    return z_BK.clamp_min(0) if positive else z_BK


_UPDATES = {"orthogonal": _least_squares, "gradient": _line_search}


@eager
def pursuit(x_BD: Tensor, atoms_FD: Tensor, k: int, *, by: str = "orthogonal", positive: bool = False) -> tuple[Tensor, Tensor]:
    """(codes [B, K], atoms [B, K] int64): k different atoms a row, in the order taken.

    A row that is explained to rounding, or for `positive` has no atom left with a positive correlation, has codes 0 for what it
    takes after that. "gradient" is differentiable in rows and atoms, the choice held fixed; "orthogonal" is not: see `implicit`.

    Args:
        x_BD: rows. atoms_FD: of any length. k: in 1..min(F, D). by: orthogonal or gradient. positive: codes >= 0.

    Raises:
        BadInput: an argument out of range, or rows or atoms that are not finite.
    """
    check_problem(x_BD, atoms_FD, 0.0, 0.0, 1, None)
    whole("k", k, min(atoms_FD.shape))
    if by not in _UPDATES:
        raise BadInput(f"by={by!r} must be one of {', '.join(_UPDATES)}")
    with torch.set_grad_enabled(torch.is_grad_enabled() and by == "gradient"):
        return _pursue(x_BD, atoms_FD, k, by, positive)


def _pursue(x_BD: Tensor, atoms_FD: Tensor, k: int, by: str, positive: bool) -> tuple[Tensor, Tensor]:
    tiny = torch.finfo(x_BD.dtype).tiny ** 0.5
    length_F = atoms_FD.detach().norm(dim=-1).clamp_min(tiny)
    least_B1 = x_BD.detach().norm(dim=-1, keepdim=True) * torch.finfo(x_BD.dtype).eps ** 0.75
    taken_BF = torch.zeros(len(x_BD), len(atoms_FD), dtype=torch.bool, device=x_BD.device)
    index_BK, live_BK = torch.empty(len(x_BD), 0, dtype=torch.long, device=x_BD.device), taken_BF[:, :0]
    z_BK, own_BKD = x_BD.new_zeros(len(x_BD), 0), x_BD.new_zeros(len(x_BD), 0, x_BD.shape[1])
    for _ in range(k):
        with torch.no_grad():
            r_BD = x_BD - (z_BK[:, None] @ own_BKD)[:, 0]
            c_BF = (r_BD @ atoms_FD.T) / length_F
            value_B1, new_B1 = (c_BF if positive else c_BF.abs()).masked_fill(taken_BF, -torch.inf).max(-1, keepdim=True)
            taken_BF = taken_BF.scatter(-1, new_B1, True)
            index_BK = torch.cat((index_BK, new_B1), -1)
            live_BK = torch.cat((live_BK, value_B1 > least_B1), -1)
        own_BKD = atoms_FD[index_BK] * live_BK[:, :, None]
        z_BK = _UPDATES[by](own_BKD, x_BD, torch.cat((z_BK, z_BK.new_zeros(len(z_BK), 1)), -1), live_BK, positive)
    return z_BK, index_BK
