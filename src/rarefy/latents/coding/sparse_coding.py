"""Sparse coding (Olshausen & Field 1996, "Emergence of simple-cell receptive field properties by learning a sparse code for
natural images"): codes are solved for, atoms learned.

    z(x) = argmin_z 1/2 ||x - z D||^2 + weight * sum_f phi(z_f)   (eq. 2-4), over z >= 0 by default

in the dictionary's units, in which a centred channel has mean square 1. Training descends the same objective in D and b_dec
with the codes held: at a stationary code that is its exact gradient (Danskin 1967). `forward` has the exact derivative too,
of the solution by the implicit function theorem. The paper's codes come from a smooth penalty and gradient descent; here from
one of the penalties of penalty.py and a proximal solver, and atoms have length 1 instead of an adapted variance.

Shape letters: B = rows, D = width, F = latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...cost import Cost
from ...errors import BadInput
from ...method import Loss, not_negative, positive
from ...selection import Selection
from ..dictionary import diagnostics
from .coded import Coded
from .coordinate import coordinate_descent
from .ista import fista
from .penalty import penalty as named
from .support import eager, implicit, polish, settle

SOLVERS = ("fista", "ista", "coordinate")


class SparseCoding(Coded):
    """Codes by a solver, any number active.

    Args:
        weight: of the penalty. penalty: soft (the lasso), hard, half, two_thirds or cel0. positive_codes: codes >= 0, as other
            dictionaries have them. solver: fista, ista or coordinate (coordinate descent, for soft alone). tolerance: of the
            solver. most: its iterations. exact: finish the code on its support by Newton's steps or an active set, so that it
            solves the problem to rounding and has a derivative. Others as for Coded.
    """

    name = "latents/sparse_coding"

    def __init__(
        self, d_in: int, width: int, weight: float = 1.0, penalty: str = "soft", positive_codes: bool = True, solver: str = "fista",
        tolerance: float = 1e-4, most: int = 200, exact: bool = True, dead_after: int = 1_000_000, seed: int = 0,
    ) -> None:
        super().__init__(d_in, width, positive_codes, dead_after, seed)
        self.penalty, self.weight = named(penalty), not_negative("weight", weight)
        self.tolerance, self.most, self.exact = not_negative("tolerance", tolerance), positive("most", most), bool(exact)
        if solver not in SOLVERS:
            raise BadInput(f"solver={solver!r} must be one of {', '.join(SOLVERS)}")
        if solver == "coordinate" and penalty != "soft":
            raise BadInput(f"solver={solver!r} solves the lasso alone; with penalty={penalty!r} use fista or ista")
        self.solver = solver

    @property
    def budget(self) -> float:
        """1: any number of latents may be active."""
        return 1.0

    @eager
    @torch.no_grad()
    def solve(self, x_BD: Tensor, atoms_FD: Tensor) -> Tensor:
        """Codes [B, F] of rows in the dictionary's units."""
        if self.solver == "coordinate":
            z_BF = coordinate_descent(x_BD, atoms_FD, self.weight, positive=self.positive, tolerance=self.tolerance, most=self.most).codes
        else:
            z_BF = fista(
                x_BD, atoms_FD, self.weight, penalty=self.penalty.name, positive=self.positive, tolerance=self.tolerance, most=self.most,
                accelerate=self.solver == "fista",
            ).codes
        if not self.exact:
            return z_BF
        if self.penalty.convex:
            return settle(x_BD, atoms_FD, z_BF, self.weight, self.positive)[0]
        return polish(x_BD, atoms_FD, z_BF, self.weight, self.penalty)

    def select(self, x: Tensor) -> Selection:
        """Atoms whose code is not 0."""
        with torch.autocast(x.device.type, enabled=False):
            x_BD, atoms_FD = self.problem(x)
            z_BF = self.solve(x_BD.detach(), atoms_FD.detach())
            if torch.is_grad_enabled() and (x_BD.requires_grad or atoms_FD.requires_grad):
                z_BF = implicit(x_BD, atoms_FD, z_BF, self.weight, self.penalty)
        weight = z_BF.to(x.dtype).view(*x.shape[:-1], self.width)
        return Selection(self.width, weight, mask_=weight != 0)

    def loss(self, x: Tensor, y: Tensor) -> Loss:
        """The objective a channel, twice: mse + 2 * penalty / D. Raises BadInput for rows with NaN or inf."""
        self.check_rows(x, y)
        with torch.autocast(x.device.type, enabled=False):
            x_BD, atoms_FD = self.problem(x)
            z_BF = self.solve(x_BD.detach(), atoms_FD.detach())
            y_hat_BD = z_BF @ atoms_FD
            mse = (x_BD - y_hat_BD).square().mean()
            price = 2 / self.d_in * self.penalty.value(z_BF.abs(), self.weight).sum(-1).mean() if len(x) else mse.detach()
        on_BF = z_BF != 0
        self.fired(on_BF.any(0).nonzero()[:, 0], len(x))
        logged = {"mse": mse.detach(), "penalty": price, **diagnostics(x_BD, y_hat_BD, on_BF.sum() / max(1, len(x)))}
        dead = (self.idle_F > self.dead_after).float().mean()
        return Loss(mse + price, {"objective": mse + price, **logged, "dead": dead})

    def cost(self, density: float | None = None) -> Cost:
        """Two dense products an iteration, for as many as the solver may make, and the decoder rows of the latents kept."""
        density = self.budget if density is None else density
        work = self.d_in * self.width * (2 * self.most + density)
        return Cost(2 * work, self.W_dec_FD.element_size() * work)
