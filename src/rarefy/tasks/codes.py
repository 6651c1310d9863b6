"""What judges of dictionaries read: each row's code, sparse or dense, and the directions that codes multiply.

    x = begin + sum over f of z_f d_f + error,  so that taking latent f out of a row means x - z_f d_f,

which moves any linear read-out w by exactly -z_f (d_f . w): judging by ablation needs no second look at the rows.

Shape letters: N = rows, D = width, F = latents, M = activations in index form, K = chosen latents, R = chosen rows, C = columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..errors import BadInput


class Ordered(NamedTuple):
    """Activations sorted by what fired or by where it fired."""

    row_M: Tensor
    latent_M: Tensor
    value_M: Tensor
    begin: Tensor
    """[F + 1] or [N + 1] where each latent's, or each row's, activations begin."""


@dataclass(frozen=True)
class Codes:
    """Codes of N rows over F latents: index form, seen by latent or by row, or a dense matrix where nearly everything is active."""

    n: int
    width: int
    row_M: Tensor
    """In any order; empty beside `dense_NF`. `by_row` and `by_latent` have an order, and are there in both forms."""
    latent_M: Tensor
    value_M: Tensor
    """Negative only for dictionaries that sign their latents."""
    dense_NF: Tensor | None = None

    @classmethod
    def sparse(cls, latent_M: Tensor, value_M: Tensor, row_M: Tensor, n: int, width: int) -> Self:
        """From activations in any order; each (row, latent) at most once. Raises BadInput for numbers out of range."""
        for name, at_M, most in (("latent", latent_M, width), ("row", row_M, n)):
            if len(at_M) and not 0 <= int(at_M.min()) <= int(at_M.max()) < most:
                raise BadInput(f"{name} numbers {int(at_M.min())}..{int(at_M.max())} must be in 0..{most - 1}")
        return cls(n, width, row_M, latent_M, value_M.float())

    @classmethod
    def of(cls, z_NF: Tensor) -> Self:
        """Index form of a matrix [N, F], of what is not 0."""
        row_M, latent_M = z_NF.nonzero(as_tuple=True)
        return cls(len(z_NF), z_NF.shape[1], row_M, latent_M, z_NF[row_M, latent_M].float())

    @classmethod
    def dense(cls, z_NF: Tensor) -> Self:
        """From a matrix [N, F], kept as it is; a latent counts as firing where it is above 0."""
        none = torch.empty(0, dtype=torch.long)
        return cls(len(z_NF), z_NF.shape[1], none, none, torch.empty(0), z_NF.float())

    @cached_property
    def by_row(self) -> Ordered:
        """Rows rising."""
        return self._ordered(self.n, lambda codes: codes.row_M)

    @cached_property
    def by_latent(self) -> Ordered:
        """Latents rising."""
        return self._ordered(self.width, lambda codes: codes.latent_M)

    def _ordered(self, most: int, key: Callable[[Codes], Tensor]) -> Ordered:
        listed = self if self.dense_NF is None else Codes.of(self.dense_NF)
        key_M, begin = key(listed), torch.zeros(most + 1, dtype=torch.long)
        begin[1:] = torch.bincount(key_M, minlength=most).cumsum(0)
        if bool((key_M[1:] >= key_M[:-1]).all()):
            return Ordered(listed.row_M, listed.latent_M, listed.value_M, begin)
        order_M = key_M.argsort(stable=True)
        return Ordered(listed.row_M[order_M], listed.latent_M[order_M], listed.value_M[order_M], begin)

    @property
    def matrix(self) -> Tensor:
        """[N, F] float32."""
        if self.dense_NF is not None:
            return self.dense_NF
        return torch.zeros(self.n, self.width).index_put_((self.row_M, self.latent_M), self.value_M)

    def over(self, least_F: Tensor) -> Self:
        """1 where a latent is above its threshold, >= 0, else 0."""
        if self.dense_NF is not None:
            return type(self).dense((self.dense_NF > least_F).float())
        on_M = self.value_M > least_F[self.latent_M]
        return type(self)(self.n, self.width, self.row_M[on_M], self.latent_M[on_M], torch.ones(int(on_M.sum())))

    @property
    def fires(self) -> Self:
        """1 where a latent is above 0, else 0."""
        return self.over(torch.zeros(self.width))

    @property
    def fired(self) -> Tensor:
        """[F] int64 rows on which each latent is other than 0."""
        if self.dense_NF is not None:
            return (self.dense_NF != 0).sum(0)
        return torch.bincount(self.latent_M[self.value_M != 0], minlength=self.width)

    @cached_property
    def l0(self) -> float:
        """Latents with a code other than 0, a row."""
        count = (self.dense_NF != 0).sum() if self.dense_NF is not None else (self.value_M != 0).sum()
        return float(count) / max(1, self.n)

    def columns(self, latent_K: Tensor) -> Tensor:
        """[N, K] codes of chosen latents; one may be chosen twice. Zeros for latent -1."""
        if self.dense_NF is not None:
            return torch.where(latent_K >= 0, self.dense_NF[:, latent_K], 0.0)
        row_M, _, value_M, begin_F = self.by_latent
        out_KN = torch.zeros(len(latent_K), self.n)
        for into_N, f in zip(out_KN, latent_K.tolist(), strict=True):
            if f >= 0:
                a, b = int(begin_F[f]), int(begin_F[f + 1])
                into_N[row_M[a:b]] = value_M[a:b]
        return out_KN.T

    def sums(self, weight_NC: Tensor) -> Tensor:
        """[F, C] sum over rows of code * weight."""
        if self.dense_NF is not None:
            return self.dense_NF.T @ weight_NC
        row_M, _, value_M, begin_F = self.by_latent
        return _summed(row_M, value_M, begin_F, weight_NC)

    def times(self, decoder_FD: Tensor) -> Tensor:
        """[N, D] codes @ decoder, in the decoder's dtype; work in proportion to what is on."""
        if self.dense_NF is not None:
            return self.dense_NF.to(decoder_FD.dtype) @ decoder_FD
        _, latent_M, value_M, begin_N = self.by_row
        return _summed(latent_M, value_M, begin_N, decoder_FD)

    def take(self, row_R: Tensor) -> Self:
        """Codes of chosen rows, each chosen once, in the order given."""
        if self.dense_NF is not None:
            return type(self).dense(self.dense_NF[row_R])
        to_N = torch.full((self.n,), -1, dtype=torch.long)
        to_N[row_R] = torch.arange(len(row_R))
        new_M = to_N[self.row_M]
        here = new_M >= 0
        return type(self)(len(row_R), self.width, new_M[here], self.latent_M[here], self.value_M[here])

    def rows(self, row_R: Tensor) -> Tensor:
        """[R, F] dense codes of a few rows, each chosen once."""
        return self.take(row_R).matrix


def _summed(at_M: Tensor, value_M: Tensor, begin: Tensor, table: Tensor) -> Tensor:
    """[bags, C] sum over a bag of value * table[at]; zeros where nothing is listed at all, which embedding_bag refuses."""
    if not len(at_M):
        return table.new_zeros(len(begin) - 1, table.shape[1])
    return embedding_bag(at_M, table.contiguous(), begin[:-1], mode="sum", per_sample_weights=value_M.to(table.dtype))


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
