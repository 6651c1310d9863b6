"""What all attention methods share in their specs, and the notes on what is peculiar to one.

Shape letters: H, G = query and key heads; T, S = queries and keys; D = head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..method import Sparse
from .latents import FLIPS
from .spec import Inputs

HEADS, KV_HEADS, KEYS, D_HEAD = 4, 2, 53, 20


def heads(batch: int, seed: int) -> Inputs:
    """q [B, 4, 53, 20], k and v [B, 2, 53, 20]: 53 keys leave a ragged last block."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, HEADS, KEYS, D_HEAD, generator=generator)
    k, v = torch.randn(2, batch, KV_HEADS, KEYS, D_HEAD, generator=generator).unbind()
    return q, k, v


def causal(method: Any, inputs: Inputs) -> Tensor:
    """softmax(q k / sqrt(D)) v over keys not later than the query, as two products."""
    q, k, v = inputs[:3]
    T, S = q.shape[2], k.shape[2]
    share = q.shape[1] // k.shape[1]
    score = q @ k.repeat_interleave(share, 1).mT / q.shape[-1] ** 0.5
    later = ~torch.ones(T, S, dtype=torch.bool).tril(S - T)
    return score.masked_fill(later, -torch.inf).softmax(-1) @ v.repeat_interleave(share, 1)


def pairs(method: Any, inputs: Inputs) -> float:
    """Density by the method's own count of (query, key) pairs."""
    with torch.no_grad():
        method.measured_density()
        method(*inputs)
    return method.measured_density()


def moved_blocks(method: Any, inputs: Inputs, order: Tensor) -> tuple[Sparse, Inputs]:
    """Whole key blocks before the newest in another order, seen from the last query only."""
    q, k, v = inputs
    at = torch.arange(k.shape[2])
    at[: len(order) * method.block] = at[: len(order) * method.block].view(len(order), -1)[order].flatten()
    return method, (q, k[:, :, at], v[:, :, at])


def fitted(method: Sparse, inputs: Inputs) -> None:
    """Observe queries, keys and values, and finish."""
    method.observe(*inputs)
    method.finish()


@dataclass(frozen=True)
class Notes:
    """What is peculiar to one attention method."""

    arguments: Mapping[str, Any] = field(default_factory=lambda: {"block": 8})
    """Constructor arguments beside budget, for small inputs."""
    variants: tuple[dict[str, Any], ...] = ()
    """Further arguments to run the laws with."""
    takes_budget: bool = True
    """False where the density follows from other arguments; the laws then run at `budgets` alone."""
    budgets: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    inputs: Callable[[int, int], Inputs] = heads
    fit: Callable[[Sparse, Inputs], None] | None = None
    dense: Callable[[Sparse, Inputs], Tensor] | None = causal
    """What everything selected must give; None with `not_dense`."""
    not_dense: str = ""
    permuted: Callable[[Sparse, Inputs, Tensor], tuple[Sparse, Inputs]] | None = None
    not_permuted: str = "the choice goes by position"
    density: Callable[[Sparse, Inputs], float] | None = pairs
    slack: float = 0.25
    """How far the measured density may lie from the budget: a query of the inputs sees at most 7 blocks of 8."""
    bad: tuple[tuple[Mapping[str, Any], str], ...] = ()
    """Further bad arguments and the one that the error must name."""
    bounds: Mapping[torch.dtype, float] = field(default_factory=lambda: FLIPS)
    expected_failures: Mapping[str, str] = field(default_factory=dict)
