"""Triton path: forward, backward and decoding over lists of chosen blocks, a program a tile; sums in float32.

Shape letters as in __init__.py; R = queries in a block, M = keys in a block, C = D rounded up to a power of two, P = distinct tiles,
K = places in a list of blocks, Z = parts that a decoding query's pages are split into.
"""

# pyright: basic, reportMissingImports=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportIndexIssue=false
from __future__ import annotations

import math
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .mask import BlockMask
from .softmax import merge

SPLIT = 32
"""Pages that one program of a decoding query reads at most."""


@triton.jit
def _rows(x, at, there, width, UP: tl.constexpr, C: tl.constexpr):
    """[len(at), C]: rows that begin at x + at, zeros where `there` is false."""
    c = tl.arange(0, C)
    got = tl.load(x + at[:, None] + c[None, :], there[:, None] & (c[None, :] < width), 0.0)
    return got.to(tl.float32) if UP else got


@triton.jit
def _logits(q_RC, k_MC, at_R, key_M, there_R, S, scale2, partial, tiles, place, CAUSAL: tl.constexpr, PARTIAL: tl.constexpr,
            R: tl.constexpr, M: tl.constexpr):
    """[R, M] base-2 logits, minus infinity at pairs that are left out."""
    s_RM = tl.dot(q_RC, tl.trans(k_MC), input_precision="ieee") * scale2
    keep = there_R[:, None] & (key_M[None, :] < S)
    if CAUSAL:
        keep = keep & (key_M[None, :] <= at_R[:, None])
    if PARTIAL:
        number = tl.load(partial + place).to(tl.int64)
        inside = tl.load(tiles + tl.maximum(number, 0) * R * M + tl.arange(0, R)[:, None] * M + tl.arange(0, M)[None, :])
        keep = keep & ((number < 0) | (inside != 0))
    return tl.where(keep, s_RM, float("-inf"))


