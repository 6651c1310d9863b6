"""How much of the dense thing is left: pure functions, sums that do not depend on how data was batched, and intervals.

Everything accumulates in float64. Shape letters: N = rows, D = width, F = latents, C = documents (clusters).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import BadInput


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def ratio_interval(total_C: Tensor, count_C: Tensor) -> Interval:
    """Mean over tokens with an interval over documents.

    The mean is sum(total) / sum(count); its variance is the usual one of a ratio of sums over independent clusters
    (Cochran 1977, eq. 6.13, without the finite-population term), with 1.96 standard errors either way. One document
    gives an interval without bounds.

    Args:
        total_C: sum of the token values of each document. count_C: its number of tokens; empty documents are left out.
    """
    there = count_C > 0
    total_C, count_C = total_C[there].double(), count_C[there].double()
    if not len(count_C):
        raise BadInput("no tokens to average over")
    mean = float(total_C.sum() / count_C.sum())
    n = len(count_C)
    if n == 1:
        return Interval(mean, -math.inf, math.inf)
    variance = float(((total_C - mean * count_C) ** 2).sum()) * n / (n - 1)
    half = 1.96 * math.sqrt(variance) / float(count_C.sum())
    return Interval(mean, mean - half, mean + half)


def fvu(x_ND: Tensor, x_hat_ND: Tensor) -> float:
    """Fraction of variance unexplained: sum |x - x_hat|^2 / sum |x - mean(x)|^2."""
    x, x_hat = x_ND.double(), x_hat_ND.double()
    return float((x - x_hat).pow(2).sum() / (x - x.mean(0)).pow(2).sum())


def explained_variance(x_ND: Tensor, x_hat_ND: Tensor) -> float:
    """1 - variance of the error / variance of x, which unlike 1 - FVU forgives a constant offset."""
    x, error = x_ND.double(), x_ND.double() - x_hat_ND.double()
    return float(1 - (error - error.mean(0)).pow(2).sum() / (x - x.mean(0)).pow(2).sum())


def cosine(x_ND: Tensor, x_hat_ND: Tensor) -> float:
    """Mean cosine between rows and their reconstructions."""
    return float(torch.cosine_similarity(x_ND.double(), x_hat_ND.double(), dim=-1).mean())


class Reconstruction:
    """FVU, explained variance, cosine, L0 and dead fraction of a dictionary, summed batch by batch.

    Args:
        d: width of the rows. width: number of latents, F.
        documents: number of documents; FVU's and L0's intervals are over them.
    """

    def __init__(self, d: int, width: int, documents: int = 1) -> None:
        f64 = torch.float64
        self.rows, self.sum_D, self.square = 0, torch.zeros(d, dtype=f64), 0.0
        self.error_D, self.error_square, self.cos = torch.zeros(d, dtype=f64), 0.0, 0.0
        self.fired_F = torch.zeros(width, dtype=torch.long)
        self.by_doc = {name: torch.zeros(documents, dtype=f64) for name in ("rows", "error", "square", "l0")}
        self.doc_sum_CD = torch.zeros(documents, d, dtype=f64)

    def add(self, x_ND: Tensor, x_hat_ND: Tensor, fired: Tensor, l0_N: Tensor, doc_N: Tensor | None = None) -> None:
        """Take in rows.

        Args:
            fired: latent numbers that fired, [any], with repeats.
            l0_N: latents active in each row.
            doc_N: document number of each row; default all of document 0.
        """
        x, error = x_ND.double(), x_ND.double() - x_hat_ND.double()
        doc = torch.zeros(len(x), dtype=torch.long) if doc_N is None else doc_N
        self.rows += len(x)
        self.sum_D += x.sum(0)
        self.square += float(x.pow(2).sum())
        self.error_D += error.sum(0)
        self.error_square += float(error.pow(2).sum())
        self.cos += float(torch.cosine_similarity(x, x_hat_ND.double(), dim=-1).sum())
        self.fired_F += torch.bincount(fired.flatten(), minlength=len(self.fired_F))
        self.doc_sum_CD.index_add_(0, doc, x)
        for name, value in (("rows", torch.ones(len(x))), ("error", error.pow(2).sum(-1)), ("square", x.pow(2).sum(-1)), ("l0", l0_N)):
            self.by_doc[name].index_add_(0, doc, value.double())

    @property
    def variance(self) -> float:
        """Sum of squared distances to the mean of all rows."""
        return self.square - float(self.sum_D.pow(2).sum()) / self.rows

    def fvu(self) -> Interval:
        """FVU, its interval over documents (squared error against squared distance to the mean of all rows)."""
        mean_D = self.sum_D / self.rows
        spread_C = self.by_doc["square"] - 2 * (self.doc_sum_CD @ mean_D) + self.by_doc["rows"] * float(mean_D.pow(2).sum())
        there = self.by_doc["rows"] > 0
        return ratio_interval(self.by_doc["error"][there], spread_C[there].clamp_min(1e-300))

    def l0(self) -> Interval:
        """Latents active a row."""
        return ratio_interval(self.by_doc["l0"], self.by_doc["rows"])

    def explained_variance(self) -> float:
        """See the function of that name."""
        return 1 - (self.error_square - float(self.error_D.pow(2).sum()) / self.rows) / self.variance

    def cosine(self) -> float:
        """See the function of that name."""
        return self.cos / self.rows

    def dead_fraction(self) -> float:
        """Share of latents that never fired in the rows seen."""
        return float((self.fired_F == 0).double().mean())
