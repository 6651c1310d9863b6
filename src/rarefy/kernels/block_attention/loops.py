"""CPU decoding, compiled: a query reads its keys where they lie, some at a time, with an online softmax; sums in float32.

bfloat16 lies in arrays of uint16. Flat memory and strides as in forward.py; D = head width, N = pages, C = keys at a time.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import overload

from ...compiled import loop
from .forward import FAR, ONE, powers
from .tile import W, prefetch

CHUNK = 64
"""Keys at a time: their logits stay in the nearest cache, and the softmax is rescaled rarely."""
AHEAD = 64
"""Keys asked for before they are needed: pages lie apart, and nothing else would foresee the next."""
_SUMS = {"contract", "reassoc", "nsz"}
_LOG2E, _LOG2 = np.float32(math.log2(math.e)), np.float32(math.log(2))


def wide(x: Any) -> Any:
    """float32 of a number, bits of bfloat16 included; inside compiled loops only."""
    raise NotImplementedError


@overload(wide)
def _wide(x):  # type: ignore[no-untyped-def]
    if x is types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: np.float32(x)


@numba.njit(nogil=True, fastmath=_SUMS, error_model="numpy")
def _dots(q, q0, D, k, rows, count, score):  # type: ignore[no-untyped-def]
    """score[j] += q . k[rows[j]], four keys at a time; unsigned, since an index that may be negative does not vectorise."""
    p, j = np.uint64(q0), 0
    while j + 4 <= count:
        a, b, c, d = np.uint64(rows[j]), np.uint64(rows[j + 1]), np.uint64(rows[j + 2]), np.uint64(rows[j + 3])
        w, x, y, z = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for i in range(np.uint64(D)):
            w += q[p + i] * wide(k[a + i])
            x += q[p + i] * wide(k[b + i])
            y += q[p + i] * wide(k[c + i])
            z += q[p + i] * wide(k[d + i])
        score[j] += w
        score[j + 1] += x
        score[j + 2] += y
        score[j + 3] += z
        j += 4
    while j < count:
        a, w = np.uint64(rows[j]), np.float32(0)
        for i in range(np.uint64(D)):
            w += q[p + i] * wide(k[a + i])
        score[j] += w
        j += 1


@numba.njit(nogil=True, fastmath=_SUMS, error_model="numpy")
def _mix(weight, rows, count, v, D, out, o0, keep):  # type: ignore[no-untyped-def]
    """out = keep * out + sum over j of weight[j] * v[rows[j]], four values at a time."""
    o, j = np.uint64(o0), 0
    for i in range(np.uint64(D)):
        out[o + i] *= keep
    while j + 4 <= count:
        a, b, c, d = np.uint64(rows[j]), np.uint64(rows[j + 1]), np.uint64(rows[j + 2]), np.uint64(rows[j + 3])
        w, x, y, z = weight[j], weight[j + 1], weight[j + 2], weight[j + 3]
        for i in range(np.uint64(D)):
            out[o + i] += w * wide(v[a + i]) + x * wide(v[b + i]) + y * wide(v[c + i]) + z * wide(v[d + i])
        j += 4
    while j < count:
        a, w = np.uint64(rows[j]), weight[j]
        for i in range(np.uint64(D)):
            out[o + i] += w * wide(v[a + i])
        j += 1


@numba.njit(nogil=True, error_model="numpy")
def _step(q, q0, D, k, at_k, v, at_v, count, score, level, sums, out, o0, top, total, r):  # type: ignore[no-untyped-def]
    """`count` more keys for one query whose running maximum and sum are top[r] and total[r]; `score` comes in as biases."""
    _dots(q, q0, D, k, at_k, count, score)
    most = top[r]
    for j in range(count):
        most = score[j] if score[j] > most else most
    padded = (count + W - 1) // W * W
    for j in range(count, padded):
        score[j] = np.float32(-np.inf)
    for j in range(padded):
        level[j], sums[j] = most, np.float32(0.0)
    powers(score, ONE, padded, level, sums)
    keep, more = np.float32(math.exp2(top[r] - most)), np.float32(0.0)
    for j in range(count):
        more += score[j]
    total[r] = total[r] * keep + more
    top[r] = most
    _mix(score, at_v, count, v, D, out, o0, keep)


@numba.njit(nogil=True, error_model="numpy")
def _end(out, o0, D, top, total, lse, r):  # type: ignore[no-untyped-def]
    by = np.float32(1.0) / total[r] if total[r] > 0 else np.float32(0.0)
    for i in range(D):
        out[o0 + i] *= by
    lse[r] = (top[r] + np.float32(math.log2(total[r]))) * _LOG2 if total[r] > 0 else np.float32(-np.inf)


@numba.njit(nogil=True, error_model="numpy")
def _ahead(x, base, stride, first, end, D):  # type: ignore[no-untyped-def]
    """Ask for rows first .. end."""
    line = 64 // x.itemsize
    for s in range(first, end):
        for i in range(0, D, line):
            prefetch(x, base + s * stride + i)


@numba.njit(nogil=True, error_model="numpy")
def _wanted(chosen_HN, h, share, order):  # type: ignore[no-untyped-def]
    """order[:count] = the pages that any of the heads h .. h + share chose; count."""
    count = 0
    for n in range(chosen_HN.shape[1]):
        some = False
        for e in range(share):
            some |= chosen_HN[h + e, n]
        order[count] = n
        count += some
    return count


@loop(error_model="numpy")
def pages(start, stop, q, k, ks, v, vs, chosen_BHN, block, sizes, out, top, total, lse):  # type: ignore[no-untyped-def]
    """Key heads start .. stop of B * G, a page at a time for all query heads that chose it, so that it is read from memory once.

    q is in base-2 logits, flat [B, H, D] like out; top, total and lse are flat [B, H]. Each query head collects CHUNK keys before it works.
    """
    H, G, S, D = sizes
    share = H // G
    score, level, sums = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    at_k, at_v, held = np.empty((share, CHUNK), np.int64), np.empty((share, CHUNK), np.int64), np.zeros(share, np.int64)
    order, lead = np.empty(chosen_BHN.shape[2] + 1, np.int64), max(1, AHEAD // block)
    for item in range(start, stop):
        b, h0 = item // G, item % G * share
        k0, v0 = b * ks[0] + item % G * ks[1], b * vs[0] + item % G * vs[1]
        for r in range(b * H + h0, b * H + h0 + share):
            top[r], total[r] = FAR, np.float32(0.0)
            for i in range(D):
                out[r * D + i] = np.float32(0.0)
        count = _wanted(chosen_BHN[b], h0, share, order)
        for place in range(count + 1):                                    # one more, for what is still held
            n = order[place + lead] if place + lead < count else np.int64(-1)
            if n >= 0 and n != order[place + lead - 1] + 1:               # runs of pages are foreseen by the processor itself
                _ahead(k, k0, ks[2], n * block, min(S, (n + 1) * block), D)
                _ahead(v, v0, vs[2], n * block, min(S, (n + 1) * block), D)
            for e in range(share):
                r = b * H + h0 + e
                first, end = (order[place] * block, min(S, (order[place] + 1) * block)) if place < count else (0, 0)
                if place < count and not chosen_BHN[b, h0 + e, order[place]]:
                    continue
                while first < end or (place == count and held[e]):
                    more = min(CHUNK - held[e], end - first)
                    for j in range(more):
                        at_k[e, held[e] + j], at_v[e, held[e] + j] = k0 + (first + j) * ks[2], v0 + (first + j) * vs[2]
                    first += more
                    held[e] += more
                    if held[e] == CHUNK or place == count:
                        for j in range(held[e]):
                            score[j] = np.float32(0.0)
                        _step(q, r * D, D, k, at_k[e], v, at_v[e], held[e], score, level, sums, out, r * D, top, total, r)
                        held[e] = 0
        for r in range(b * H + h0, b * H + h0 + share):
            _end(out, r * D, D, top, total, lse, r)


@loop(error_model="numpy")
def tokens(start, stop, q, k, ks, v, vs, index_BHTK, bias_BHTK, sizes, out, top, total, lse):  # type: ignore[no-untyped-def]
    """Queries start .. stop of B * H * T, each over its list; the index's and the bias's B, H and T may be 1; no bias: K is 0."""
    H, G, T, D = sizes
    K, biased = index_BHTK.shape[3], bias_BHTK.shape[3] > 0
    score, level, sums = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    at_k, at_v = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.int64)
    for r in range(start, stop):
        b, h, t = r // (H * T), r // T % H, r % T
        g = h // (H // G)
        listed = index_BHTK[min(b, index_BHTK.shape[0] - 1), min(h, index_BHTK.shape[1] - 1), min(t, index_BHTK.shape[2] - 1)]
        more = bias_BHTK[min(b, bias_BHTK.shape[0] - 1), min(h, bias_BHTK.shape[1] - 1), min(t, bias_BHTK.shape[2] - 1)]
        top[r], total[r] = FAR, np.float32(0.0)
        for i in range(D):
            out[r * D + i] = np.float32(0.0)
        count = 0
        for place in range(K):
            s = listed[place]
            if s >= 0:
                score[count] = more[place] * _LOG2E if biased else np.float32(0.0)
                at_k[count], at_v[count] = b * ks[0] + g * ks[1] + s * ks[2], b * vs[0] + g * vs[1] + s * vs[2]
                count += 1
            if count == CHUNK or (place == K - 1 and count):
                _step(q, r * D, D, k, at_k, v, at_v, count, score, level, sums, out, r * D, top, total, r)
                count = 0
        _end(out, r * D, D, top, total, lse, r)


@loop(error_model="numpy")
def rows(start, stop, q, k, ks, v, vs, keep_BHTN, block, causal, sizes, out, top, total, lse):  # type: ignore[no-untyped-def]
    """Queries start .. stop of B * H * T, each over the keys of the blocks that its row of the mask keeps; the mask's B and H may be 1."""
    H, G, S, T, D = sizes
    score, level, sums = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    at_k, at_v = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.int64)
    for r in range(start, stop):
        b, h, t = r // (H * T), r // T % H, r % T
        g = h // (H // G)
        keep = keep_BHTN[min(b, keep_BHTN.shape[0] - 1), min(h, keep_BHTN.shape[1] - 1), t]
        top[r], total[r] = FAR, np.float32(0.0)
        for i in range(D):
            out[r * D + i] = np.float32(0.0)
        count, end = 0, S - T + t + 1 if causal else S
        for n in range((end + block - 1) // block):
            if not keep[n]:
                continue
            for s in range(n * block, min((n + 1) * block, end)):
                score[count] = np.float32(0.0)
                at_k[count], at_v[count] = b * ks[0] + g * ks[1] + s * ks[2], b * vs[0] + g * vs[1] + s * vs[2]
                count += 1
                if count == CHUNK:
                    _step(q, r * D, D, k, at_k, v, at_v, count, score, level, sums, out, r * D, top, total, r)
                    count = 0
        if count:
            _step(q, r * D, D, k, at_k, v, at_v, count, score, level, sums, out, r * D, top, total, r)
        _end(out, r * D, D, top, total, lse, r)


@loop(fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")
def bounds(start, stop, q_XED, meta_XNE, out_XEN):  # type: ignore[no-untyped-def]
    """Key heads start .. stop: out[x, e, n] = sum over d of max(q, 0) * highest + min(q, 0) * lowest; meta holds highest, then lowest."""
    share, D = q_XED.shape[1:]
    both = np.empty((share, 2 * D), np.float32)
    for x in range(start, stop):
        for e in range(share):
            for d in range(D):
                both[e, d], both[e, D + d] = max(q_XED[x, e, d], np.float32(0)), min(q_XED[x, e, d], np.float32(0))
        for n in range(meta_XNE.shape[1]):
            for e in range(share):
                total = np.float32(0)
                for d in range(2 * D):
                    total += both[e, d] * wide(meta_XNE[x, n, d])
                out_XEN[x, e, n] = total


@loop(error_model="numpy")
def mark(start, stop, score_XN, least_X, keep, out_XN):  # type: ignore[no-untyped-def]
    """out[x, n] = score is among the `keep` highest of its row, whose lowest is least[x]; of equals the first."""
    for x in range(start, stop):
        least, count = least_X[x], 0
        for n in range(score_XN.shape[1]):
            out_XN[x, n] = score_XN[x, n] > least
            count += out_XN[x, n]
        n = 0
        while count < keep and n < score_XN.shape[1]:                     # a NaN must not lead out of the row
            if score_XN[x, n] == least:
                out_XN[x, n] = True
                count += 1
            n += 1


@numba.njit(nogil=True, error_model="numpy")
def _sortable(i):  # type: ignore[no-untyped-def]
    """A whole number in the order of the float32 whose bits are i; both zeros are 0."""
    return np.int32(0) if i == np.int32(-0x80000000) else np.int32(i ^ ((i >> 31) & np.int32(0x7FFFFFFF)))


@loop(error_model="numpy")
def highest(start, stop, bits_XN, keep_X, out_XN):  # type: ignore[no-untyped-def]
    """out[x, n] = the float32 of bits[x, n] is among the keep[x] highest of its row, of equals the first: the bound by its digits, of
    11, 11 and 10 bits, the later ones only over what shares the earlier."""
    N = bits_XN.shape[1]
    key, left, count = np.empty(N, np.int32), np.empty(N, np.int32), np.empty(2048, np.int64)
    for x in range(start, stop):
        for n in range(N):
            key[n] = _sortable(bits_XN[x, n])
            left[n] = key[n]
        many, rest, bound = N, keep_X[x], np.int64(0)
        if rest >= N or rest <= 0:
            out_XN[x] = rest > 0
            continue
        for digit in range(3):
            shift, mask = (21, 2047) if digit == 0 else ((10, 2047) if digit == 1 else (0, 1023))
            more = 1024 if digit == 0 else 0
            count[:] = 0
            for n in range(many):
                count[((left[n] >> shift) + more) & mask] += 1
            at = mask
            while rest > count[at]:
                rest -= count[at]
                at -= 1
            bound += np.int64(at - more) << shift
            same = 0
            for n in range(many):
                left[same] = left[n]
                same += ((left[n] >> shift) + more) & mask == at
            many = same
        least = np.int32(bound)
        for n in range(N):
            out_XN[x, n] = key[n] > least
        n = 0
        while rest > 0:
            if key[n] == least:
                out_XN[x, n] = True
                rest -= 1
            n += 1
