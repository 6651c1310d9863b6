"""A Selection says which of N units are kept and with what weight; the rules here make one from scores.

Every rule is a pure function of the scores. Scores must be free of NaN; ties go to the lower index in every rule
that says so below.

Shape letters: N = units, K = kept units, M = units in a group, ... = any leading dims.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import maps
from .errors import BadInput


@dataclass(frozen=True)
class Selection:
    """Kept units, as an index when every row keeps the same number, else as a mask."""

    n: int
    """Number of units to choose from, N."""
    weight: Tensor
    """[..., K] beside `index`, [..., N] beside `mask_`."""
    index: Tensor | None = None
    """[..., K] int64, or None in mask form."""
    mask_: Tensor | None = None
    """[..., N] bool, or None in index form."""

    def __post_init__(self) -> None:
        if (self.index is None) == (self.mask_ is None):
            raise BadInput("a Selection has either an index or a mask, not both and not neither")

    @property
    def mask(self) -> Tensor:
        """[..., N] bool, True where kept."""
        if self.mask_ is not None:
            return self.mask_
        assert self.index is not None
        empty = torch.zeros(*self.index.shape[:-1], self.n, dtype=torch.bool, device=self.index.device)
        return empty.scatter(-1, self.index, True)

    @property
    def dense(self) -> Tensor:
        """[..., N] weights, zero where not kept. Differentiable in `weight`."""
        if self.index is None:
            assert self.mask_ is not None
            return torch.where(self.mask_, self.weight, self.weight.new_zeros(()))
        empty = self.weight.new_zeros(*self.index.shape[:-1], self.n)
        return empty.scatter(-1, self.index, self.weight)

    @property
    def on(self) -> Tensor:
        """bool in the shape of `weight`: where a unit is kept and its weight, of either sign, is not zero."""
        on = self.weight != 0
        return on if self.mask_ is None else on & self.mask_

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """(row, unit, weight), each [M], of a selection of rows: those that are `on`, rows ascending."""
        row_M, at_M = self.on.nonzero(as_tuple=True)
        return row_M, at_M if self.index is None else self.index[row_M, at_M], self.weight[row_M, at_M]

    @property
    def count(self) -> Tensor:
        """[...] units kept in each row."""
        return self.mask.sum(-1)

    @property
    def density(self) -> float:
        """Fraction of all units kept, over every row; 0 for an empty batch."""
        if self.index is not None:
            return self.index.shape[-1] / self.n
        assert self.mask_ is not None
        return self.mask_.float().mean().item() if self.mask_.numel() else 0.0


def check_finite(x: Tensor, what: str) -> None:
    """Raise BadInput naming `what`, the count, and the first position if `x` holds NaN or inf."""
    # A sum is finite only if every term is, and takes a thirtieth of the time; where it overflows, look again.
    if x.is_floating_point() and not torch.isfinite(x.detach().sum()) and not torch.isfinite(x).all():
        bad = ~torch.isfinite(x)
        first = tuple(int(i) for i in bad.nonzero()[0])
        kind = "NaN" if torch.isnan(x[first]) else "inf"
        raise BadInput(
            f"{what}: {int(bad.sum())} of {x.numel()} values are NaN or inf, the first a {kind} at {list(first)}; "
            "find the layer that made it, or use float32"
        )


def check_scores(scores: Tensor) -> None:
    """Scores may hold -inf (never chosen) and +inf (always chosen) but no NaN, and at least one unit."""
    if scores.ndim == 0 or scores.shape[-1] == 0:
        raise BadInput(f"no units to select from: scores have shape {list(scores.shape)}")
    if torch.isnan(scores).any():
        first = [int(i) for i in torch.isnan(scores).nonzero()[0]]
        raise BadInput(f"scores: {int(torch.isnan(scores).sum())} of {scores.numel()} are NaN, the first at {first}")


def kept(budget: float, n: int) -> int:
    """Units kept of n at a budget (fraction kept): at least one, rounded to the nearest."""
    if not 0 < budget <= 1:
        raise BadInput(f"budget={budget} must be in (0, 1]: the fraction of units kept")
    return max(1, round(budget * n))


def top_k(scores: Tensor, k: int) -> Selection:
    """Keep the k highest scores of each row [..., N]. Order within K is unspecified."""
    check_scores(scores)
    n = scores.shape[-1]
    if not 0 < k <= n:
        raise BadInput(f"k={k} must be in 1..{n}, the number of units")
    weight, index = scores.topk(k, dim=-1, sorted=False)
    return Selection(n, weight, index=index)


def random_k(scores: Tensor, k: int, generator: torch.Generator | None = None) -> Selection:
    """Keep k units of each row, chosen evenly without looking at the scores' values."""
    check_scores(scores)
    n = scores.shape[-1]
    if not 0 < k <= n:
        raise BadInput(f"k={k} must be in 1..{n}, the number of units")
    lottery = torch.rand(scores.shape, generator=generator, device="cpu").to(scores.device)
    index = lottery.topk(k, dim=-1, sorted=False).indices
    return Selection(n, scores.gather(-1, index), index=index)


