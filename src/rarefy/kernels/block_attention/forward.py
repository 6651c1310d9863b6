"""CPU path, forward: FlashAttention's online softmax over chosen key blocks, queries in the lanes of vectors, keys and values read in place.

A work item is one tile of L queries of one head. Arrays of keys and values are flat memory with strides.
Shape letters as in __init__.py; L = lanes (queries in a tile), M = keys in a block, b, h = batch and heads of the mask (1 where all share).
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from ...compiled import loop
from .tile import ROWS, VECTORS, W, exponentials, maximum, product

LANES = 64
"""Queries in a tile; a query block of 16 or 32 is a tile of its own."""
FAR = np.float32(-1e30)
"""Maximum of a query that has seen no key; unchosen pairs are at minus infinity, which stays below it."""

_tops, _thin_tops, _exps, _thin_exps = maximum(VECTORS), maximum(1), exponentials(VECTORS), exponentials(1)
WIDTH, THIN = VECTORS * W, W
FRESH, NONE, ONE = np.int64(-1), np.int64(0), np.int64(1)          # typed: a literal would compile a second time


def multiplier(tile: Any, row: Any, thin: Any, thin_row: Any) -> Any:
    """The product of matrices by four micro-kernels: wide and narrow tiles, many rows and one."""

    @numba.njit(nogil=True, error_model="numpy")
    def multiply(rows, columns, A, a, ax, at, B, b, bt, C, c, cx, count, keep, k):  # type: ignore[no-untyped-def]
        """C[x, y] = keep[y] C[x, y] + sum over t of A[x, t] B[t, y], float32; columns a multiple of W. Strides as in
        tile.product; k < 0: C from 0."""
        y = 0
        while y < columns:
            ky = k + y if k >= 0 else k
            x = 0
            if y + WIDTH <= columns:
                while x + ROWS <= rows:
                    tile(A, a + x * ax, ax, at, B, b + y, bt, C, c + x * cx + y, cx, count, keep, ky)
                    x += ROWS
                while x < rows:
                    row(A, a + x * ax, ax, at, B, b + y, bt, C, c + x * cx + y, cx, count, keep, ky)
                    x += 1
                y += WIDTH
            else:
                while x + 8 <= rows:
                    thin(A, a + x * ax, ax, at, B, b + y, bt, C, c + x * cx + y, cx, count, keep, ky)
                    x += 8
                while x < rows:
                    thin_row(A, a + x * ax, ax, at, B, b + y, bt, C, c + x * cx + y, cx, count, keep, ky)
                    x += 1
                y += THIN

    return multiply


multiply = multiplier(product(ROWS, VECTORS), product(1, VECTORS), product(8, 1), product(1, 1))


@numba.njit(nogil=True, error_model="numpy")
def hide(S, keys, lanes, first_query, first_key, causal, tiles_PMR, number, row):  # type: ignore[no-untyped-def]
    """Minus infinity at the pairs of a tile that causality or the mask's tile `number` (-1: none) leaves out; `row` is the tile's first query
    in its query block."""
    if causal:
        for j in range(keys):
            for r in range(min(lanes, first_key + j - first_query)):
                S[j * lanes + r] = np.float32(-np.inf)
    if number >= 0:
        for j in range(keys):
            for r in range(lanes):
                S[j * lanes + r] = S[j * lanes + r] if tiles_PMR[number, j, row + r] else np.float32(-np.inf)


@numba.njit(nogil=True, error_model="numpy")
def raise_tops(S, keys, lanes, top, keep):  # type: ignore[no-untyped-def]
    """top[:] = max(top, rows of S); keep[:] = what top was."""
    for r in range(lanes):
        keep[r] = top[r]
    y = 0
    while y < lanes:
        if y + WIDTH <= lanes:
            _tops(S, y, lanes, keys, top, y)
            y += WIDTH
        else:
            _thin_tops(S, y, lanes, keys, top, y)
            y += THIN


@numba.njit(nogil=True, error_model="numpy")
def powers(S, keys, lanes, top, total):  # type: ignore[no-untyped-def]
    """S = 2^(S - top), and its rows added to total."""
    y = 0
    while y < lanes:
        if y + WIDTH <= lanes:
            _exps(S, y, lanes, keys, top, total, y)
            y += WIDTH
        else:
            _thin_exps(S, y, lanes, keys, top, total, y)
            y += THIN


@numba.njit(nogil=True, error_model="numpy")
def online(S, keys, lanes, top, total, keep, spare):  # type: ignore[no-untyped-def]
    """A step of the online softmax: new maxima, S = 2^(S - top), keep = 2^(old top - top), total = keep * total + sums."""
    raise_tops(S, keys, lanes, top, keep)
    powers(keep, ONE, lanes, top, spare)
    for r in range(lanes):
        total[r] *= keep[r]
    powers(S, keys, lanes, top, total)


@numba.njit(nogil=True, error_model="numpy")
def place(item, tiles, T, S, query_block, lanes):  # type: ignore[no-untyped-def]
    """(which head of B * H, query block of the mask, position of the tile's first query, first row in the block) of a work item."""
    which, tile = item // tiles, item % tiles
    share = query_block // lanes
    base = (S - T) // query_block
    return which, tile // share, (base * share + tile) * lanes, tile % share * lanes


@numba.njit(nogil=True, error_model="numpy")
def put(out_ND, lse_N, n, O, lanes, top_L, total_L, unit, first, begin, end):  # type: ignore[no-untyped-def]
    """Rows begin .. end (positions) of the tile, transposed and divided by their sums, and log(total 2^(top unit)); n is the row of
    position 0."""
    for t in range(begin, end):
        r = t - first
        by = np.float32(1.0) / total_L[r] if total_L[r] > 0 else np.float32(0.0)
        for d in range(out_ND.shape[1]):
            out_ND[n + t, d] = O[d * lanes + r] * by
        log = (top_L[r] * unit + math.log2(total_L[r])) * np.float32(math.log(2)) if total_L[r] > 0 else -np.inf
        lse_N[n + t] = np.float32(log)


@loop(error_model="numpy")
def forward(
    start, stop, items, q_ND, k, ks, v, vs, out_ND, lse_N, blocks, partial, tiles_PMR, sizes, scale
):  # type: ignore[no-untyped-def]
    """Work items items[start:stop]; q and out [B * H * T, D], lse as base-e logarithms, ks and vs the strides of k and v over (B, G, S)."""
    B, H, G, T, S, block, query_block, lanes, causal, tiles = sizes
    D, N = q_ND.shape[1], blocks.shape[3]
    scale2 = np.float32(scale * math.log2(math.e))
    q, scores, O = np.zeros(D * lanes, np.float32), np.empty(block * lanes, np.float32), np.empty(D * lanes, np.float32)
    top, total = np.empty(lanes, np.float32), np.empty(lanes, np.float32)
    keep, spare = np.empty(lanes, np.float32), np.empty(lanes, np.float32)
    for item in items[start:stop]:
        which, Q, first, row = place(item, tiles, T, S, query_block, lanes)
        b, h = which // H, which % H
        mb, mh, g = min(b, blocks.shape[0] - 1), min(h, blocks.shape[1] - 1), h // (H // G)
        begin, end = max(first, S - T), min(first + lanes, S)
        if begin >= end:
            continue
        n = which * T - (S - T)
        for r in range(lanes):
            if begin <= first + r < end:
                for d in range(D):
                    q[d * lanes + r] = q_ND[n + first + r, d] * scale2
        for r in range(lanes):
            top[r], total[r] = FAR, np.float32(0.0)
        for i in range(D * lanes):
            O[i] = np.float32(0.0)
        for c in range(min(N, (end - 1) // block + 1) if causal else N):
            if not blocks[mb, mh, Q, c]:
                continue
            key = c * block
            keys = min(block, S - key)
            multiply(keys, lanes, k, b * ks[0] + g * ks[1] + key * ks[2], ks[2], ONE, q, NONE, lanes, scores, NONE, lanes, D, keep, FRESH)
            number = partial[mb, mh, Q, c] if partial.size else np.int32(-1)
            if number >= 0 or (causal and key + keys - 1 > first):
                hide(scores, keys, lanes, first, key, causal, tiles_PMR, number, row)
            online(scores, keys, lanes, top, total, keep, spare)
            multiply(D, lanes, v, b * vs[0] + g * vs[1] + key * vs[2], ONE, vs[2], scores, NONE, lanes, O, NONE, lanes, keys, keep, NONE)
        put(out_ND, lse_N, n, O, lanes, top, total, np.float32(1.0), first, begin, end)
