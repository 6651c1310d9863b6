"""Dictionary learning with pursuit codes: k atoms a row chosen greedily, their codes by least squares.

Orthogonal matching pursuit (Pati, Rezaiifar & Krishnaprasad 1993, eq. 5-9) as the encoder and gradient steps on atoms of
length 1 in place of the method of optimal directions (Engan, Aase & Husoy 1999), so that it trains on a stream. Codes are
>= 0 by default, as other dictionaries have them. Non-negative codes may be 0 for some of the k atoms taken.

Shape letters: B = rows, D = width, F = latents, K = atoms taken.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ...cost import Cost
from ...errors import BadInput
from ...method import Loss
from ...method import positive as whole
from ...selection import Selection
from .coded import Coded
from .pursuit import pursuit
from .support import implicit


class OMP(Coded):
    """k atoms a row.

    Args:
        k: atoms taken a row, at most the width D of the rows. by: orthogonal or gradient (cheaper codes by one line search an
            atom). Others as for Coded.
    """

    name = "latents/omp"

    def __init__(
        self, d_in: int, width: int, k: int = 32, by: str = "orthogonal", positive_codes: bool = True, dead_after: int = 1_000_000, seed: int = 0,
    ) -> None:
        super().__init__(d_in, width, positive_codes, dead_after, seed)
        self.k = whole("k", k, min(width, self.d_in))
        if by not in ("orthogonal", "gradient"):
            raise BadInput(f"by={by!r} must be orthogonal or gradient")
        self.by = by

    @property
    def budget(self) -> float:
        """k / F."""
        return self.k / self.width

    def codes(self, x_BD: Tensor, atoms_FD: Tensor) -> tuple[Tensor, Tensor]:
        """(codes [B, K], latents [B, K]) of rows in the dictionary's units; differentiable."""
        value_BK, index_BK = pursuit(x_BD, atoms_FD, self.k, by=self.by, positive=self.positive)
        if self.by == "orthogonal" and torch.is_grad_enabled() and (x_BD.requires_grad or atoms_FD.requires_grad):
            z_BF = value_BK.new_zeros(len(x_BD), self.width).scatter(-1, index_BK, value_BK)
            value_BK = implicit(x_BD, atoms_FD, z_BF, 0.0, None).gather(-1, index_BK)
        return value_BK, index_BK

    def select(self, x: Tensor) -> Selection:
        """The k atoms taken."""
        with torch.autocast(x.device.type, enabled=False):
            value_BK, index_BK = self.codes(*self.problem(x))
        lead = (*x.shape[:-1], self.k)
        return Selection(self.width, value_BK.to(x.dtype).view(lead), index=index_BK.view(lead))

    def loss(self, x: Tensor, y: Tensor) -> Loss:
        """mse, through the codes. Raises BadInput for rows with NaN or inf."""
        self.check_rows(x, y)
        chosen = self.select(x)
        y_BD = self.scaled(y)
        y_hat_BD = self.combine(chosen, self.b_dec_D)
        on_BK = chosen.weight.detach() != 0
        assert chosen.index is not None
        return self.ended({"mse": mse_loss(y_hat_BD, y_BD)}, y_BD, y_hat_BD, chosen.index[on_BK], on_BK.sum(), self.dead_after)

    def cost(self, density: float | None = None) -> Cost:
        """One dense product an atom taken, the Gram matrix and solves of those taken, and their decoder rows."""
        kept = self.width * (self.budget if density is None else density)
        solve = kept**2 * self.d_in / 2 + kept**4 / 12 if self.by == "orthogonal" else 2 * kept**2 * self.d_in
        work = self.d_in * self.width * self.k + solve + self.d_in * kept
        return Cost(2 * work, self.W_dec_FD.element_size() * (self.d_in * self.width * self.k + self.d_in * kept))
