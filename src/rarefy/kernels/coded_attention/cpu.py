"""CPU path, compiled: stored rows are worked on a chunk at a time with an online softmax, float32.

Shape letters as in __init__.py; X = batch row and key head, R = query heads of a key head, U = width of what is summed (D, or A for codes).
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from ...compiled import loop
from .. import native
from ..block_attention.few import dots, exps, mix, soften, tops
from ..block_attention.forward import FAR
from ..block_attention.tile import WIDE, W, _load, _loop, _number, _store

FOUR = 4
"""Query heads that a code is read once for."""
CHUNK = 64
"""Keys whose logits exist at a time."""
_LOG2 = np.float32(math.log(2))
_F32, _I64, _I16 = ir.FloatType(), ir.IntType(64), ir.IntType(16)


def _expanding(whole: bool) -> Any:
    """Intrinsic: out[o : o + 16] = values[at], values[at + 1], ... in turn at the set bits of the uint16 mask, 0 elsewhere; gives how many.

    No more is read than there are bits, or with `whole`, for AVX-512 alone and several times faster, 16 values.
    """
    @intrinsic
    def run(typing, out, o, values, at, mask):  # type: ignore[no-untyped-def]
        def generate(context, builder, sig, args):  # type: ignore[no-untyped-def]
            vector = ir.VectorType(_F32, 16)
            to, source = (context.make_array(sig.args[i])(context, builder, args[i]).data for i in (0, 2))
            bits = builder.trunc(args[4], _I16)
            chosen, zeros = builder.bitcast(bits, ir.VectorType(ir.IntType(1), 16)), ir.Constant(vector, [0.0] * 16)
            given: Any = _load(builder, source, args[3], vector) if whole else builder.gep(source, [args[3]])
            order, name = ([given, zeros, chosen], "x86.avx512.mask.expand") if whole else ([given, chosen, zeros], "masked.expandload")
            f = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [x.type for x in order]), f"llvm.{name}.v16f32")
            _store(builder, to, args[1], builder.call(f, order))
            return builder.zext(builder.ctpop(bits), _I64)

        return types.uint64(out, types.uint64, values, types.uint64, types.uint64), generate

    return run


_expand, _expand_whole = _expanding(False), _expanding(WIDE)


@numba.njit(nogil=True, error_model="numpy")
def _write_out(bits, E, values, first, count, C, wide, tile):  # type: ignore[no-untyped-def]
    """tile[j * wide : (j + 1) * wide] = row first + j, 16 channels at a time; unsigned, since an index below 0 would be asked about."""
    pairs, groups, size = np.uint64(E // 2), np.uint64(wide // 16), np.uint64(len(values))
    one, two, full = np.uint64(1), np.uint64(2), np.uint64(16)
    for j in range(np.uint64(count)):
        at, to, byte = (np.uint64(first) + j) * np.uint64(C), j * np.uint64(wide), (np.uint64(first) + j) * np.uint64(E)
        for n in range(groups):
            mask = np.uint64(bits[byte + two * n])
            if n < pairs:
                mask |= np.uint64(bits[byte + two * n + one]) << np.uint64(8)
            if at + full <= size:
                at += _expand_whole(tile, to + full * n, values, at, mask)
            else:
                at += _expand(tile, to + full * n, values, at, mask)


def _by_code(scatter: bool) -> Any:
    """Intrinsic over count >= 1 weights w[w0 + n] and their numbers i[w0 + n] (a code's place in both): with table[a] FOUR numbers side by
    side, y[y0 :] = sum of w table[i]; with `scatter` instead table[i] += w y[y0 :]."""
    @intrinsic
    def run(typing, w, w0, i, count, table, y, y0):  # type: ignore[no-untyped-def]
        def generate(context, builder, sig, args):  # type: ignore[no-untyped-def]
            w_, w0_, i_, count_, table_, y_, y0_ = args
            pw, pi, pt, py = (context.make_array(sig.args[n])(context, builder, x).data for n, x in ((0, w_), (2, i_), (4, table_), (5, y_)))
            four = ir.VectorType(_F32, FOUR)
            f = cgutils.get_or_insert_function(builder.module, ir.FunctionType(four, [four] * 3), "llvm.fma.v4f32")
            there = _load(builder, py, y0_, four) if scatter else ir.Constant(four, [0.0] * FOUR)
            n, sums, finish = _loop(builder, count_, [] if scatter else [there])
            at = builder.add(w0_, n)
            number = builder.load(builder.gep(pi, [at]))
            widen = builder.sext if sig.args[2].dtype.signed else builder.zext
            place = builder.mul(widen(number, _I64) if number.type.width < 64 else number, _number(FOUR))
            one = builder.insert_element(ir.Constant(four, ir.Undefined), builder.load(builder.gep(pw, [at])), ir.Constant(ir.IntType(32), 0))
            by = builder.shuffle_vector(one, ir.Constant(four, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), FOUR), None))
            row = _load(builder, pt, place, four)
            if scatter:
                _store(builder, pt, place, builder.call(f, [by, there, row]))
                finish([])
            else:
                _store(builder, py, y0_, finish([builder.call(f, [by, row, sums[0]])])[0])
            return context.get_dummy_value()

        return types.void(w, types.int64, i, types.int64, table, y, types.int64), generate

    return run


gather_four, scatter_four = _by_code(False), _by_code(True)


@numba.njit(nogil=True, error_model="numpy")
def _soften_four(score, count, top, total, keep, level_W, sums_W):  # type: ignore[no-untyped-def]
    """An online softmax over `count` more keys of FOUR queries side by side; `keep` is what earlier sums shrink by."""
    padded = (count * FOUR + W - 1) // W * W
    for j in range(count * FOUR, padded):
        score[j] = np.float32(-np.inf)
    for i in range(W):
        level_W[i], sums_W[i] = top[i % FOUR], np.float32(0.0)
    tops(score, 0, W, padded // W, level_W, 0)
    for r in range(FOUR):
        new = level_W[r]
        for i in range(r, W, FOUR):
            new = level_W[i] if level_W[i] > new else new
        keep[r] = np.float32(math.exp2(top[r] - new))
        top[r], total[r] = new, total[r] * keep[r]
    for i in range(W):
        level_W[i] = top[i % FOUR]
    exps(score, 0, W, padded // W, level_W, sums_W, 0)
    for i in range(W):
        total[i % FOUR] += sums_W[i]


@numba.njit(nogil=True, error_model="numpy")
def _lse(top, total):  # type: ignore[no-untyped-def]
    return (top + np.float32(math.log2(total))) * _LOG2 if total > 0 else np.float32(-np.inf)


@loop(error_model="numpy")
def bitmaps(start, stop, q_XRU, G, count_B, k_bits, k, v_bits, v, atoms, out_XRU, lse_XR):  # type: ignore[no-untyped-def]
    """Key heads start .. stop: a chunk of keys is written out once for all query heads of the key head, then its values."""
    R, D = q_XRU.shape[1:]
    C, Cv = k.shape[3], v.shape[3]
    wide = (D + 15) // 16 * 16
    tile, q, acc, rows = np.zeros(CHUNK * wide, np.float32), np.zeros(R * wide, np.float32), np.zeros(R * wide, np.float32), np.empty(CHUNK, np.int64)
    score = np.zeros(R * CHUNK, np.float32)
    level, sums = np.empty(W, np.float32), np.empty(W, np.float32)
    top, total = np.empty(R, np.float32), np.empty(R, np.float32)
    for j in range(CHUNK):
        rows[j] = j * wide
    for x in range(start, stop):
        b, g = x // G, x % G
        for r in range(R):
            q[r * wide : r * wide + D] = q_XRU[x, r]
        acc[:], top[:], total[:] = np.float32(0.0), FAR, np.float32(0.0)
        k_flat, v_flat, k_map, v_map = k[b, g].reshape(-1), v[b, g].reshape(-1), k_bits[b, g].reshape(-1), v_bits[b, g].reshape(-1)
        for first in range(0, count_B[b], CHUNK):
            more = min(CHUNK, count_B[b] - first)
            _write_out(k_map, k_bits.shape[3], k_flat, first, more, C, wide, tile)
            for r in range(R):
                dots(q, r * wide, wide, tile, rows, 0, more, score, r * CHUNK)
                new, extra = soften(score, r * CHUNK, more, top[r], level, sums)
                if new > top[r]:
                    keep = np.float32(math.exp2(top[r] - new))
                    top[r], total[r] = new, total[r] * keep
                    for i in range(r * wide, (r + 1) * wide):
                        acc[i] *= keep
                total[r] += extra
            _write_out(v_map, v_bits.shape[3], v_flat, first, more, Cv, wide, tile)
            mix(score, 0, CHUNK, R, tile, rows, 0, more, wide, acc, 0, wide)
        for r in range(R):
            by = np.float32(1.0) / total[r] if total[r] > 0 else np.float32(0.0)
            for i in range(D):
                out_XRU[x, r, i] = acc[r * wide + i] * by
            lse_XR[x, r] = _lse(top[r], total[r])


@numba.njit(nogil=True, error_model="numpy")
def _within(index, count, atoms):  # type: ignore[no-untyped-def]
    """Whether the first `count` numbers are numbers of atoms."""
    low, high = index.dtype.type(0), index.dtype.type(0)
    for n in range(count):
        low, high = min(low, index[n]), max(high, index[n])
    return low >= 0 and (high < atoms or not count)


@loop(error_model="numpy")
def codes(start, stop, on_XRU, G, count_B, k_index, k, v_index, v, atoms, out_XRU, lse_XR):  # type: ignore[no-untyped-def]
    """Key heads start .. stop: logits are sums of q . atom, values are summed as weights of atoms; NaN in lse: an atom number out of range.

    FOUR query heads stand side by side, so that a code is read once for them and its weight serves all.
    """
    R, A = on_XRU.shape[1:]
    U, K, Kv = out_XRU.shape[2], k.shape[3], v.shape[3]
    on, acc, score = np.zeros(A * FOUR, np.float32), np.zeros(U * FOUR, np.float32), np.empty(CHUNK * FOUR + W, np.float32)
    level, sums = np.empty(W, np.float32), np.empty(W, np.float32)
    top, total, keep = np.empty(FOUR, np.float32), np.empty(FOUR, np.float32), np.empty(FOUR, np.float32)
    for x in range(start, stop):
        b, g = x // G, x % G
        ki, kw, vi, vw = k_index[b, g].reshape(-1), k[b, g].reshape(-1), v_index[b, g].reshape(-1), v[b, g].reshape(-1)
        if not (_within(ki, count_B[b] * K, atoms[0]) and _within(vi, count_B[b] * Kv, atoms[1])):
            lse_XR[x] = np.float32(np.nan)
            continue
        for r0 in range(0, R, FOUR):
            for r in range(min(FOUR, R - r0)):
                for a in range(A):
                    on[a * FOUR + r] = on_XRU[x, r0 + r, a]
            acc[:], top[:], total[:] = np.float32(0.0), FAR, np.float32(0.0)
            for first in range(0, count_B[b], CHUNK):
                more = min(CHUNK, count_B[b] - first)
                for j in range(more):
                    gather_four(kw, (first + j) * K, ki, K, on, score, j * FOUR)
                _soften_four(score, more, top, total, keep, level, sums)
                for r in range(FOUR):
                    if keep[r] != np.float32(1.0):
                        for a in range(U):
                            acc[a * FOUR + r] *= keep[r]
                for j in range(more):
                    scatter_four(vw, (first + j) * Kv, vi, Kv, acc, score, j * FOUR)
            for r in range(min(FOUR, R - r0)):
                by = np.float32(1.0) / total[r] if total[r] > 0 else np.float32(0.0)
                for a in range(U):
                    out_XRU[x, r0 + r, a] = acc[a * FOUR + r] * by
                lse_XR[x, r0 + r] = _lse(top[r], total[r])


@loop(error_model="numpy")
def prune(start, stop, x_ND, bits_NE, values_NC):  # type: ignore[no-untyped-def]
    """Rows start .. stop: the C largest magnitudes, of equals the first, in order of channel; bits come in as zeros."""
    D, C = x_ND.shape[1], values_NC.shape[1]
    size = np.empty(D, np.float32)
    for n in range(start, stop):
        for i in range(D):
            size[i] = abs(x_ND[n, i])
        least = np.sort(size)[D - C]
        level = C
        for i in range(D):
            level -= size[i] > least
        c = 0
        for i in range(D):
            if size[i] > least or (size[i] == least and level > 0):
                level -= size[i] == least
                bits_NE[n, i // 8] |= np.uint8(1 << (i % 8))
                values_NC[n, c] = x_ND[n, i]
                c += 1


def whole(x_BGSC: Tensor) -> np.ndarray:
    """Its memory, with the spare room behind the S rows of each head if there is any: what a cache holds must not be copied at each step."""
    B, G, _, C = x_BGSC.shape
    head, room = x_BGSC.stride(1), x_BGSC.stride(1) // max(1, C)
    spare = x_BGSC.stride() == (G * head, head, C, 1) and head == room * C
    if spare and x_BGSC.storage_offset() + B * G * head <= x_BGSC.untyped_storage().nbytes() // x_BGSC.element_size():
        return x_BGSC.detach().as_strided((B, G, room, C), x_BGSC.stride()).numpy()
    return native.array(x_BGSC)


def run(
    kernel: Callable[..., object], q_BH1U: Tensor, count_B: Tensor, scale: float, *stored: Tensor, width: int = 0, atoms: tuple[int, int] = (0, 0)
) -> tuple[Tensor, Tensor]:
    """(out [B, H, 1, width or U], lse [B, H, 1]) of a kernel over all key heads."""
    B, H = q_BH1U.shape[:2]
    G, held = stored[0].shape[1], [whole(x) for x in stored]
    q: Any = q_BH1U.detach().float().mul(scale * math.log2(math.e)).reshape(B * G, H // G, -1).contiguous().numpy()
    out = torch.empty(B * G, H // G, width or q.shape[2])
    lse = torch.empty(B * G, H // G)
    native.spread(kernel, B * G, q, G, count_B.long().contiguous().numpy(), *held, atoms, out.numpy(), lse.numpy(), least=1)
    return out.view(B, H, 1, -1), lse.view(B, H, 1)
