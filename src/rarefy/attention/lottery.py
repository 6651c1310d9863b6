"""A lottery by place: the same in a batch and alone, in pieces and whole, on every machine."""

from __future__ import annotations

from torch import Tensor

PRIMES = (2654435761, 2246822519, 3266489917, 668265263)


def drawn(*at: Tensor | int) -> Tensor:
    """float64 in [0, 1) of up to four whole numbers, broadcast against each other: neighbours are independent."""
    x = sum(place * prime for place, prime in zip(at, PRIMES, strict=False))
    for shift in (15, 13, 16):
        x = ((x ^ (x >> shift)) * PRIMES[1]) & 0x7FFFFFFF        # avalanche
    return x.double() / 2**31  # type: ignore[union-attr]