def batch_top_k(scores: Tensor, k: float) -> Selection:
    """Keep the k * rows highest scores of the whole batch (Bussmann et al. 2024, arXiv 2412.06410)."""
    check_scores(scores)
    n = scores.shape[-1]
    if not 0 < k <= n:
        raise BadInput(f"k={k} must be in (0, {n}], the number of units")
    flat = scores.new_zeros(scores.numel(), dtype=torch.bool)
    keep = min(scores.numel(), round(k * (scores.numel() // n)))
    flat[scores.flatten().topk(keep, sorted=False).indices] = True
    return Selection(n, scores, mask_=flat.view_as(scores))


def n_of_m(scores: Tensor, n: int, m: int) -> Selection:
    """Keep the n highest of every m consecutive scores (2:4 is n=2, m=4)."""
    check_scores(scores)
    if m < 1 or not 0 < n <= m:
        raise BadInput(f"{n}:{m} is not a pattern: n must be in 1..m")
    if scores.shape[-1] % m:
        raise BadInput(f"{scores.shape[-1]} units do not divide into groups of m={m}; choose an m that divides them")
    groups = scores.unflatten(-1, (-1, m))
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, groups.topk(n, -1).indices, True)
    return Selection(scores.shape[-1], scores, mask_=mask.flatten(-2))


def threshold(scores: Tensor, tau: Tensor | float) -> Selection:
    """Keep every unit whose score exceeds tau (a number, or a tensor that broadcasts to the scores)."""
    check_scores(scores)
    return Selection(scores.shape[-1], scores, mask_=scores > tau)


def top_p(scores: Tensor, p: float) -> Selection:
    """Keep the fewest highest units whose share of the row's sum reaches p; all of them at p = 1. Scores must be >= 0.

    A row that sums to 0 keeps one unit. Used on attention probabilities (Lin et al. 2025, Twilight).
    """
    check_scores(scores)
    if not 0 < p <= 1:
        raise BadInput(f"p={p} must be in (0, 1]")
    if (scores < 0).any():
        raise BadInput("top_p needs scores >= 0; take softmax or relu first")
    total = scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    sorted_scores, order = (scores / total).sort(dim=-1, descending=True, stable=True)
    before = sorted_scores.cumsum(-1) - sorted_scores
    if p < 1:
        keep = (before < p) & (sorted_scores > 0)
        keep[..., 0] = True
    else:
        keep = torch.ones_like(before, dtype=torch.bool)
    return Selection(scores.shape[-1], scores, mask_=torch.zeros_like(keep).scatter(-1, order, keep))


def statistical_top_k(scores: Tensor, k: int) -> Selection:
    """Keep scores above mean + z * std, z the normal quantile that keeps k of N on average.

    No sort: two moments and a comparison a row; the count is k only for normal scores
    (You et al. 2025, Spark Transformer, arXiv 2506.06644, eq. 4).
    """
    check_scores(scores)
    n = scores.shape[-1]
    if not 0 < k < n:
        raise BadInput(f"k={k} must be in 1..{n - 1}: at k = {n} use top_k")
    z = torch.special.ndtri(torch.tensor(1 - k / n, dtype=torch.float64)).to(scores)
    std, mean = torch.std_mean(scores, dim=-1, keepdim=True)
    return threshold(scores, mean + z * std)


def sparsemax(scores: Tensor) -> Selection:
    """Euclidean projection of each row onto the simplex (Martins & Astudillo 2016, alg. 1); weight is the projection."""
    check_scores(scores)
    weight = maps.sparsemax(scores)
    return Selection(scores.shape[-1], weight, mask_=weight > 0)


def entmax15(scores: Tensor) -> Selection:
    """1.5-entmax of each row (Peters, Niculae & Martins 2019); weight is the map."""
    check_scores(scores)
    weight = maps.entmax15(scores)
    return Selection(scores.shape[-1], weight, mask_=weight > 0)
