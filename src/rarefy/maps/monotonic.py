"""Monotonic attention (Raffel et al. 2017, arXiv 1704.00784; heads of it: Zhao et al. 2022, arXiv 2209.15176).

At output step t a head goes on from where it stopped before and halts at memory entry s with probability p_ts; in training the
expected stop is attended to, in use the first entry whose p exceeds 1/2.

Shape letters: T = output steps, S = memory entries, ... = batch and heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadInput


def expected_alignment(halt: Tensor) -> Tensor:
    """[..., T, S] probability of stopping at s in step t, of halting probabilities p [..., T, S] in [0, 1].

    a_ts = p_ts * (((1 - p_t,s-1) / p_t,s-1) a_t,s-1 + a_t-1,s) (Raffel et al.'s recurrence), begun at entry 0 and run without the division,
    which fails at p = 0. A row sums to at most one: what is missing ran past the end.
    """
    if halt.ndim < 2 or not halt.is_floating_point():
        raise BadInput(f"halting probabilities must be floats [..., T, S], not {halt.dtype} {list(halt.shape)}")
    if not bool(((halt >= 0) & (halt <= 1)).all()):
        raise BadInput("halting probabilities must lie in [0, 1]; take a sigmoid first")
    before = torch.zeros_like(halt[..., 0, :])
    before[..., 0] = 1
    rows = []
    for p in halt.unbind(-2):
        reached, out = torch.zeros_like(p[..., 0]), []
        for s in range(p.shape[-1]):
            reached = reached + before[..., s]                       # still walking when entry s is looked at
            out.append(reached * p[..., s])
            reached = reached * (1 - p[..., s])
        before = torch.stack(out, -1)
        rows.append(before)
    return torch.stack(rows, -2)


def hard_alignment(halt: Tensor) -> Tensor:
    """[..., T, S] bool: where a head stops in use, at the first entry not before its last stop with p > 1/2; none once it ran past the end."""
    at = torch.zeros(halt.shape[:-2], dtype=torch.int64, device=halt.device)
    place, rows = torch.arange(halt.shape[-1], device=halt.device), []
    for p in halt.unbind(-2):
        may = (p > 0.5) & (place >= at[..., None])
        stop = torch.where(may.any(-1), may.int().argmax(-1), halt.shape[-1])
        rows.append(place == stop[..., None])
        at = stop
    return torch.stack(rows, -2)
