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

from .. import native
from ..block_attention.forward import FAR, ONE, powers
from ..block_attention.tile import W

CHUNK = 64
"""Keys whose logits exist at a time."""
_SUMS = {"contract", "reassoc", "nsz"}
_LOG2 = np.float32(math.log(2))
_F32, _I64, _I16 = ir.FloatType(), ir.IntType(64), ir.IntType(16)


@intrinsic
def _expand(typing, out, o, values, at, mask):  # type: ignore[no-untyped-def]
    """out[o : o + 16] = values[at], values[at + 1], ... in turn at the set bits of the uint16 mask, 0 elsewhere; reads no further."""

    def generate(context, builder, sig, args):  # type: ignore[no-untyped-def]
        vector = ir.VectorType(_F32, 16)
        to, source = (context.make_array(sig.args[i])(context, builder, args[i]).data for i in (0, 2))
        chosen = builder.bitcast(builder.trunc(args[4], _I16), ir.VectorType(ir.IntType(1), 16))
        pointer = builder.gep(source, [args[3]])
        kind = ir.FunctionType(vector, [pointer.type, chosen.type, vector])
        f = cgutils.get_or_insert_function(builder.module, kind, "llvm.masked.expandload.v16f32")
        got = builder.call(f, [pointer, chosen, ir.Constant(vector, [0.0] * 16)])
        builder.store(got, builder.bitcast(builder.gep(to, [args[1]]), vector.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(out, types.int64, values, types.int64, types.int64), generate


@numba.njit(nogil=True, error_model="numpy")
def _write_out(bits_SE, values, first, count, C, wide, tile):  # type: ignore[no-untyped-def]
    """tile[j * wide : (j + 1) * wide] = row first + j, 16 channels at a time."""
    E = bits_SE.shape[1]
    for j in range(count):
        at = (first + j) * C
        for n in range(wide // 16):
            mask = np.int64(bits_SE[first + j, 2 * n])
            if 2 * n + 1 < E:
                mask |= np.int64(bits_SE[first + j, 2 * n + 1]) << 8
            _expand(tile, j * wide + 16 * n, values, at, mask)
            mask = mask - ((mask >> 1) & 0x5555)                     # bits set, in pairs, fours, ...
            mask = (mask & 0x3333) + ((mask >> 2) & 0x3333)
            mask = (mask + (mask >> 4)) & 0x0F0F
            at += (mask + (mask >> 8)) & 31


@numba.njit(nogil=True, error_model="numpy")
def _soften(score, count, r, top, total, level, sums):  # type: ignore[no-untyped-def]
    """score = 2^(score - new top); total and top brought up to date; gives what earlier sums shrink by."""
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
    total[r], top[r] = total[r] * keep + more, most
    return keep


@numba.njit(nogil=True, fastmath=_SUMS, error_model="numpy")
def _dots(q, tile, count, wide, score):  # type: ignore[no-untyped-def]
    """score[j] = q . row j of the tile."""
    j, n = 0, np.uint64(wide)
    while j < count:
        a = np.uint64(j * wide)
        x = np.float32(0)
        for i in range(n):
            x += q[i] * tile[a + i]
        score[j] = x
        j += 1


@numba.njit(nogil=True, fastmath=_SUMS, error_model="numpy")
def _mix(weight, tile, count, wide, out, keep):  # type: ignore[no-untyped-def]
    """out = keep * out + sum of weight[j] * row j, four rows at a time; rows behind the last have weight 0."""
    n = np.uint64(wide)
    for i in range(n):
        out[i] *= keep
    for j in range(0, count, 4):
        a = np.uint64(j * wide)
        w, x, y, z = weight[j], weight[j + 1], weight[j + 2], weight[j + 3]
        for i in range(n):
            out[i] += w * tile[a + i] + x * tile[a + n + i] + y * tile[a + n + n + i] + z * tile[a + n + n + n + i]


@numba.njit(nogil=True, error_model="numpy")
def _finish(acc, U, top, total, out_U, lse_X, r):  # type: ignore[no-untyped-def]
    by = np.float32(1.0) / total if total > 0 else np.float32(0.0)
    for i in range(U):
        out_U[i] = acc[i] * by
    lse_X[r] = (top + np.float32(math.log2(total))) * _LOG2 if total > 0 else np.float32(-np.inf)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def bitmaps(start, stop, q_XRU, G, count_B, k_bits, k, v_bits, v, atoms, out_XRU, lse_XR):  # type: ignore[no-untyped-def]
    """Key heads start .. stop: a chunk of keys is written out once for all query heads of the key head, then its values."""
    R, D = q_XRU.shape[1:]
    C, Cv = k.shape[3], v.shape[3]
    wide = (D + 15) // 16 * 16
    tile, q = np.zeros(CHUNK * wide, np.float32), np.zeros((R, wide), np.float32)
    score, acc = np.zeros((R, CHUNK + W), np.float32), np.zeros((R, wide), np.float32)
    level, sums = np.empty(CHUNK + W, np.float32), np.empty(CHUNK + W, np.float32)
    top, total, keep = np.empty(R, np.float32), np.empty(R, np.float32), np.empty(R, np.float32)
    for x in range(start, stop):
        b, g = x // G, x % G
        q[:, :D], acc[:], top[:], total[:] = q_XRU[x], np.float32(0.0), FAR, np.float32(0.0)
        k_flat, v_flat = k[b, g].reshape(-1), v[b, g].reshape(-1)
        for first in range(0, count_B[b], CHUNK):
            more = min(CHUNK, count_B[b] - first)
            _write_out(k_bits[b, g], k_flat, first, more, C, wide, tile)
            for r in range(R):
                _dots(q[r], tile, more, wide, score[r])
                keep[r] = _soften(score[r], more, r, top, total, level, sums)
            _write_out(v_bits[b, g], v_flat, first, more, Cv, wide, tile)
            for r in range(R):
                _mix(score[r], tile, more, wide, acc[r], keep[r])
        for r in range(R):
            _finish(acc[r], D, top[r], total[r], out_XRU[x, r], lse_XR[x], r)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def codes(start, stop, on_XRU, G, count_B, k_index, k, v_index, v, atoms, out_XRU, lse_XR):  # type: ignore[no-untyped-def]
    """Key heads start .. stop: logits are sums of q . atom, values are summed as weights of atoms; NaN in lse: an atom number out of range."""
    R, U = out_XRU.shape[1:]
    K, Kv = k.shape[3], v.shape[3]
    score, acc = np.zeros(CHUNK + W, np.float32), np.empty(U, np.float32)
    level, sums = np.empty(CHUNK + W, np.float32), np.empty(CHUNK + W, np.float32)
    top, total = np.empty(1, np.float32), np.empty(1, np.float32)
    for x in range(start, stop):
        b, g, good = x // G, x % G, True
        for s in range(count_B[b]):
            for n in range(K):
                good &= 0 <= k_index[b, g, s, n] < atoms[0]
            for n in range(Kv):
                good &= 0 <= v_index[b, g, s, n] < atoms[1]
        for r in range(R):
            if not good:
                lse_XR[x, r] = np.float32(np.nan)
                continue
            acc[:], top[0], total[0] = np.float32(0.0), FAR, np.float32(0.0)
            for first in range(0, count_B[b], CHUNK):
                more = min(CHUNK, count_B[b] - first)
                for j in range(more):
                    sum_j = np.float32(0.0)
                    for n in range(K):
                        sum_j += k[b, g, first + j, n] * on_XRU[x, r, np.uint64(k_index[b, g, first + j, n])]
                    score[j] = sum_j
                keep = _soften(score, more, 0, top, total, level, sums)
                if keep != np.float32(1.0):
                    for i in range(U):
                        acc[i] *= keep
                for j in range(more):
                    for n in range(Kv):
                        acc[np.uint64(v_index[b, g, first + j, n])] += score[j] * v[b, g, first + j, n]
            _finish(acc, U, top[0], total[0], out_XRU[x, r], lse_XR[x], r)


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
