"""A shuffled order of N rows that needs no table: the place of each row is computed on its own.

A balanced Feistel network over the smallest even number of bits that holds N, walked until it lands below N (Black and
Rogaway 2002, "Ciphers with Arbitrary Finite Domains", the cycle-walking cipher), with a 64-bit mixer as round function.
"""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 8
_A, _B = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def shuffled(places: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Rows at `places` (int64, 0..n-1) of the order that (seed, epoch) gives: a permutation of 0..n-1."""
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    digest = hashlib.blake2b(f"{seed},{epoch},{n}".encode(), digest_size=8 * _ROUNDS).digest()
    keys = np.frombuffer(digest, dtype="<u8")
    out = _feistel(places.astype(np.uint64), half, keys)
    while (outside := np.flatnonzero(out >= np.uint64(n))).size:
        out[outside] = _feistel(out[outside], half, keys)
    return out.astype(np.int64)


def _feistel(x: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    bits, low = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = x >> bits, x & low
    for key in keys:
        mixed = (right + key) * _A
        mixed = (mixed ^ (mixed >> np.uint64(29))) * _B
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & low)
    return (left << bits) | right
