"""Each query of a causal prefill scores the keys before it in few channels, finds the best and attends to them, compiled.

Shape letters as in ranked.py; X = B * H heads, Y = B * G key heads, E = S and what fills it up to 64.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import math

import numba
import numpy as np

from ...compiled import loop
from .forward import FAR, FRESH, NONE, ONE, multiply
from .loops import CHUNK, _end, _sortable, _step

ROWS = 16
"""Queries whose scores are made at once: those of 16,384 keys stay in the second cache."""
_SAMPLE = 512
"""Scores that a first guess of the bound is read from."""


@numba.njit(nogil=True, error_model="numpy")
def _guess(score, n, keep, count):  # type: ignore[no-untyped-def]
    """A bound that a little more than `keep` of score[:n] reach, as far as a sample tells, by its upper 16 bits."""
    step = n // _SAMPLE
    rest = keep / step
    rest = rest + 2.5 * math.sqrt(rest) + 2.0
    bits = score.view(np.int32)
    upper = -1
    for digit in range(2):
        count[:256] = 0
        for i in range(_SAMPLE):
            key = (np.int64(_sortable(bits[i * step])) >> 16) + 32768
            if digit == 0:
                count[key >> 8] += 1
            elif key >> 8 == upper:
                count[key & 255] += 1
        at = 255
        while at > 0 and rest > count[at]:
            rest -= count[at]
            at -= 1
        upper = at if digit == 0 else upper << 8 | at
    edge = np.empty(1, np.int32)
    edge[0] = _sortable(np.int32((upper - 32768) << 16))
    return edge.view(np.float32)[0]


@numba.njit(nogil=True, error_model="numpy")
def _best(score, n, keep, left, spare, count):  # type: ignore[no-untyped-def]
    """left[:keep] = where the `keep` highest of score[:n] stand, rising; of equals the first. Scores without NaN."""
    bits = score.view(np.int32)
    if keep == 0:
        return
    if keep >= n:
        for s in range(n):
            left[s] = s
        return
    many = 0
    if n >= 4 * _SAMPLE:
        bound = _guess(score, n, keep, count)
        for s in range(np.uint64(n)):
            left[many] = s
            many += score[s] >= bound
    if many < keep:
        for s in range(n):
            left[s] = s
        many = n
    low, high = np.int64(1) << 40, -(np.int64(1) << 40)
    for i in range(many):
        spare[i] = _sortable(bits[left[i]])
        low, high = min(low, np.int64(spare[i])), max(high, np.int64(spare[i]))
    rest, same = keep, many
    while low < high:                                    # the bound lies in low .. high; a 256th of that each time
        shift = 0
        while (high - low) >> shift > 255:
            shift += 1
        count[:256] = 0
        for i in range(same):
            count[(spare[i] - low) >> shift] += 1
        at = 255
        while rest > count[at]:
            rest -= count[at]
            at -= 1
        found, start = 0, low + (np.int64(at) << shift)
        stop = start + (np.int64(1) << shift)
        low, high = stop, start
        for i in range(same):
            key = np.int64(spare[i])
            if start <= key < stop:
                spare[found] = spare[i]
                found += 1
                low, high = min(low, key), max(high, key)
        same = found
    least = low
    found = 0
    for i in range(many):
        key = np.int64(_sortable(bits[left[i]]))
        level = key == least and rest > 0
        rest -= level
        left[found] = left[i]
        found += key > least or level


@loop(error_model="numpy")
def ranked(start, stop, items, low_NR, low_YRE, keep_T, q, k, ks, v, vs, sizes, out, top, total, lse):  # type: ignore[no-untyped-def]
    """Work items items[start:stop], tiles of ROWS queries; keep_T keys each, the own among them. q in base-2 logits, flat [B, H, T, D] like out."""
    H, G, T, D, S, tiles = sizes
    R, E = low_YRE.shape[1:]
    low_q, low_k = low_NR.reshape(-1), low_YRE.reshape(-1)
    made, unit = np.empty(ROWS * E, np.float32), np.empty(64, np.float32)
    left, spare, count = np.empty(S + 1, np.int64), np.empty(S + 1, np.int32), np.empty(256, np.int64)
    score, level, sums = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    at_k, at_v = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.int64)
    for item in items[start:stop]:
        x, first = item // tiles, item % tiles * ROWS
        b, g = x // H, x % H // (H // G)
        y, queries = b * G + g, min(ROWS, T - first)
        wide = (S - T + first + queries + 63) // 64 * 64
        multiply(queries, wide, low_q, (x * T + first) * R, R, ONE, low_k, y * R * E, E, made, NONE, E, R, unit, FRESH)
        for t in range(first, first + queries):
            r, n = x * T + t, S - T + t + 1
            mine = made[(t - first) * E : (t - first) * E + n]
            keep = keep_T[t]
            _best(mine, n - 1, keep - 1, left, spare, count)
            left[keep - 1] = n - 1
            top[r], total[r] = FAR, np.float32(0.0)
            for i in range(D):
                out[r * D + i] = np.float32(0.0)
            for begin in range(0, keep, CHUNK):
                some = min(CHUNK, keep - begin)
                for j in range(some):
                    s = left[begin + j]
                    score[j] = np.float32(0.0)
                    at_k[j], at_v[j] = b * ks[0] + g * ks[1] + s * ks[2], b * vs[0] + g * vs[1] + s * vs[2]
                _step(q, r * D, D, k, at_k, v, at_v, some, score, level, sums, out, r * D, top, total, r)
            _end(out, r * D, D, top, total, lse, r)
