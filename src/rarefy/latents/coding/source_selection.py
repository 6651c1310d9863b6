"""Which source tasks to sample for a target task, by the lasso (L1-A-MTRL; Wang et al. 2023, "Improved Active Multi-Task
Representation Learning via Lasso", arXiv 2306.02556).

Tasks share a linear representation: y = x B w_m + noise, with B [D, K] and a head w_m a task. The target's head is written as
a sparse combination of the sources' heads, nu = argmin 1/2 ||nu W - w_target||^2 + weight ||nu||_1, and the next samples are
drawn in proportion to |nu| (alg. 1, 2). The older rule (A-MTRL, Chen et al. 2022) takes the nu of least norm and draws by its
square, which spreads the budget over every source that correlates.

Shape letters: M = sources, N = samples of a task, D = width of an input, K = width of the representation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import BadInput
from ...method import not_negative, positive
from ...selection import check_finite
from .coordinate import coordinate_descent

Sampler = Callable[[int, int], tuple[Tensor, Tensor]]
"""(source, count) -> new inputs [count, D] and outputs [count] of that source."""


def relevance(heads_MK: Tensor, target_K: Tensor, weight: float | None = None) -> Tensor:
    """[M] nu by the lasso at a weight, or of least norm (the L2 rule) where weight is None.

    Raises:
        BadInput: shapes that do not fit, values that are not finite, or a weight below 0.
    """
    if heads_MK.ndim != 2 or target_K.shape != heads_MK.shape[1:]:
        raise BadInput(f"heads {list(heads_MK.shape)} and target {list(target_K.shape)} must be [M, K] and [K]")
    check_finite(heads_MK, "heads of the sources")
    check_finite(target_K, "the target's head")
    if weight is None:
        return target_K @ torch.linalg.pinv(heads_MK)
    return coordinate_descent(target_K[None], heads_MK, not_negative("weight", weight), tolerance=1e-10, most=5000).codes[0]


def shares(score_M: Tensor, budget: int, least: int = 0) -> list[int]:
    """Whole numbers that add up to `budget`, at least `least` each and the rest in proportion to scores >= 0.

    Largest remainders decide about what is left over; scores that are all 0 share evenly.
    """
    spare = positive("budget", budget) - len(score_M) * least
    if spare < 0 or least < 0:
        raise BadInput(f"least={least} a source of {len(score_M)} needs {least * len(score_M)} of a budget={budget}")
    score = score_M.double() if float(score_M.sum()) > 0 else torch.ones(len(score_M), dtype=torch.float64)
    exact = spare * score / score.sum()
    whole = exact.floor().long()
    whole[(exact - whole).argsort(descending=True, stable=True)[: spare - int(whole.sum())]] += 1
    return (whole + least).tolist()


def representation(tasks: list[tuple[Tensor, Tensor]], k: int, steps: int = 30, ridge: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(B [D, K] with orthonormal columns, heads [M, K]) of least squared error over all samples, by alternating least squares.

    Begun at the best K directions of the tasks' own ridge regressions, each weighted by its number of samples.
    """
    width = tasks[0][0].shape[1]
    positive("k", k, width)
    gram = [x.T @ x + ridge * len(x) * torch.eye(width, dtype=x.dtype) for x, _ in tasks]
    pull = [x.T @ y for x, y in tasks]
    own = torch.stack([torch.linalg.solve(g, p) * len(x) ** 0.5 for g, p, (x, _) in zip(gram, pull, tasks, strict=True)])
    basis = torch.linalg.svd(own, full_matrices=False)[2][:k].T
    if basis.shape[1] < k:
        raise BadInput(f"k={k} directions cannot be found from {len(tasks)} tasks; give at least as many tasks")

    def heads(basis: Tensor) -> Tensor:
        return torch.stack([torch.linalg.solve(basis.T @ g @ basis, basis.T @ p) for g, p in zip(gram, pull, strict=True)])

    for _ in range(steps):
        w = heads(basis)
        system = sum(torch.kron(g, torch.outer(h, h)) for g, h in zip(gram, w, strict=True))
        right = sum(torch.outer(p, h) for p, h in zip(pull, w, strict=True))
        assert isinstance(system, Tensor) and isinstance(right, Tensor)
        shift = 1e-9 * system.diagonal().mean() * torch.eye(len(system), dtype=system.dtype)
        basis = torch.linalg.qr(torch.linalg.solve(system + shift, right.flatten()).view(width, k))[0]
    return basis, heads(basis)


class Selected(NamedTuple):
    """What the rounds ended with."""

    basis: Tensor
    """[D, K] the representation from all samples."""
    target: Tensor
    """[K] the target's head on it."""
    relevance: Tensor
    """[M] nu of the last round."""
    samples: list[int]
    """Drawn from each source, over all rounds."""


def select_sources(
    sampler: Sampler, sources: int, target: tuple[Tensor, Tensor], k: int, budgets: list[int], weight: float | None = 0.05, least: int = 0,
) -> Selected:
    """Draw from the sources in rounds, each by the relevance that the samples so far show.

    Args:
        sampler: see Sampler. sources: M. target: inputs [N, D] and outputs [N] of the target task, few. k: of the representation.
        budgets: samples of each round; the first is shared evenly. weight: of the lasso, times the largest inner product of the
            target's head with a source's, so that 1 selects none; None takes the L2 rule. least: of each source and round.

    Raises:
        BadInput: an argument out of range, or a sampler that gives other shapes.
    """
    positive("sources", sources)
    if not budgets:
        raise BadInput("budgets is empty; give at least one round")
    held: list[tuple[Tensor, Tensor]] = []
    drawn, nu, score = [0] * sources, torch.zeros(sources), torch.ones(sources)
    basis = head = torch.empty(0)
    for budget in budgets:
        for m, count in enumerate(shares(score, budget, least)):
            x, y = sampler(m, count)
            if x.shape != (count, target[0].shape[1]) or y.shape != (count,):
                raise BadInput(f"source {m} gave {list(x.shape)} and {list(y.shape)} for {count} samples of width {target[0].shape[1]}")
            held = [*held, (x, y)] if len(held) <= m else [*held[:m], (torch.cat((held[m][0], x)), torch.cat((held[m][1], y))), *held[m + 1 :]]
            drawn[m] += count
        basis, heads = representation(held, k)
        seen = target[0] @ basis
        head = torch.linalg.lstsq(seen, target[1][:, None]).solution[:, 0]
        largest = float((heads @ head).abs().max())
        nu = relevance(heads, head, None if weight is None else weight * largest)
        score = nu.square() if weight is None else nu.abs()
    return Selected(basis, head, nu, drawn)
