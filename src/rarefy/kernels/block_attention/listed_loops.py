"""Products of a query with the keys of a list, compiled. Shape letters as in listed.py."""

# pyright: basic, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import numpy as np

from ...compiled import loop
from .loops import CHUNK, _dots


@loop(error_model="numpy")
def products(start, stop, q, k, ks, index_NX, sizes, out_NX):  # type: ignore[no-untyped-def]
    """out[n, x] = q[n] . k[index[n, x]] for queries n in start .. stop of B * H * T; -inf where the index is negative."""
    H, G, T, D = sizes
    score, rows = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.int64)
    for n in range(start, stop):
        base = n // (H * T) * ks[0] + n // T % H // (H // G) * ks[1]
        for first in range(0, index_NX.shape[1], CHUNK):
            count = min(CHUNK, index_NX.shape[1] - first)
            for i in range(count):
                rows[i], score[i] = base + max(index_NX[n, first + i], 0) * ks[2], np.float32(0.0)
            _dots(q, n * D, D, k, rows, count, score)
            for i in range(count):
                out_NX[n, first + i] = score[i] if index_NX[n, first + i] >= 0 else np.float32(-np.inf)
