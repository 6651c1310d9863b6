"""CPU path, compiled, float32. Stores are contiguous with room behind what is held; logits are in base 2 (`scale` comes times log2 e).

Shape letters as in __init__.py; R = query heads of a key head.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import math

import numba
import numpy as np

from ...compiled import loop
from ..block_attention.few import dots, mix, soften
from ..block_attention.forward import FAR
from ..block_attention.loops import highest
from ..block_attention.tile import W, prefetch

_LOG2 = np.float32(math.log(2))


@numba.njit(nogil=True, error_model="numpy")
def log_sum(top, total):  # type: ignore[no-untyped-def]
    """Log-sum-exp, base e, of `total` times 2^top."""
    return (top + np.float32(math.log2(total))) * _LOG2


@numba.njit(nogil=True, error_model="numpy")
def over(q, k, v, rows, r0, M, R, D, score, wide, out, o, lse_R, level_W, sums_W):  # type: ignore[no-untyped-def]
    """R queries over the same M rows: out[o + r * D :] and lse_R, base e; score[r * wide :] is left holding the probabilities."""
    for j in range(0, M, 64):                                              # rows stay near while each query reads them
        for r in range(R):
            dots(q, r * D, D, k, rows, r0 + j, min(64, M - j), score, r * wide + j)
    for r in range(R):
        top, total = soften(score, r * wide, M, FAR, level_W, sums_W)
        by = np.float32(1.0) / total
        for j in range(M):
            score[r * wide + j] *= by
        lse_R[r] = log_sum(top, total)
    for i in range(R * D):
        out[o + i] = np.float32(0.0)
    mix(score, 0, wide, R, v, rows, r0, M, D, out, o, D)


@numba.njit(nogil=True, error_model="numpy")
def _least(at, sums, count, first, recent):  # type: ignore[no-untyped-def]
    """The entry of 0 .. count - 1 with the lowest worth: its sum (its place where there are no sums), infinite below `first` and above
    `recent`; of equals the earliest."""
    best, lowest = 0, np.float32(np.inf)
    for j in range(count):
        worth = sums[j] if len(sums) else np.float32(at[j])
        worth = np.float32(np.inf) if at[j] < first or at[j] > recent else worth
        if worth < lowest or (worth == lowest and at[j] < at[best]):
            best, lowest = j, worth
    return best


@numba.njit(nogil=True, error_model="numpy")
def _swap(x, a, b):  # type: ignore[no-untyped-def]
    for i in range(x.shape[1]):
        x[a, i], x[b, i] = x[b, i], x[a, i]


@numba.njit(nogil=True, error_model="numpy")
def scaled(q_HD, h0, R, scale):  # type: ignore[no-untyped-def]
    """The queries of a key head, flat."""
    D = q_HD.shape[1]
    out = np.empty(R * D, np.float32)
    for r in range(R):
        for i in range(D):
            out[r * D + i] = q_HD[h0 + r, i] * scale
    return out


@loop(error_model="numpy")
def evicting(start, stop, q_BH1D, new_k_BG1D, new_v_BG1D, k_BGMD, v_BGMD, at_BGM, sums_BGM, sizes, scale, out_BHD, lse_BH):  # type: ignore[no-untyped-def]
    """Heads start .. stop of B * G; sizes are (entries held, place of the new token, first, recent, whether one goes)."""
    held, place, first, recent, drop = sizes
    G, D = k_BGMD.shape[1], k_BGMD.shape[3]
    R = q_BH1D.shape[1] // G
    M = held + 1
    wide = (M + W - 1) // W * W
    rows, score = np.empty(M, np.int64), np.empty(R * wide, np.float32)
    level, total = np.empty(W, np.float32), np.empty(W, np.float32)
    for j in range(M):
        rows[j] = j * D
    for x in range(start, stop):
        b, g = x // G, x % G
        k, v, at, sums = k_BGMD[b, g], v_BGMD[b, g], at_BGM[b, g], sums_BGM[b, g]
        k[held], v[held], at[held] = new_k_BG1D[b, g, 0], new_v_BG1D[b, g, 0], place
        over(scaled(q_BH1D[b, :, 0], g * R, R, scale), k.reshape(-1), v.reshape(-1), rows, 0, M, R, D, score, wide,
             out_BHD[b].reshape(-1), g * R * D, lse_BH[b, g * R : (g + 1) * R], level, total)
        if len(sums):
            sums[held] = np.float32(0.0)
            for j in range(M):
                got = np.float32(0.0)
                for r in range(R):
                    got += score[r * wide + j]
                sums[j] += got
        if drop:
            victim = _least(at, sums, held, first, recent)
            _swap(k, victim, held)
            _swap(v, victim, held)
            at[victim], at[held] = at[held], at[victim]
            if len(sums):
                sums[victim], sums[held] = sums[held], sums[victim]


@numba.njit(nogil=True, error_model="numpy")
def _bound(meta_NE, n, fresh, k_D):  # type: ignore[no-untyped-def]
    """Take a key into the largest and smallest of page n."""
    D = len(k_D)
    for i in range(D):
        meta_NE[n, i] = k_D[i] if fresh else max(meta_NE[n, i], k_D[i])
        meta_NE[n, D + i] = k_D[i] if fresh else min(meta_NE[n, D + i], k_D[i])


@loop(error_model="numpy")
def pages(start, stop, q_BH1D, new_k_BG1D, new_v_BG1D, k_BGSD, v_BGSD, meta_BGNE, sizes, scale, out_BHD, lse_BH):  # type: ignore[no-untyped-def]
    """Heads start .. stop of B * G; sizes are (tokens held, tokens of a page, pages that each query head reads)."""
    held, page, keep = sizes
    G, D = k_BGSD.shape[1], k_BGSD.shape[3]
    R = q_BH1D.shape[1] // G
    S = held + 1
    N = (S + page - 1) // page
    both, bound, at = np.empty(2 * D, np.float32), np.empty((R, N), np.float32), np.empty(N, np.int64)
    chosen, keep_R = np.empty((R, N), np.bool_), np.full(R, keep)
    most = keep * page
    wide = (most + W - 1) // W * W
    rows, score = np.empty(most, np.int64), np.empty(wide, np.float32)
    level, total = np.empty(W, np.float32), np.empty(W, np.float32)
    for n in range(N):
        at[n] = n * 2 * D
    for x in range(start, stop):
        b, g = x // G, x % G
        k_BGSD[b, g, held], v_BGSD[b, g, held] = new_k_BG1D[b, g, 0], new_v_BG1D[b, g, 0]
        _bound(meta_BGNE[b, g], N - 1, held % page == 0, new_k_BG1D[b, g, 0])
        k, v, q, out = k_BGSD[b, g].reshape(-1), v_BGSD[b, g].reshape(-1), scaled(q_BH1D[b, :, 0], g * R, R, scale), out_BHD[b].reshape(-1)
        for r in range(R):
            for i in range(D):
                value = q[r * D + i]
                both[i], both[D + i] = max(value, np.float32(0.0)), min(value, np.float32(0.0))
            dots(both, 0, 2 * D, meta_BGNE[b, g].reshape(-1), at, 0, N, bound[r], 0)
            bound[r, N - 1] = np.float32(np.inf)
        highest(0, R, bound.view(np.int32), keep_R, chosen)
        for r in range(R):
            M = 0
            for n in range(N):
                if chosen[r, n]:
                    for s in range(n * page, min(S, (n + 1) * page)):
                        rows[M] = s * D
                        M += 1
                        for i in range(0, D, 16):
                            prefetch(v, s * D + i)
            h = g * R + r
            over(q[r * D : (r + 1) * D], k, v, rows, 0, M, 1, D, score, wide, out, h * D, lse_BH[b, h : h + 1], level, total)
