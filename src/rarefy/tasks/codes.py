"""What judges of dictionaries read: each row's code, sparse or dense, and the directions that codes multiply.

    x = begin + sum over f of z_f d_f + error,  so that taking latent f out of a row means x - z_f d_f,

which moves any linear read-out w by exactly -z_f (d_f . w): judging by ablation needs no second look at the rows.

Shape letters: N = rows, D = width, F = latents, M = activations in index form, K = chosen latents, R = chosen rows, C = columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..errors import BadInput


@dataclass(frozen=True)
class Codes:
    """Codes of N rows over F latents: index form sorted by latent, or a dense matrix where nearly everything is active."""

    n: int
    width: int
    latent_M: Tensor
    """Ascending. Empty beside `dense_NF`."""
    row_M: Tensor
    value_M: Tensor
    dense_NF: Tensor | None = None

    @classmethod
    def sparse(cls, latent_M: Tensor, value_M: Tensor, row_M: Tensor, n: int, width: int) -> Self:
        """From activations in any order; each (row, latent) at most once. Raises BadInput for numbers out of range."""
        for name, at_M, most in (("latent", latent_M, width), ("row", row_M, n)):
            if len(at_M) and not 0 <= int(at_M.min()) <= int(at_M.max()) < most:
                raise BadInput(f"{name} numbers {int(at_M.min())}..{int(at_M.max())} must be in 0..{most - 1}")
        order = latent_M.argsort(stable=True)
        return cls(n, width, latent_M[order], row_M[order], value_M[order].float())

    @classmethod
    def dense(cls, z_NF: Tensor) -> Self:
        """From a matrix [N, F]; a latent counts as firing where it is above 0."""
        none = torch.empty(0, dtype=torch.long)
        return cls(len(z_NF), z_NF.shape[1], none, none, torch.empty(0), z_NF.float())

    @cached_property
    def begin_F(self) -> Tensor:
        """[F + 1] where each latent's activations begin in index form."""
        counts_F = torch.bincount(self.latent_M, minlength=self.width)
        return torch.cat([counts_F.new_zeros(1), counts_F.cumsum(0)])

    @property
    def fires(self) -> Self:
        """1 where a latent is above 0, else 0."""
        if self.dense_NF is not None:
            return type(self).dense((self.dense_NF > 0).float())
        on = self.value_M > 0
        return type(self)(self.n, self.width, self.latent_M[on], self.row_M[on], torch.ones(int(on.sum())))

    @cached_property
    def l0(self) -> float:
        """Latents with a code other than 0, a row."""
        count = (self.dense_NF != 0).sum() if self.dense_NF is not None else (self.value_M != 0).sum()
        return float(count) / max(1, self.n)

    def columns(self, latent_K: Tensor) -> Tensor:
        """[N, K] codes of chosen latents; one may be chosen twice."""
        if self.dense_NF is not None:
            return self.dense_NF[:, latent_K]
        out_KN = torch.zeros(len(latent_K), self.n)
        for into_N, f in zip(out_KN, latent_K.tolist(), strict=True):
            a, b = int(self.begin_F[f]), int(self.begin_F[f + 1])
            into_N[self.row_M[a:b]] = self.value_M[a:b]
        return out_KN.T

    def sums(self, weight_NC: Tensor) -> Tensor:
        """[F, C] sum over rows of code * weight."""
        if self.dense_NF is not None:
            return self.dense_NF.T @ weight_NC
        if not len(self.row_M):
            return torch.zeros(self.width, weight_NC.shape[1])
        return embedding_bag(self.row_M, weight_NC.contiguous(), self.begin_F[:-1], mode="sum", per_sample_weights=self.value_M)

    def take(self, row_R: Tensor) -> Self:
        """Codes of chosen rows, each chosen once, in the order given."""
        if self.dense_NF is not None:
            return type(self).dense(self.dense_NF[row_R])
        to_N = torch.full((self.n,), -1, dtype=torch.long)
        to_N[row_R] = torch.arange(len(row_R))
        new_M = to_N[self.row_M]
        here = new_M >= 0
        return type(self)(len(row_R), self.width, self.latent_M[here], new_M[here], self.value_M[here])

    def rows(self, row_R: Tensor) -> Tensor:
        """[R, F] dense codes of a few rows, each chosen once."""
        some = self.take(row_R)
        if some.dense_NF is not None:
            return some.dense_NF
        out_RF = torch.zeros(some.n, self.width)
        out_RF[some.row_M, some.latent_M] = some.value_M
        return out_RF


@dataclass(frozen=True)
class Lens:
    """A way of reading rows: codes, and the direction in the rows' own units that each code multiplies."""

    codes: Codes
    decoder_FD: Tensor

    def __post_init__(self) -> None:
        if len(self.decoder_FD) != self.codes.width:
            raise BadInput(f"codes over {self.codes.width} latents but {len(self.decoder_FD)} directions; give one each")

    def take(self, row_R: Tensor) -> Lens:
        """The same of chosen rows."""
        return Lens(self.codes.take(row_R), self.decoder_FD)


def neurons(x_ND: Tensor, mean_D: Tensor) -> Lens:
    """Baseline: each channel as it is, from its mean; setting one to 0 is mean ablation."""
    return Lens(Codes.dense(x_ND - mean_D), torch.eye(x_ND.shape[1]))


def principal(x_ND: Tensor, fit_ND: Tensor) -> Lens:
    """Baseline: principal components of `fit_ND`, all of them, signed so that each one's skew is positive.

    The sign matters where a latent counts as firing above 0; the rarer, longer tail is taken as its firing.
    """
    mean_D = fit_ND.mean(0)
    centred_ND = (fit_ND - mean_D).double()
    _, vectors_DF = torch.linalg.eigh(centred_ND.T @ centred_ND)
    axes_FD = vectors_DF.T.flip(0)
    skew_F = (centred_ND @ axes_FD.T).pow(3).sum(0)
    axes_FD = (axes_FD * torch.where(skew_F < 0, -1.0, 1.0)[:, None]).float()
    return Lens(Codes.dense((x_ND - mean_D) @ axes_FD.T), axes_FD)
