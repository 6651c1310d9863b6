"""What dictionaries share whose encoder is a solver: no encoder of their own, rows handed to the solver in float32 or more.

Shape letters: B = rows, D = width, F = latents.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...method import positive
from ...selection import check_finite
from ..dictionary import Dictionary


class Coded(Dictionary):
    """Base. The atoms are the decoder's rows.

    Args:
        positive: codes >= 0. dead_after: rows without firing after which an atom is logged as dead. Others as for Dictionary.
    """

    def __init__(self, d_in: int, width: int, positive_codes: bool, dead_after: int, seed: int) -> None:
        super().__init__(d_in, width, 0, seed)
        del self.W_enc_FD, self.b_enc_F                                                     # the solver encodes
        self.positive, self.dead_after, self.seed = bool(positive_codes), positive("dead_after", dead_after), seed

    @torch.no_grad()
    def initialise(self, x: Tensor, y: Tensor | None = None) -> None:
        """Scale and centre; atoms begin as rows of the first batch, so that every one explains something."""
        super().initialise(x)
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(x), generator=generator)[: self.width]
        rows = self.centred(x[chosen.to(x.device)].to(self.W_dec_FD.dtype))
        self.W_dec_FD[: len(rows)] = torch.where(rows.norm(dim=-1, keepdim=True) > 0, normalize(rows, dim=-1), self.W_dec_FD[: len(rows)])

    def problem(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(rows [B, D] in the dictionary's units, atoms [F, D]), both at least float32. Raises BadInput for NaN and inf."""
        check_finite(x, f"input of {self.name}")
        wide = torch.promote_types(self.W_dec_FD.dtype, torch.float32)
        return self.centred(x).reshape(-1, self.d_in).to(wide), self.W_dec_FD.to(wide)
