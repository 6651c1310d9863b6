"""CPU path of line attention: columns gathered side by side, dense bands by key blocks, single diagonals vector by vector; one online softmax.

A diagonal has no product of matrices in it: lane r reads key t + r - d, so it is a product, channel by channel, of queries with keys shifted
by d, both lying along the lanes. That costs about four times as much a pair as a tile does, which a band must be dense enough to repay.
Shape letters as in forward.py; C = columns of all heads, side by side; E = S and 64 places before and behind.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import math

import numba
import numpy as np

from ...compiled import loop
from .forward import FAR, FRESH, LANES, NONE, ONE, WIDTH, multiply, online, place, put
from .tile import by_lanes

_dots, _sums = by_lanes(True), by_lanes(False)


@numba.njit(nogil=True, error_model="numpy")
def _columns(q, start, stop, at_C, k_CD, v_CD, first, end, scores, top, total, keep, spare, O, D):  # type: ignore[no-untyped-def]
    """Columns start .. stop, in order of position: a query sees those up to its own."""
    c = start
    while c < stop and at_C[c] < end:
        keys = min(LANES, stop - c)
        multiply(keys, LANES, k_CD, c * D, D, ONE, q, NONE, LANES, scores, NONE, LANES, D, keep, FRESH)
        for j in range(keys):
            for r in range(min(LANES, at_C[c + j] - first)):
                scores[j * LANES + r] = np.float32(-np.inf)
        online(scores, keys, LANES, top, total, keep, spare)
        multiply(D, LANES, v_CD, c * D, ONE, D, scores, NONE, LANES, O, NONE, LANES, keys, keep, NONE)
        c += LANES


@numba.njit(nogil=True, error_model="numpy")
def _bands(q, dense, near, taken, k, k0, kstep, v, v0, vstep, first, S, scores, top, total, keep, spare, O, D):  # type: ignore[no-untyped-def]
    """Key blocks in a band of 64 distances that is dense; near[64 + d] and taken[64 + s] are -inf at distances left out and at columns."""
    row = first // LANES
    for c in range(row + 1):
        g = row - c
        if not (dense[g] or (g > 0 and dense[g - 1])):
            continue
        key = c * LANES
        keys = min(LANES, S - key)
        multiply(keys, LANES, k, k0 + key * kstep, kstep, ONE, q, NONE, LANES, scores, NONE, LANES, D, keep, FRESH)
        for j in range(keys):
            less, n = taken[LANES + key + j], LANES + first - key - j
            for r in range(LANES):
                scores[j * LANES + r] += near[n + r] + less
        online(scores, keys, LANES, top, total, keep, spare)
        multiply(D, LANES, v, v0 + key * vstep, ONE, vstep, scores, NONE, LANES, O, NONE, LANES, keys, keep, NONE)


@numba.njit(nogil=True, error_model="numpy")
def _diagonals(q, start, stop, back, taken, k, v, base, E, first, channels, shift, scores, top, total, keep, spare, O, D):  # type: ignore[no-untyped-def]
    """Single distances back[start .. stop], nearest first; k and v flat [.., D, E], those of this head from `base`."""
    x = start
    while x < stop and back[x] < first + LANES:
        count = 0
        while count < LANES and x < stop and back[x] < first + LANES:
            n = LANES + first - back[x]
            shift[count] = n
            for y in range(LANES // WIDTH):
                _dots(q, y * WIDTH, LANES, k, base + n + y * WIDTH, channels, NONE, scores, count * LANES + y * WIDTH, D, keep, NONE)
            for r in range(LANES):
                scores[count * LANES + r] += taken[n + r]
            count += 1
            x += 1
        online(scores, count, LANES, top, total, keep, spare)
        for d in range(D):
            for y in range(LANES // WIDTH):
                _sums(scores, y * WIDTH, LANES, v, base + d * E + y * WIDTH, shift, NONE, O, d * LANES + y * WIDTH, count, keep, y * WIDTH)


@loop(error_model="numpy")
def lines(
    begin, finish, items, q_ND, k, ks, v, vs, start_X, at_C, kc, vc, dense_XG, near_XE, taken_XE, single_X, back, kt, vt, sizes, scale,
    out_ND, lse_N
):  # type: ignore[no-untyped-def]
    """Work items items[begin:finish], tiles of 64 queries; X = B * H heads, whose columns are start_X[x] .. start_X[x + 1] of C."""
    B, H, G, T, S, tiles = sizes
    D, E = q_ND.shape[1], S + 2 * LANES
    scale2 = np.float32(scale * math.log2(math.e))
    q, scores, O = np.zeros(D * LANES, np.float32), np.empty(LANES * LANES, np.float32), np.empty(D * LANES, np.float32)
    top, total, keep, spare = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    channels, shift = np.arange(D) * E, np.empty(LANES, np.int64)
    for item in items[begin:finish]:
        which, _, first, _ = place(item, tiles, T, S, LANES, LANES)
        b, g = which // H, which % H // (H // G)
        low, end = max(first, S - T), min(first + LANES, S)
        n = which * T - (S - T)
        for r in range(LANES):
            for d in range(D):
                q[d * LANES + r] = q_ND[n + first + r, d] * scale2 if low <= first + r < end else np.float32(0.0)
            top[r], total[r] = FAR, np.float32(0.0)
        for i in range(D * LANES):
            O[i] = np.float32(0.0)
        _columns(q, start_X[which], start_X[which + 1], at_C, kc, vc, first, end, scores, top, total, keep, spare, O, D)
        _bands(q, dense_XG[which], near_XE[which], taken_XE[which], k, b * ks[0] + g * ks[1], ks[2], v, b * vs[0] + g * vs[1], vs[2], first, S,
               scores, top, total, keep, spare, O, D)
        _diagonals(q, single_X[which], single_X[which + 1], back, taken_XE[which], kt, vt, (b * G + g) * D * E, E, first, channels, shift,
                   scores, top, total, keep, spare, O, D)
        put(out_ND, lse_N, n, O, LANES, top, total, np.float32(1.0), first, low, end)
