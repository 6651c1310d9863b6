"""Codes on a known support: exact solutions there, and the derivative of a solution by the implicit function theorem.

A first-order solver finds the support of a code early and its values slowly. Given the support they are the solution of a
small linear system, and whether it is the right support can be read off the correlations of the residual with all atoms.

Shape letters: B = rows, C = rows at a time, D = width, F = atoms, K = entries of the largest support.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from .penalty import Penalty

P = ParamSpec("P")
T = TypeVar("T")
_AT_ONCE = 1 << 23
"""Numbers of gathered atoms and Gram matrices that exist at a time."""


def eager(function: Callable[P, T]) -> Callable[P, T]:
    """Not traced by torch.compile: how often a solver's loop runs depends on the data."""
    return torch.compiler.disable(function)  # type: ignore[return-value]


def gathered(on_BF: Tensor) -> tuple[Tensor, Tensor]:
    """(index [B, K], live [B, K]): the entries that are on, padded with others that are not live."""
    k = max(1, int(on_BF.sum(-1).max())) if on_BF.numel() else min(1, on_BF.shape[1])
    live_BK, index_BK = on_BF.to(torch.uint8).topk(k, -1)
    return index_BK, live_BK > 0


def _pieces(rows_B: Tensor, k: int, d: int) -> Iterator[Tensor]:
    return iter(rows_B.split(max(1, _AT_ONCE // max(1, k * max(k, d)))))


def positive_solve(gram_BKK: Tensor, b_BK: Tensor, z_BK: Tensor, allowed_BK: Tensor) -> tuple[Tensor, Tensor]:
    """(z [B, K], found [B]): the minimum of 1/2 z'Gz - b'z over z >= 0 in allowed entries (Lawson & Hanson 1974, ch. 23).

    Args:
        z_BK: where to start, >= 0; its positive entries are the first guess of those that end up positive.
        found: False where a Gram matrix is singular or the search did not end.
    """
    z_BK, found_B = z_BK * allowed_BK, torch.zeros(len(b_BK), dtype=torch.bool, device=b_BK.device)
    at, k = torch.arange(len(b_BK), device=b_BK.device), b_BK.shape[1]
    eye, slack_B1 = torch.eye(k, dtype=b_BK.dtype, device=b_BK.device), _slack(b_BK)[:, None]
    passive, z, gram, b, allowed = z_BK > 0, z_BK, gram_BKK, b_BK, allowed_BK
    for _ in range(3 * k + 3):
        pairs = passive[:, :, None] & passive[:, None, :]
        solution = torch.linalg.solve_ex(torch.where(pairs, gram, eye), torch.where(passive, b, 0.0))[0]
        below = passive & ~(solution > 0)
        back = below.any(-1, keepdim=True)
        way = torch.where(below, z / (z - solution).clamp_min(torch.finfo(z.dtype).tiny), torch.inf)
        shortest = way.amin(-1, keepdim=True)
        part = torch.where(torch.isfinite(shortest), shortest, 0.0)
        passive = passive & ~(back & (way <= shortest))          # at least one leaves
        z = torch.where(back, (z + part * (solution - z)).clamp_min(0), solution) * passive
        want = torch.where(allowed & ~passive, b - (gram @ z[:, :, None])[:, :, 0], -torch.inf)
        most, which = want.max(-1, keepdim=True)
        more = ~back & (most > slack_B1)
        passive = passive.scatter(-1, which, passive.gather(-1, which) | more)
        z_BK = z_BK.index_copy(0, at, z)
        going = (back | more)[:, 0] & torch.isfinite(z).all(-1)
        found_B[at[~going]] = torch.isfinite(z[~going]).all(-1)
        if not going.any():
            break
        at, passive, z, gram, b, allowed, slack_B1 = (t[going] for t in (at, passive, z, gram, b, allowed, slack_B1))
    return z_BK, found_B


def _slack(c_BK: Tensor) -> Tensor:
    """[B] by how much a correlation may miss its bound: rounding of the row's largest."""
    most_B = c_BK.abs().amax(-1) if c_BK.shape[1] else c_BK.new_zeros(len(c_BK))
    return most_B * torch.finfo(c_BK.dtype).eps ** 0.75


@torch.no_grad()
def settle(x_BD: Tensor, atoms_FD: Tensor, z_BF: Tensor, weight: float, positive: bool, rounds: int = 24) -> tuple[Tensor, Tensor]:
    """(codes [B, F], exact [B]): the lasso's solutions from near ones, by an active set that starts at their support.

    Codes on the support are solved for with their signs held; entries that would change sign leave, atoms whose correlation
    with the residual exceeds `weight` come in, until none does: then the optimality conditions hold to rounding. Rows for
    which that fails (a support that is larger than the width, more than `rounds` changes) come back as they were.
    """
    out_BF, exact_B = z_BF.clone(), torch.zeros(len(z_BF), dtype=torch.bool, device=z_BF.device)
    sign_BF, bound = z_BF.sign(), min(atoms_FD.shape)
    at = (sign_BF.count_nonzero(-1) <= bound).nonzero()[:, 0] if z_BF.shape[1] else torch.empty(0, dtype=torch.long)
    slack_B = _slack(x_BD @ atoms_FD.T) if len(at) else exact_B
    size_BF = z_BF.abs()
    for _ in range(rounds):
        if not len(at):
            break
        keep = []
        for rows in _pieces(at, int(sign_BF[at].count_nonzero(-1).max()), atoms_FD.shape[1]):
            index_CK, live_CK = gathered(sign_BF[rows] != 0)
            sign_CK = sign_BF[rows].gather(-1, index_CK)
            own_CKD = atoms_FD[index_CK] * (sign_CK * live_CK)[:, :, None]
            b_CK = (own_CKD @ x_BD[rows][:, :, None])[:, :, 0] - weight
            start_CK = size_BF[rows].gather(-1, index_CK)
            z_CK, found_C = positive_solve(own_CKD @ own_CKD.mT, torch.where(live_CK, b_CK, 0.0), start_CK, live_CK)
            z_CF = torch.zeros_like(z_BF[rows]).scatter_add(-1, index_CK, z_CK * sign_CK * live_CK)
            c_CF = (x_BD[rows] - z_CF @ atoms_FD) @ atoms_FD.T
            excess_CF = (c_CF if positive else c_CF.abs()).masked_fill(z_CF != 0, -torch.inf)
            over_CF = excess_CF > weight + slack_B[rows, None]
            done_C = found_C & ~over_CF.any(-1)
            crowded_C1 = (over_CF.sum(-1) + z_CF.count_nonzero(-1) > bound)[:, None]
            over_CF &= ~crowded_C1 | (excess_CF == excess_CF.amax(-1, keepdim=True))       # then the worst alone comes in
            out_BF[rows[done_C]], exact_B[rows[done_C]] = z_CF[done_C], True
            sign_BF[rows], size_BF[rows] = torch.where(over_CF, c_CF.sign(), z_CF.sign()), z_CF.abs()
            keep.append(rows[found_C & ~done_C & (sign_BF[rows].count_nonzero(-1) <= bound)])
        at = torch.cat(keep)
    return out_BF, exact_B


def _newton(x_BD: Tensor, atoms_FD: Tensor, z_BF: Tensor, weight: float, penalty: Penalty | None) -> Tensor:
    """[B, F] Newton's step on the support; differentiable in x and the atoms with z and the curvature held fixed."""
    out = []
    k = int((z_BF != 0).sum(-1).max()) if z_BF.numel() else 0
    for rows in _pieces(torch.arange(len(z_BF), device=z_BF.device), k, atoms_FD.shape[1]):
        z_CF = z_BF[rows]
        index_CK, live_CK = gathered(z_CF != 0)
        z_CK = z_CF.gather(-1, index_CK) * live_CK
        own_CKD = atoms_FD[index_CK] * live_CK[:, :, None]
        pull_CK = (own_CKD @ (x_BD[rows][:, :, None] - own_CKD.mT @ z_CK[:, :, None]))[:, :, 0]
        curve_CKK = (own_CKD @ own_CKD.mT).detach()
        held = (~live_CK).to(z_CK)
        if penalty is not None:
            size_CK = torch.where(live_CK, z_CK.abs(), 1.0)
            pull_CK = pull_CK - penalty.slope(size_CK, weight) * z_CK.sign()
            held = torch.where(live_CK, penalty.bend(size_CK, weight), held)
        inverse = torch.linalg.inv_ex(curve_CKK + torch.diag_embed(held))[0].nan_to_num(0, 0, 0)
        step_CK = (inverse @ pull_CK[:, :, None])[:, :, 0] * live_CK
        out.append(torch.zeros_like(z_CF).scatter_add(-1, index_CK, step_CK))
    return torch.cat(out) if out else torch.zeros_like(z_BF)


def implicit(x_BD: Tensor, atoms_FD: Tensor, z_BF: Tensor, weight: float, penalty: Penalty | None) -> Tensor:
    """Codes z, bit for bit, with the derivative that the stationary point they are has in x and the atoms.

    On the support S: D_S (x - z D) = weight * phi'(z), hence dz_S = (D_S D_S' + weight * phi'')^-1 d(D_S (x - z D)); off it 0.

    Args:
        z_BF: stationary (`settle`, `polish`). penalty: None for least squares on the support.
    """
    step_BF = _newton(x_BD, atoms_FD, z_BF.detach(), weight, penalty)
    return z_BF.detach() + (step_BF - step_BF.detach())


@torch.no_grad()
def polish(x_BD: Tensor, atoms_FD: Tensor, z_BF: Tensor, weight: float, penalty: Penalty, times: int = 4) -> Tensor:
    """Codes nearer to the stationary point on their support, by Newton's steps; one that raises the objective is not taken."""
    def cost_B(z: Tensor) -> Tensor:
        return (x_BD - z @ atoms_FD).square().sum(-1) / 2 + penalty.value(z.abs(), weight).sum(-1)

    best_B = cost_B(z_BF)
    for _ in range(times):
        new_BF = z_BF + _newton(x_BD, atoms_FD, z_BF, weight, penalty)
        cost = cost_B(new_BF)
        take_B = (cost <= best_B * (1 + 1e-12)) & (new_BF.sign() == z_BF.sign()).all(-1)
        z_BF, best_B = torch.where(take_B[:, None], new_BF, z_BF), torch.where(take_B, cost, best_B)
    return z_BF