@triton.jit
def _forward(q, k, v, out, lse, index, count, partial, tiles, kb, kg, ks, vb, vg, vs, mb, mh, H, G, T, S, Q, N, width, scale2,
             CAUSAL: tl.constexpr, PARTIAL: tl.constexpr, UP: tl.constexpr, R: tl.constexpr, M: tl.constexpr, C: tl.constexpr):
    tile, which = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = which // H, which % H
    g = h // (H // G)
    at_R = ((S - T) // R + tile) * R + tl.arange(0, R)
    t_R = at_R - (S - T)
    there_R = (t_R >= 0) & (t_R < T)
    row_R = which * T + t_R
    q_RC = _rows(q, row_R * width, there_R, width, UP, C)
    line = (b * mb + h * mh) * Q + tile
    top_R, total_R = tl.full([R], -1e30, tl.float32), tl.zeros([R], tl.float32)
    o_RC = tl.zeros([R, C], tl.float32)
    for j in range(tl.load(count + line)):
        n = tl.load(index + line * N + j).to(tl.int64)
        key_M = n * M + tl.arange(0, M)
        k_MC = _rows(k, b * kb + g * kg + key_M * ks, key_M < S, width, UP, C)
        v_MC = _rows(v, b * vb + g * vg + key_M * vs, key_M < S, width, UP, C)
        s_RM = _logits(q_RC, k_MC, at_R, key_M, there_R, S, scale2, partial, tiles, line * N + n, CAUSAL, PARTIAL, R, M)
        new_R = tl.maximum(top_R, tl.max(s_RM, 1))
        p_RM, keep_R = tl.exp2(s_RM - new_R[:, None]), tl.exp2(top_R - new_R)
        total_R = total_R * keep_R + tl.sum(p_RM, 1)
        o_RC = o_RC * keep_R[:, None] + tl.dot(p_RM.to(v_MC.dtype), v_MC, input_precision="ieee")
        top_R = new_R
    some_R = total_R > 0
    o_RC = o_RC / tl.where(some_R, total_R, 1.0)[:, None]
    c = tl.arange(0, C)
    tl.store(out + row_R[:, None] * width + c[None, :], o_RC.to(out.dtype.element_ty), there_R[:, None] & (c[None, :] < width))
    tl.store(lse + row_R, tl.where(some_R, (top_R + tl.log2(tl.where(some_R, total_R, 1.0))) * 0.6931471805599453, float("-inf")), there_R)


@triton.jit
def _again(q_RC, k_MC, v_MC, g_RC, at_R, key_M, there_R, lse_R, delta_R, S, scale2, partial, tiles, place, CAUSAL: tl.constexpr,
           PARTIAL: tl.constexpr, R: tl.constexpr, M: tl.constexpr):
    """(weights, gradient of logits) [R, M] of a tile."""
    s_RM = _logits(q_RC, k_MC, at_R, key_M, there_R, S, scale2, partial, tiles, place, CAUSAL, PARTIAL, R, M)
    known_R = lse_R > float("-inf")
    p_RM = tl.where(known_R[:, None], tl.exp2(s_RM - tl.where(known_R, lse_R, 0.0)[:, None] * 1.4426950408889634), 0.0)
    return p_RM, p_RM * (tl.dot(g_RC, tl.trans(v_MC), input_precision="ieee") - delta_R[:, None])


@triton.jit
def _queries(q, k, v, grad, lse, delta, dq, index, count, partial, tiles, kb, kg, ks, vb, vg, vs, mb, mh, H, G, T, S, Q, N, width, scale, scale2,
             CAUSAL: tl.constexpr, PARTIAL: tl.constexpr, UP: tl.constexpr, R: tl.constexpr, M: tl.constexpr, C: tl.constexpr):
    tile, which = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = which // H, which % H
    g = h // (H // G)
    at_R = ((S - T) // R + tile) * R + tl.arange(0, R)
    t_R = at_R - (S - T)
    there_R = (t_R >= 0) & (t_R < T)
    row_R = which * T + t_R
    q_RC, g_RC = _rows(q, row_R * width, there_R, width, UP, C), _rows(grad, row_R * width, there_R, width, UP, C)
    lse_R, delta_R = tl.load(lse + row_R, there_R, float("-inf")), tl.load(delta + row_R, there_R, 0.0)
    line = (b * mb + h * mh) * Q + tile
    dq_RC = tl.zeros([R, C], tl.float32)
    for j in range(tl.load(count + line)):
        n = tl.load(index + line * N + j).to(tl.int64)
        key_M = n * M + tl.arange(0, M)
        k_MC = _rows(k, b * kb + g * kg + key_M * ks, key_M < S, width, UP, C)
        v_MC = _rows(v, b * vb + g * vg + key_M * vs, key_M < S, width, UP, C)
        _, ds_RM = _again(q_RC, k_MC, v_MC, g_RC, at_R, key_M, there_R, lse_R, delta_R, S, scale2, partial, tiles, line * N + n,
                          CAUSAL, PARTIAL, R, M)
        dq_RC += tl.dot(ds_RM.to(k_MC.dtype), k_MC, input_precision="ieee")
    c = tl.arange(0, C)
    tl.store(dq + row_R[:, None] * width + c[None, :], (dq_RC * scale).to(dq.dtype.element_ty), there_R[:, None] & (c[None, :] < width))


@triton.jit
def _keys(q, k, v, grad, lse, delta, dk, dv, index, count, partial, tiles, kb, kg, ks, vb, vg, vs, mb, mh, H, G, T, S, Q, N, width, scale, scale2,
          CAUSAL: tl.constexpr, PARTIAL: tl.constexpr, UP: tl.constexpr, R: tl.constexpr, M: tl.constexpr, C: tl.constexpr):
    """One key block of one key head: index [b, h, N, Q] lists the query blocks that chose it."""
    n, which = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, g = which // G, which % G
    key_M = n * M + tl.arange(0, M)
    k_MC = _rows(k, b * kb + g * kg + key_M * ks, key_M < S, width, UP, C)
    v_MC = _rows(v, b * vb + g * vg + key_M * vs, key_M < S, width, UP, C)
    dk_MC, dv_MC = tl.zeros([M, C], tl.float32), tl.zeros([M, C], tl.float32)
    for e in range(H // G):
        h = g * (H // G) + e
        line = b * mb + h * mh
        for j in range(tl.load(count + line * N + n)):
            tile = tl.load(index + (line * N + n) * Q + j)
            at_R = ((S - T) // R + tile) * R + tl.arange(0, R)
            t_R = at_R - (S - T)
            there_R = (t_R >= 0) & (t_R < T)
            row_R = (b * H + h) * T + t_R
            q_RC, g_RC = _rows(q, row_R * width, there_R, width, UP, C), _rows(grad, row_R * width, there_R, width, UP, C)
            lse_R, delta_R = tl.load(lse + row_R, there_R, float("-inf")), tl.load(delta + row_R, there_R, 0.0)
            p_RM, ds_RM = _again(q_RC, k_MC, v_MC, g_RC, at_R, key_M, there_R, lse_R, delta_R, S, scale2, partial, tiles,
                                 (line * Q + tile) * N + n, CAUSAL, PARTIAL, R, M)
            dv_MC += tl.dot(tl.trans(p_RM.to(g_RC.dtype)), g_RC, input_precision="ieee")
            dk_MC += tl.dot(tl.trans(ds_RM.to(q_RC.dtype)), q_RC, input_precision="ieee")
    c = tl.arange(0, C)
    to, here = (which * S + key_M)[:, None] * width + c[None, :], (key_M[:, None] < S) & (c[None, :] < width)
    tl.store(dk + to, (dk_MC * scale).to(dk.dtype.element_ty), here)
    tl.store(dv + to, dv_MC.to(dv.dtype.element_ty), here)


@triton.jit
def _pages(q, k, v, out, lse, index, count, kb, kg, ks, vb, vg, vs, mb, mh, H, G, S, N, block, width, scale2,
           PART: tl.constexpr, M: tl.constexpr, C: tl.constexpr):
    """One part of one decoding query's pages; out [Z, B, H, D], lse [Z, B, H]."""
    which, z = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = which // H, which % H
    g = h // (H // G)
    line, c, m = b * mb + h * mh, tl.arange(0, C), tl.arange(0, M)
    q_C = tl.load(q + which * width + c, c < width, 0.0).to(tl.float32) * scale2
    top, total, o_C = tl.full([], -1e30, tl.float32), tl.zeros([], tl.float32), tl.zeros([C], tl.float32)
    for j in range(z * PART, tl.minimum((z + 1) * PART, tl.load(count + line))):
        key_M = tl.load(index + line * N + j).to(tl.int64) * block + m
        there_M = (m < block) & (key_M < S)
        k_MC = _rows(k, b * kb + g * kg + key_M * ks, there_M, width, True, C)
        v_MC = _rows(v, b * vb + g * vg + key_M * vs, there_M, width, True, C)
        s_M = tl.where(there_M, tl.sum(k_MC * q_C[None, :], 1), float("-inf"))
        new = tl.maximum(top, tl.max(s_M, 0))
        p_M, keep = tl.exp2(s_M - new), tl.exp2(top - new)
        total = total * keep + tl.sum(p_M, 0)
        o_C = o_C * keep + tl.sum(p_M[:, None] * v_MC, 0)
        top = new
    safe = tl.where(total > 0, total, 1.0)
    row = z * tl.num_programs(0) + which
    tl.store(out + row * width + c, o_C / safe, c < width)
    tl.store(lse + row, tl.where(total > 0, (top + tl.log2(safe)) * 0.6931471805599453, float("-inf")))


def _lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(places of the chosen, in order, then the others; how many are chosen), int32."""
    return (~blocks).to(torch.uint8).argsort(dim=-1, stable=True).to(torch.int32).contiguous(), blocks.sum(-1, dtype=torch.int32).contiguous()


def _common(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, causal: bool) -> tuple[BlockMask, tuple[Any, ...], tuple[int, ...], dict[str, Any]]:
    """(mask with shared dimensions as 1, partial and tiles and strides, sizes, constants) of a launch."""
    shared = [x for x in (mask.blocks, mask.partial) if x is not None]
    cut = tuple(slice(0, 1) if all(x.stride(i) == 0 for x in shared) else slice(None) for i in (0, 1))
    blocks, partial = mask.blocks[cut], None if mask.partial is None else mask.partial[cut].contiguous()
    mask = BlockMask(blocks, partial, mask.tiles, mask.block, mask.query_block)
    b, h, Q, N = blocks.shape
    given = (partial, mask.tiles.to(torch.uint8).contiguous()) if partial is not None and mask.tiles is not None else (blocks, blocks)
    strides = (*k.stride()[:3], *v.stride()[:3], h if b > 1 else 0, 1 if h > 1 else 0)
    sizes = (q.shape[1], k.shape[1], q.shape[2], k.shape[2], Q, N, q.shape[3])
    wide = {"CAUSAL": causal, "PARTIAL": partial is not None, "UP": os.environ.get("TRITON_INTERPRET") == "1",      # its half-precision products err
            "R": mask.query_block, "M": mask.block, "C": max(16, triton.next_power_of_2(q.shape[3]))}
    return mask, (*given, *strides), sizes, wide


def _plain(x: Tensor) -> Tensor:
    return x.detach() if x.stride(-1) == 1 else x.detach().contiguous()


def forward(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask: BlockMask, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """(out [B, H, T, D], lse [B, H, T] float32); blocks of 16, 32, 64 or 128."""
    q, k, v = q_BHTD.detach().contiguous(), _plain(k_BGSD), _plain(v_BGSD)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    mask, given, sizes, constants = _common(q, k, v, mask, causal)
    index, count = _lists(mask.blocks)
    _forward[(sizes[4], q.shape[0] * q.shape[1])](q, k, v, out, lse, index, count, *given, *sizes, scale * math.log2(math.e), **constants)
    return out, lse


def backward(
    grad_BHTD: Tensor, grad_lse_BHT: Tensor, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, out_BHTD: Tensor, lse_BHT: Tensor,
    mask: BlockMask, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    q, k, v, grad = q_BHTD.detach().contiguous(), _plain(k_BGSD), _plain(v_BGSD), grad_BHTD.contiguous()
    delta = ((grad.float() * out_BHTD.float()).sum(-1) - grad_lse_BHT).contiguous()
    dq, dk, dv = torch.empty_like(q), k.new_empty(k.shape), v.new_empty(v.shape)
    mask, given, sizes, constants = _common(q, k, v, mask, causal)
    last = (*given, *sizes, scale, scale * math.log2(math.e))
    _queries[(sizes[4], q.shape[0] * q.shape[1])](q, k, v, grad, lse_BHT, delta, dq, *_lists(mask.blocks), *last, **constants)
    _keys[(sizes[5], k.shape[0] * k.shape[1])](q, k, v, grad, lse_BHT, delta, dk, dv, *_lists(mask.blocks.mT), *last, **constants)
    return dq, dk, dv


def decode_pages(q_BH1D: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_BHN: Tensor, block: int, scale: float) -> tuple[Tensor, Tensor]:
    """([B, H, 1, D], lse [B, H, 1] float32): pages in parts, whose states are merged exactly."""
    q, k, v = q_BH1D.detach().contiguous(), _plain(k_BGSD), _plain(v_BGSD)
    B, H, _, D = q.shape
    G, S, N = k.shape[1], k.shape[2], mask_BHN.shape[2]
    index, count = _lists(mask_BHN)
    parts = max(1, -(-int(count.max()) // SPLIT))
    out, lse = q.new_empty((parts, B, H, 1, D), dtype=torch.float32), q.new_empty((parts, B, H, 1), dtype=torch.float32)
    _pages[(B * H, parts)](q, k, v, out, lse, index, count, *k.stride()[:3], *v.stride()[:3], H, 1, H, G, S, N, block, D, scale * math.log2(math.e),
                           PART=SPLIT, M=triton.next_power_of_2(block), C=triton.next_power_of_2(D))
    whole, log = merge(list(out), list(lse))
    return whole.to(q_BH1D.dtype), log
