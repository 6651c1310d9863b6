"""Matching pursuit autoencoder (MP-SAE; Costa et al. 2025, "From Flat to Hierarchical: Extracting Sparse Representations
with Matching Pursuit", arXiv 2506.03093).

The encoder is unrolled matching pursuit (Mallat & Zhang 1993) on the decoder's own unit-norm rows: r_0 = x - b_dec;
each step takes the row w_j with the largest inner product z = <w_j, r>, adds z to latent j and takes z w_j from r. A latent
may be taken more than once. What is left after k steps is the error, whose square is the loss.

Shape letters: B = rows, D = width, F = latents, K = steps, C = rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cost import Cost
from ..errors import BadInput
from ..method import Loss, not_negative, positive
from ..selection import Selection, check_finite
from .dictionary import Dictionary, Widths

_AT_ONCE = 256
"""Rows whose inner products exist at a time: memory is that of [C, F], whatever the number of steps."""
_GRAM = 8192
"""Latents below which inner products follow the rows taken out, through the products of all pairs of decoder rows (256 MB at
most), where that is less work than a product of residuals and decoder a step."""


class _Pursuit(torch.autograd.Function):
    """(r_BD, W_FD, K) -> (values [B, K], error [B, D], latents [B, K]).

    Backward walks the steps in reverse and gets each residual back from the next, so that only the last is kept; a step costs
    it B * D, against the B * F or B * D * F of a forward step. The choice is held fixed, as its gradient is 0 away from ties.
    """

    @staticmethod
    def forward(ctx: Any, r_BD: Tensor, W_FD: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        left_BD = r_BD.clone()
        value_BK, unit_BK = r_BD.new_empty(len(r_BD), steps), torch.empty(len(r_BD), steps, dtype=torch.long, device=r_BD.device)
        inner_CF = r_BD.new_empty(min(_AT_ONCE, len(r_BD)), len(W_FD))
        gram_FF = W_FD @ W_FD.T if len(W_FD) < min(_GRAM, len(r_BD) * steps / 2) else None
        for left_CD, value_CK, unit_CK in zip(left_BD.split(_AT_ONCE), value_BK.split(_AT_ONCE), unit_BK.split(_AT_ONCE), strict=True):
            inner_CF = inner_CF[: len(left_CD)]
            for t in range(steps):
                if t == 0 or gram_FF is None:
                    torch.mm(left_CD, W_FD.T, out=inner_CF)
                else:
                    inner_CF.addcmul_(gram_FF[unit_CK[:, t - 1]], value_CK[:, t - 1, None], value=-1)
                unit_CK[:, t] = unit_C = inner_CF.argmax(-1)
                row_CD = W_FD[unit_C]
                value_CK[:, t] = value_C = (row_CD * left_CD).sum(-1)           # anew: an inner product kept up to date drifts
                left_CD.addcmul_(row_CD, value_C[:, None], value=-1)
        ctx.mark_non_differentiable(unit_BK)
        ctx.save_for_backward(value_BK, unit_BK, left_BD, W_FD)
        return value_BK, left_BD, unit_BK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BK: Tensor, grad_BD: Tensor, _: Any) -> tuple[Tensor, Tensor, None]:
        value_BK, unit_BK, left_BD, W_FD = ctx.saved_tensors
        grad_FD, left_BD, grad_BD = torch.zeros_like(W_FD), left_BD.clone(), grad_BD.clone()
        for t in reversed(range(value_BK.shape[1])):
            value_B1, row_BD = value_BK[:, t, None], W_FD[unit_BK[:, t]]
            left_BD += value_B1 * row_BD                                                    # the residual that step t looked at
            along_B1 = grad_BK[:, t, None] - (row_BD * grad_BD).sum(-1, keepdim=True)       # gradient of the step's value
            grad_FD.index_add_(0, unit_BK[:, t], along_B1 * left_BD - value_B1 * grad_BD)
            grad_BD += along_B1 * row_BD
        return grad_BD, grad_FD, None


class MatchingPursuit(Dictionary):
    """k steps of matching pursuit on tied, unit-norm rows.

    Args:
        k: steps, and so at most k latents a row. A dictionary may be loaded with another k than it was trained with: more
            steps never raise a row's error. dead_after: rows without firing after which a latent is logged as dead.
    """

    name = "latents/matching_pursuit"

    def __init__(self, d_in: Widths, width: int, k: int = 32, dead_after: int = 10_000_000, seed: int = 0) -> None:
        super().__init__(d_in, width, 0, seed)
        del self.W_enc_FD, self.b_enc_F                                                     # the decoder encodes
        self.k, self.dead_after = positive("k", k, width), not_negative("dead_after", dead_after)

    @property
    def budget(self) -> float:
        """k / F: the most latents that k steps can take."""
        return self.k / self.width

    def pursue(self, scaled: Tensor, k: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(values [B, K], error [B, D], latents [B, K]) of rows in the dictionary's units after k steps (default: its own)."""
        with torch.autocast(scaled.device.type, enabled=False):
            rows_BD = (scaled.to(self.W_dec_FD.dtype) - self.b_dec_D).reshape(-1, self.d_in)
            return _Pursuit.apply(rows_BD, self.W_dec_FD, self.k if k is None else positive("k", k))  # type: ignore[return-value]

    def select(self, x: Tensor, k: int | None = None) -> Selection:
        """Latents taken in k steps (default: its own), each with the sum of its values."""
        check_finite(x, f"input of {self.name}")
        value_BK, _, unit_BK = self.pursue(self.scaled(x), k)
        weight_BF = value_BK.new_zeros(len(value_BK), self.width).scatter_add(-1, unit_BK, value_BK)
        mask_BF = torch.zeros_like(weight_BF, dtype=torch.bool).scatter(-1, unit_BK, True)
        lead = (*x.shape[:-1], self.width)
        return Selection(self.width, weight_BF.view(lead), mask_=mask_BF.view(lead))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]: the input less the error that is left."""
        check_finite(x, f"input of {self.name}")
        scaled = self.scaled(x)
        return self.in_units(scaled - self.pursue(scaled)[1].view_as(scaled).to(scaled.dtype))

    def loss(self, x: Tensor, y: Tensor) -> Loss:
        """mse, through the unroll. Raises BadInput if y is not x: the pursuit explains what it reads."""
        self.check_rows(x, y)
        if y is not x:
            raise BadInput(f"{self.name} reproduces what it reads; give the same rows as target, or use a transcoder such as latents/topk with d_out")
        scaled_BD = self.scaled(x)
        _, left_BD, unit_BK = self.pursue(scaled_BD)
        ordered_BK = unit_BK.sort(-1).values
        active = unit_BK.numel() - (ordered_BK.diff(dim=-1) == 0).sum()
        trained = {"mse": left_BD.square().mean()}
        return self.ended(trained, scaled_BD, scaled_BD - left_BD, unit_BK.flatten(), active, self.dead_after)

    def cost(self, density: float | None = None) -> Cost:
        """One dense product, and one decoder row, a step; the number of steps does not follow the density asked for."""
        work = self.d_in * self.width * self.k
        row = self.d_in * self.width * (self.budget if density is None else density)
        return Cost(2 * (work + row), self.W_dec_FD.element_size() * (work + row))
