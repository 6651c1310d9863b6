"""CPU path, backward: weights recomputed from the saved log-sum-exp, over the chosen blocks only; float32.

With P = 2^(S - lse) and dP = V dO^T: dS = P (dP - delta), dQ = dS K, dK = dS^T Q, dV = P^T dO, where delta is the row sum of dO * O less
the gradient of lse (FlashAttention, alg. 4). A work item is one key head: it alone writes its gradients of k and v.
Shape letters as in forward.py; W = numbers in a vector, C = D rounded up to a multiple of W.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import math

import numba
import numpy as np

from ...compiled import loop
from .forward import FRESH, NONE, ONE, hide, multiply, place, powers

_NO_KEY = np.float32(1e30)
"""lse of a query without keys, so that its weights come out as 0."""


@numba.njit(nogil=True, error_model="numpy")
def _fill(rows_ND, n, first, begin, end, scale, across, along, lanes, padded):  # type: ignore[no-untyped-def]
    """Rows begin .. end of a tile: across[d, r] and along[r, d] = scale * row; zeros in lanes that are no query."""
    D = rows_ND.shape[1]
    for r in range(lanes):
        if begin <= first + r < end:
            for d in range(D):
                x = rows_ND[n + first + r, d] * scale
                across[d * lanes + r] = x
                along[r * padded + d] = x
        else:
            for d in range(D):
                across[d * lanes + r] = np.float32(0.0)
                along[r * padded + d] = np.float32(0.0)


@numba.njit(nogil=True, error_model="numpy")
def _of_logits(P, dP, keys, lanes, delta):  # type: ignore[no-untyped-def]
    """dP = P (dP - delta)."""
    for j in range(keys):
        for r in range(lanes):
            dP[j * lanes + r] = P[j * lanes + r] * (dP[j * lanes + r] - delta[r])


@loop(error_model="numpy")
def backward(
    start, stop, q_ND, grad_ND, lse_N, delta_N, k, ks, v, vs, blocks, partial, tiles_PMR, sizes, scale, dq_ND, dk, dv
):  # type: ignore[no-untyped-def]
    """Gradients of key heads start .. stop of B * G; dk and dv flat [B, G, S, C], zeros at first; dk comes out without the
    factor log 2, since q is held in base-2 logits for both of its uses."""
    B, H, G, T, S, block, query_block, lanes, causal, tiles = sizes
    D, N = q_ND.shape[1], blocks.shape[3]
    padded = dk.size // max(1, B * G * S)
    unit = np.float32(scale * math.log2(math.e))
    q, qs, g, gs = (np.zeros(D * lanes, np.float32), np.zeros(padded * lanes, np.float32),
                    np.zeros(D * lanes, np.float32), np.zeros(padded * lanes, np.float32))
    P, dP, dq = np.empty(block * lanes, np.float32), np.empty(block * lanes, np.float32), np.empty(D * lanes, np.float32)
    lse, delta, keep, spare = (np.empty(lanes, np.float32), np.empty(lanes, np.float32),
                               np.ones(max(padded, lanes), np.float32), np.zeros(lanes, np.float32))
    per_log = np.float32(math.log(2))
    share = H // G
    for item in range(start * share * tiles, stop * share * tiles):
        which, Q, first, row = place(item, tiles, T, S, query_block, lanes)
        b, h = which // H, which % H
        mb, mh, group = min(b, blocks.shape[0] - 1), min(h, blocks.shape[1] - 1), h // share
        begin, end = max(first, S - T), min(first + lanes, S)
        if begin >= end:
            continue
        n = which * T - (S - T)
        _fill(q_ND, n, first, begin, end, unit, q, qs, lanes, padded)
        _fill(grad_ND, n, first, begin, end, np.float32(1.0), g, gs, lanes, padded)
        for r in range(lanes):
            there = begin <= first + r < end and lse_N[n + first + r] > -np.inf
            lse[r] = lse_N[n + first + r] / per_log if there else _NO_KEY
            delta[r] = delta_N[n + first + r] if there else np.float32(0.0)
        for i in range(D * lanes):
            dq[i] = np.float32(0.0)
        for c in range(min(N, (end - 1) // block + 1) if causal else N):
            if not blocks[mb, mh, Q, c]:
                continue
            key = c * block
            keys = min(block, S - key)
            from_k, from_v = b * ks[0] + group * ks[1] + key * ks[2], b * vs[0] + group * vs[1] + key * vs[2]
            to = ((b * G + group) * S + key) * padded
            multiply(keys, lanes, k, from_k, ks[2], ONE, q, NONE, lanes, P, NONE, lanes, D, keep, FRESH)
            number = partial[mb, mh, Q, c] if partial.size else np.int32(-1)
            if number >= 0 or (causal and key + keys - 1 > first):
                hide(P, keys, lanes, first, key, causal, tiles_PMR, number, row)
            powers(P, keys, lanes, lse, spare)
            multiply(keys, lanes, v, from_v, vs[2], ONE, g, NONE, lanes, dP, NONE, lanes, D, keep, FRESH)
            multiply(keys, padded, P, NONE, lanes, ONE, gs, NONE, padded, dv, to, padded, lanes, keep, NONE)
            _of_logits(P, dP, keys, lanes, delta)
            multiply(keys, padded, dP, NONE, lanes, ONE, qs, NONE, padded, dk, to, padded, lanes, keep, NONE)
            multiply(D, lanes, k, from_k, ONE, ks[2], dP, NONE, lanes, dq, NONE, lanes, keys, keep, NONE)
        for t in range(begin, end):
            for d in range(D):
                dq_ND[n + t, d] = dq[d * lanes + t - first] * np.float32(scale)
