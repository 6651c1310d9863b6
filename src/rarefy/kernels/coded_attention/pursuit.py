"""CPU path of orthogonal matching pursuit: a row at a time, weights by a Cholesky factor that grows with each atom.

Shape letters: N = rows, A = atoms, D = width, K = atoms of a row.
"""

# pyright: basic
from __future__ import annotations

import math

import numba
import numpy as np

from ...compiled import loop

_SUMS = {"contract", "reassoc", "nsz"}


@numba.njit(nogil=True, fastmath=_SUMS)
def _dot(a, b):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@loop()
def pursuit(start, stop, x_ND, atoms_AD, index_NK, weight_NK):  # type: ignore[no-untyped-def]
    """Rows start .. stop of float64: index and weight come in as zeros, and stay so once nothing (1e-9 of the row) is left of it."""
    A, K = len(atoms_AD), index_NK.shape[1]
    L, toward, y, w = np.zeros((K, K)), np.zeros(K), np.zeros(K), np.zeros(K)
    used, rest = np.zeros(A, np.bool_), np.zeros(x_ND.shape[1])
    for n in range(start, stop):
        x, chosen = x_ND[n], index_NK[n]
        rest[:], used[:] = x, False
        least = 1e-18 * _dot(x, x)
        for step in range(min(K, A)):
            if not _dot(rest, rest) > least:
                break
            best, most = 0, -1.0
            for a in range(A):
                size = abs(_dot(rest, atoms_AD[a]))
                if size > most and not used[a]:
                    best, most = a, size
            chosen[step], used[best] = best, True
            own = _dot(atoms_AD[best], atoms_AD[best]) + 1e-12
            for j in range(step):
                t = _dot(atoms_AD[best], atoms_AD[chosen[j]])
                for i in range(j):
                    t -= L[step, i] * L[j, i]
                L[step, j] = t / L[j, j]
                own -= L[step, j] ** 2
            L[step, step] = math.sqrt(max(own, 1e-12))
            toward[step] = _dot(x, atoms_AD[best])
            y[step] = toward[step]
            for j in range(step):
                y[step] -= L[step, j] * y[j]
            y[step] /= L[step, step]
            rest[:] = x
            for j in range(step, -1, -1):
                w[j] = y[j]
                for i in range(j + 1, step + 1):
                    w[j] -= L[i, j] * w[i]
                w[j] /= L[j, j]
                rest -= w[j] * atoms_AD[chosen[j]]
            weight_NK[n, : step + 1] = w[: step + 1]
