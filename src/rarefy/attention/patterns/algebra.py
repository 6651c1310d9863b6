"""Patterns say which (query, key) pairs attention may look at, by position alone; they combine with |, & and ~.

Shape letters: T = queries, S = keys, Q = query blocks, N = key blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...method import positive


@dataclass(frozen=True)
class Pattern:
    """A named predicate on (query position, key position), broadcast over tensors of positions."""

    text: str
    """The expression that made it."""
    allowed: Callable[[Tensor, Tensor], Tensor]

    def __or__(self, other: Pattern) -> Pattern:
        return Pattern(f"({self} | {other})", lambda q, k: self.allowed(q, k) | other.allowed(q, k))

    def __and__(self, other: Pattern) -> Pattern:
        return Pattern(f"({self} & {other})", lambda q, k: self.allowed(q, k) & other.allowed(q, k))

    def __invert__(self) -> Pattern:
        return Pattern(f"~{self}", lambda q, k: ~self.allowed(q, k))

    def __str__(self) -> str:
        return self.text

    def mask(self, T: int, S: int, *, causal: bool = True) -> Tensor:
        """[T, S] bool for queries at the last T of S positions."""
        q, k = torch.arange(S - T, S)[:, None], torch.arange(S)
        out = self.allowed(q, k).expand(T, S)
        return out & (k <= q) if causal else out

    def density(self, S: int) -> float:
        """Pairs allowed of causal pairs, exactly, for S queries and keys."""
        return self.mask(S, S).sum().item() / (S * (S + 1) / 2)

    def compile(self, T: int, S: int, *, size: int, query_block: int, causal: bool = True) -> Tensor:
        """[Q, N] bool: key blocks in which some pair of a query block is allowed."""
        mask_TS = self.mask(T, S, causal=causal)
        first = (S - T) // query_block
        row_T = torch.arange(S - T, S) // query_block - first
        out = torch.zeros(int(row_T[-1]) + 1 if T else 0, -(-S // size), dtype=torch.bool)
        at = mask_TS.nonzero()
        out[row_T[at[:, 0]], at[:, 1] // size] = True
        return out


def window(n: int) -> Pattern:
    """The n nearest keys up to and with the query's own."""
    positive("window", n)
    return Pattern(f"window({n})", lambda q, k: (q - k < n) & (k <= q))


def sinks(n: int) -> Pattern:
    """The first n keys (Xiao et al. 2023, arXiv 2309.17453)."""
    positive("sinks", n)
    return Pattern(f"sinks({n})", lambda q, k: (k < n) & (q >= 0))


def strided(n: int) -> Pattern:
    """Every n-th key back from the query (Child et al. 2019, arXiv 1904.10509)."""
    positive("stride", n)
    return Pattern(f"strided({n})", lambda q, k: (q - k) % n == 0)


def block(n: int) -> Pattern:
    """Keys of the query's own block of n."""
    positive("block", n)
    return Pattern(f"block({n})", lambda q, k: q // n == k // n)
