"""CPU path, compiled, float32: chunks chosen by landmark, their keys rebuilt from low-rank factors, and entries that are held whole.

Shape letters as in __init__.py; R = query heads of a key head, S = tokens of the prompt, N = chunks, C = tokens of a chunk, F = rank,
U = rotated width, K = chunks chosen.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import numba
import numpy as np

from ...compiled import loop
from ..block_attention.few import dots, mix, soften
from ..block_attention.forward import FAR
from ..block_attention.loops import highest
from ..block_attention.tile import W
from .cpu import log_sum, scaled


@numba.njit(nogil=True, error_model="numpy")
def _choose(q, R, D, landmark, at, far_N, keep, score, best_N, chosen_N, level, sums):  # type: ignore[no-untyped-def]
    """chosen = the `keep` chunks with the most probability among the landmarks of `far`, the query counting that gives it most."""
    N = len(far_N)
    for r in range(R):
        dots(q, r * D, D, landmark, at, 0, N, score, 0)
        for n in range(N):
            score[n] = score[n] if far_N[n] else np.float32(-np.inf)
        _, total = soften(score, 0, N, FAR, level, sums)
        by = np.float32(1.0) / total if total > 0 else np.float32(0.0)
        for n in range(N):
            p = score[n] * by
            best_N[0, n] = p if r == 0 or p > best_N[0, n] else best_N[0, n]
    for n in range(N):
        best_N[0, n] = best_N[0, n] if far_N[n] else np.float32(-1.0)
    highest(0, 1, best_N.view(np.int32), np.full(1, keep), chosen_N)


@numba.njit(nogil=True, error_model="numpy")
def _turn(tile, o, D, cos_U, sin_U):  # type: ignore[no-untyped-def]
    """Rotary position of one rebuilt key: channel i turns with i + U / 2."""
    half = len(cos_U) // 2
    for i in range(half):
        a, b = tile[o + i], tile[o + half + i]
        tile[o + i], tile[o + half + i] = a * cos_U[i] - b * sin_U[i], b * cos_U[half + i] + a * sin_U[half + i]


@loop(error_model="numpy")
def chunks(
    start, stop, q_BH1D, new_k_BG1D, new_v_BG1D, k_BGMD, v_BGMD, at_BGM, landmark_BGND, far_BGN, factor_B1SF, basis_BFE, v_BGSD, cos_BSU, sin_BSU,
    sizes, scale, out_BHD, lse_BH,
):  # type: ignore[no-untyped-def]
    """Heads start .. stop of B * G; sizes are (entries held, place of the new token, chunks read, tokens of a chunk); U is 0 without rotation."""
    held, place, keep, C = sizes
    G, D = k_BGMD.shape[1], k_BGMD.shape[3]
    R, N, F = q_BH1D.shape[1] // G, landmark_BGND.shape[2], factor_B1SF.shape[3]
    near, M = keep * C, keep * C + held + 1
    wide = (M + W - 1) // W * W
    score, tile = np.empty(max(R * wide, N + W), np.float32), np.empty(near * D, np.float32)
    best, chosen = np.empty((1, N), np.float32), np.empty((1, N), np.bool_)
    level, sums = np.empty(W, np.float32), np.empty(W, np.float32)
    at_landmark, at_basis, at_tile = np.arange(N) * D, np.arange(F) * (G * D), np.arange(near) * D
    at_far, at_near = np.empty(near, np.int64), np.arange(held + 1) * D
    for x in range(start, stop):
        b, g = x // G, x % G
        k, v, q, out = k_BGMD[b, g], v_BGMD[b, g], scaled(q_BH1D[b, :, 0], g * R, R, scale), out_BHD[b].reshape(-1)
        k[held], v[held], at_BGM[b, g, held] = new_k_BG1D[b, g, 0], new_v_BG1D[b, g, 0], place
        _choose(q, R, D, landmark_BGND[b, g].reshape(-1), at_landmark, far_BGN[b, g], keep, score, best, chosen, level, sums)
        factor, basis, j = factor_B1SF[b, 0].reshape(-1), basis_BFE[b].reshape(-1)[g * D :], 0
        tile[:] = np.float32(0.0)
        for n in range(N):
            if chosen[0, n]:
                mix(factor, n * C * F, F, C, basis, at_basis, 0, F, D, tile, j * D, D)
                for s in range(n * C, (n + 1) * C):
                    at_far[j] = s * D
                    if cos_BSU.shape[2]:
                        _turn(tile, j * D, D, cos_BSU[b, s], sin_BSU[b, s])
                    j += 1
        for r in range(R):
            dots(q, r * D, D, tile, at_tile, 0, near, score, r * wide)
            dots(q, r * D, D, k.reshape(-1), at_near, 0, held + 1, score, r * wide + near)
            top, total = soften(score, r * wide, M, FAR, level, sums)
            by = np.float32(1.0) / total
            for i in range(r * wide, r * wide + M):
                score[i] *= by
            lse_BH[b, g * R + r] = log_sum(top, total)
        out[g * R * D : (g + 1) * R * D] = np.float32(0.0)
        mix(score, 0, wide, R, v_BGSD[b, g].reshape(-1), at_far, 0, near, D, out, g * R * D, D)
        mix(score, near, wide, R, v.reshape(-1), at_near, 0, held + 1, D, out, g * R * D, D)
