"""Few queries over rows that lie anywhere in memory, as vector code: decoding, where the query heads of a key head are all that shares its keys.

A dot product ends in a sum over the numbers of a vector, which costs more than the product does; here W of them are summed together, by shuffles
that halve W vectors at a time. Products with values keep their sums in registers. See tile.py for how such code is written.

Shape letters: W = numbers in a vector, D = head width, R = queries (the heads of a key head), J = rows.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .tile import _I32, _V, ROWS, VECTORS, W, _fma, _load, _loop, _number, _pointer, _splat, _spread, _store, exponentials, maximum

tops, exps = maximum(1), exponentials(1)
"""Of rows of W numbers, by lanes; see tile.py."""
_SUMS = {"contract", "reassoc", "nsz"}
WIDTH = np.int64(VECTORS * W)


def _halvings() -> list[tuple[list[int], list[int]]]:
    """Of each level, which numbers of two vectors side by side are added to which: after the last, the sums of W vectors in order."""
    lanes, side = W // 4, lambda *order: [4 * x + i for x in range(W // 4) for i in order]
    # Within four numbers of each vector first: [a0 b0 a1 b1] + [a2 b2 a3 b3], then the sums of a, b, c and d side by side.
    inner = [(side(0, W, 1, W + 1), side(2, W + 2, 3, W + 3)), (side(0, 1, W, W + 1), side(2, 3, W + 2, W + 3))]
    whole = lambda order: [4 * x + i for x in order for i in range(4)]  # noqa: E731
    if lanes == 2:
        return [*inner, (whole((0, 2)), whole((1, 3)))]
    return [*inner, (whole((0, 1, 4, 5)), whole((2, 3, 6, 7))), (whole((0, 2, 4, 6)), whole((1, 3, 5, 7)))]


@intrinsic
def _dots(typing, q, q0, k, rows, r0, count, out, o):  # type: ignore[no-untyped-def]
    """out[o + j] = sum over count >= 1 vectors of q[q0 :] k[rows[r0 + j] :], for W rows j."""
    def generate(context, builder, sig, args):  # type: ignore[no-untyped-def]
        q_, q0_, k_, rows_, r0_, count_, out_, o_ = args
        pq, pk, pr, po = (_pointer(context, builder, sig.args[i], x) for i, x in ((0, q_), (2, k_), (3, rows_), (6, out_)))
        starts = [builder.load(builder.gep(pr, [builder.add(r0_, _number(j))])) for j in range(W)]
        t, sums, finish = _loop(builder, count_, [_splat(0.0)] * W)
        far, multiply = builder.mul(t, _number(W)), _fma(builder)
        left = _load(builder, pq, builder.add(q0_, far))
        vectors = finish([multiply(left, _load(builder, pk, builder.add(at, far)), x) for at, x in zip(starts, sums, strict=True)])
        for low, high in _halvings():
            pick = [ir.Constant(ir.VectorType(_I32, W), side) for side in (low, high)]
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [builder.fadd(*(builder.shuffle_vector(a, b, side) for side in pick)) for a, b in pairs]
        _store(builder, po, o_, vectors[0])
        return context.get_dummy_value()

    whole = types.int64
    return types.void(q, whole, k, rows, whole, whole, out, whole), generate


def _mix(height: int, vectors: int) -> Any:
    """Intrinsic: C[c + x * cx + :] += sum over count >= 1 t of A[a + x * ax + t] B[b + rows[r0 + t] + :], for `height` x."""
    @intrinsic
    def run(typing, A, a, ax, B, b, rows, r0, C, c, cx, count):  # type: ignore[no-untyped-def]
        def generate(context, builder, sig, args):  # type: ignore[no-untyped-def]
            A_, a_, ax_, B_, b_, rows_, r0_, C_, c_, cx_, count_ = args
            pa, pb, pr, pc = (_pointer(context, builder, sig.args[i], x) for i, x in ((0, A_), (3, B_), (5, rows_), (7, C_)))
            place = [builder.add(builder.add(c_, builder.mul(_number(x), cx_)), _number(W * y)) for x in range(height) for y in range(vectors)]
            t, sums, finish = _loop(builder, count_, [_load(builder, pc, at) for at in place])
            from_b = builder.add(b_, builder.load(builder.gep(pr, [builder.add(r0_, t)])))
            right, multiply = [_load(builder, pb, builder.add(from_b, _number(W * y))) for y in range(vectors)], _fma(builder)
            new = []
            for x in range(height):
                left = builder.load(builder.gep(pa, [builder.add(builder.add(a_, builder.mul(_number(x), ax_)), t)]))
                new += [multiply(_spread(builder, left, _V), right[y], sums[x * vectors + y]) for y in range(vectors)]
            for at, value in zip(place, finish(new), strict=True):
                _store(builder, pc, at, value)
            return context.get_dummy_value()

        whole = types.int64
        return types.void(A, whole, whole, B, whole, rows, whole, C, whole, whole, whole), generate

    return run


_tile, _row, _thin, _thin_row = _mix(ROWS, VECTORS), _mix(1, VECTORS), _mix(ROWS, 1), _mix(1, 1)


@numba.njit(nogil=True, fastmath=_SUMS, error_model="numpy")
def _plain(q, q0, first, D, k, rows, r0, count, out, o, fresh):  # type: ignore[no-untyped-def]
    """out[o + j] = or += q . k over channels first .. D, row by row."""
    for j in range(count):
        at, total = np.uint64(rows[r0 + j]), np.float32(0.0)
        for i in range(np.uint64(first), np.uint64(D)):
            total += q[np.uint64(q0) + i] * k[at + i]
        out[o + j] = total if fresh else out[o + j] + total


@numba.njit(nogil=True, error_model="numpy")
def dots(q, q0, D, k, rows, r0, count, out, o):  # type: ignore[no-untyped-def]
    """out[o + j] = q[q0 : q0 + D] . k[rows[r0 + j] : rows[r0 + j] + D] for `count` rows j, float32."""
    vectors = D // W
    if vectors == 0 or count < W:
        _plain(q, q0, 0, D, k, rows, r0, count, out, o, True)
        return
    j = 0
    while j < count:
        at = min(j, count - W)                                             # the last few again rather than one by one
        _dots(q, q0, k, rows, r0 + at, vectors, out, o + at)
        j += W
    if D % W:
        _plain(q, q0, vectors * W, D, k, rows, r0, count, out, o, False)


@numba.njit(nogil=True, error_model="numpy")
def mix(weight, w, stride, R, v, rows, r0, count, D, out, o, out_stride):  # type: ignore[no-untyped-def]
    """out[o + r * out_stride + :] += sum over `count` j of weight[w + r * stride + j] v[rows[r0 + j] + :], for R rows r of D channels."""
    if count == 0:
        return
    i = 0
    while i + W <= D:
        wide, r = i + WIDTH <= D, 0
        while r + ROWS <= R:
            if wide:
                _tile(weight, w + r * stride, stride, v, i, rows, r0, out, o + r * out_stride + i, out_stride, count)
            else:
                _thin(weight, w + r * stride, stride, v, i, rows, r0, out, o + r * out_stride + i, out_stride, count)
            r += ROWS
        while r < R:
            if wide:
                _row(weight, w + r * stride, stride, v, i, rows, r0, out, o + r * out_stride + i, out_stride, count)
            else:
                _thin_row(weight, w + r * stride, stride, v, i, rows, r0, out, o + r * out_stride + i, out_stride, count)
            r += 1
        i += WIDTH if wide else W
    for r in range(R if i < D else 0):
        for j in range(count):
            by, at = weight[w + r * stride + j], np.uint64(rows[r0 + j])
            for c in range(i, D):
                out[o + r * out_stride + c] += by * v[at + np.uint64(c)]


@numba.njit(nogil=True, error_model="numpy")
def soften(score, s, count, least, level_W, sums_W):  # type: ignore[no-untyped-def]
    """score[s : s + count] = 2^(score - top); gives (top, their sum), top no lower than `least`. Up to W - 1 places behind are overwritten."""
    padded = (count + W - 1) // W * W
    for j in range(count, padded):
        score[s + j] = np.float32(-np.inf)
    for i in range(W):
        level_W[i], sums_W[i] = least, np.float32(0.0)
    tops(score, s, W, padded // W, level_W, 0)
    top, total = least, np.float32(0.0)
    for i in range(W):
        top = level_W[i] if level_W[i] > top else top
    for i in range(W):
        level_W[i] = top
    exps(score, s, W, padded // W, level_W, sums_W, 0)
    for i in range(W):
        total += sums_W[i]
    return top, total
