"""How many of a query's codes a key shares, compiled.

Shape letters as in agree.py.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import numpy as np

from ...compiled import loop

_STRIP = 256
"""Keys whose counts stay in the nearest cache while codes are gone through."""


@loop(error_model="numpy")
def by_key(start, stop, code_XLT, code, steps, sizes, out_XTS):  # type: ignore[no-untyped-def]
    """out[x, t, s] = codes l at which queries' code[x, l, t] is that of key s, for x in start .. stop of B * H; few queries.

    Keys' codes lie in flat memory, `steps` apart over B, G, S.
    """
    H, G = sizes
    L, T = code_XLT.shape[1:]
    mine = np.empty(L, code_XLT.dtype)
    for x in range(start, stop):
        base = x // H * steps[0] + x % H // (H // G) * steps[1]
        for t in range(T):
            for i in range(L):
                mine[i] = code_XLT[x, i, t]
            for s in range(out_XTS.shape[2]):
                count, at = np.uint8(0), np.uint64(base + s * steps[2])
                for i in range(np.uint64(L)):
                    count = np.uint8(count + np.uint8(code[at + i] == mine[i]))
                out_XTS[x, t, s] = count


@loop(error_model="numpy")
def by_code(start, stop, code_XLT, code_YLS, share, out_XTS):  # type: ignore[no-untyped-def]
    """The same for keys' codes [x // share, l, s]: a vector of keys at a time."""
    L, T = code_XLT.shape[1:]
    S = code_YLS.shape[2]
    for x in range(start, stop):
        for t in range(T):
            for first in range(0, S, _STRIP):
                end = min(S, first + _STRIP)
                out_XTS[x, t, first:end] = 0
                for i in range(L):
                    mine = code_XLT[x, i, t]
                    for s in range(np.uint64(first), np.uint64(end)):
                        out_XTS[x, t, s] = np.uint8(out_XTS[x, t, s] + np.uint8(code_YLS[x // share, i, s] == mine))
