"""CPU path, forward, bfloat16 on hosts that multiply pairs of it: logits, maxima and sums in float32, weights rounded to bfloat16.

Two neighbours along the summed dimension make a uint32: channels of a query or key, which lie so, and two keys' values, which are put
together once (`pair_values`). Shape letters as in forward.py; E = D / 2, Z = pairs of keys.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import math

import numba
import numpy as np

from ...compiled import loop
from .forward import FAR, FRESH, NONE, ONE, THIN, WIDTH, hide, multiplier, place, powers, put, raise_tops
from .tile import ROWS, VECTORS, paired_exponentials, product

_multiply = multiplier(product(ROWS, VECTORS, True), product(1, VECTORS, True), product(8, 1, True), product(1, 1, True))
"""Of pairs of bfloat16 along t."""
_exps, _thin_exps = paired_exponentials(VECTORS), paired_exponentials(1)


@numba.njit(nogil=True, error_model="numpy")
def _powers(S, pairs, lanes, top, total, P, scale):  # type: ignore[no-untyped-def]
    """P = 2^(scale S - top) as pairs of rows, and their sums added to total."""
    y = 0
    while y < lanes:
        if y + WIDTH <= lanes:
            _exps(S, lanes, pairs, top, total, y, P, scale)
            y += WIDTH
        else:
            _thin_exps(S, lanes, pairs, top, total, y, P, scale)
            y += THIN


@loop(error_model="numpy")
def pair_values(start, stop, v_XSD, out_XZD):  # type: ignore[no-untyped-def]
    """out[x, z, d] = keys 2z (low half) and 2z + 1 of v, uint16, for x in start .. stop; an odd last key is paired with 0."""
    S, D = v_XSD.shape[1:]
    for x in range(start, stop):
        for z in range(S // 2):
            for d in range(D):
                out_XZD[x, z, d] = np.uint32(v_XSD[x, 2 * z, d]) | (np.uint32(v_XSD[x, 2 * z + 1, d]) << np.uint32(16))
        if S % 2:
            for d in range(D):
                out_XZD[x, S // 2, d] = np.uint32(v_XSD[x, S - 1, d])


@loop(error_model="numpy")
def forward(
    start, stop, items, q_NE, k, ks, v, vs, out_ND, lse_N, blocks, partial, tiles_PMR, sizes, scale
):  # type: ignore[no-untyped-def]
    """As forward.forward with q and k as pairs of channels, v as pairs of keys (strides over (B, G, pair)); out is float32; even blocks."""
    B, H, G, T, S, block, query_block, lanes, causal, tiles = sizes
    E, D, N = q_NE.shape[1], out_ND.shape[1], blocks.shape[3]
    scale2 = np.float32(scale * math.log2(math.e))
    q, scores, O = np.zeros(E * lanes, np.uint32), np.empty(block * lanes, np.float32), np.empty(D * lanes, np.float32)
    weights = np.empty(block // 2 * lanes, np.uint32)
    top, total, scaled = np.empty(lanes, np.float32), np.empty(lanes, np.float32), np.empty(lanes, np.float32)
    keep, spare = np.empty(lanes, np.float32), np.empty(lanes, np.float32)
    for item in items[start:stop]:
        which, Q, first, row = place(item, tiles, T, S, query_block, lanes)
        b, h = which // H, which % H
        mb, mh, g = min(b, blocks.shape[0] - 1), min(h, blocks.shape[1] - 1), h // (H // G)
        begin, end = max(first, S - T), min(first + lanes, S)
        if begin >= end:
            continue
        n = which * T - (S - T)
        for t in range(begin, end):
            for e in range(E):
                q[e * lanes + t - first] = q_NE[n + t, e]
        for r in range(lanes):
            top[r], total[r] = FAR, np.float32(0.0)
        for i in range(D * lanes):
            O[i] = np.float32(0.0)
        for c in range(min(N, (end - 1) // block + 1) if causal else N):
            if not blocks[mb, mh, Q, c]:
                continue
            key = c * block
            keys = min(block, S - key)
            _multiply(keys, lanes, k, b * ks[0] + g * ks[1] + key * ks[2], ks[2], ONE, q, NONE, lanes, scores, NONE, lanes, E, keep, FRESH)
            number = partial[mb, mh, Q, c] if partial.size else np.int32(-1)
            if number >= 0 or (causal and key + keys - 1 > first):
                hide(scores, keys, lanes, first, key, causal, tiles_PMR, number, row)
            if keys % 2:
                for r in range(lanes):
                    scores[keys * lanes + r] = np.float32(-np.inf)
            pairs = (keys + 1) // 2
            raise_tops(scores, keys, lanes, top, keep)
            for r in range(lanes):
                scaled[r] = top[r] * scale2
                keep[r] *= scale2
            powers(keep, ONE, lanes, scaled, spare)
            for r in range(lanes):
                total[r] *= keep[r]
            _powers(scores, pairs, lanes, scaled, total, weights, scale2)
            from_v = b * vs[0] + g * vs[1] + key // 2 * vs[2]
            _multiply(D, lanes, v, from_v, ONE, vs[2], weights, NONE, lanes, O, NONE, lanes, pairs, keep, NONE)
        put(out_ND, lse_N, n, O, lanes, top, total, scale2, first, begin, end)
