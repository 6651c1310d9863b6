"""Triton path: the k-th largest key of a row found bit by bit, then one pass that writes who reaches it.

A key is a float's bits put in an order that whole numbers have; its highest bit is settled first. A round counts how many keys reach
the candidate, so that a row costs as many counts as a float has bits, whatever k is, and nothing is sorted.

Shape letters: N = rows, F = units, K = kept, C = units at a time.
"""

# pyright: basic, reportMissingImports=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_AT_ONCE = 8192
"""Units held in registers; longer rows are read again in every round."""


@triton.jit
def _key(score, HALF: tl.constexpr):
    """Unsigned, in the order of the scores; -0.0 as 0.0, NaN above all."""
    if HALF:
        score = score.to(tl.float32)
    if score.dtype == tl.float64:
        bits = (score + 0.0).to(tl.int64, bitcast=True)
        ordered = tl.where(bits < 0, ~bits, bits | (-9223372036854775807 - 1)).to(tl.uint64, bitcast=True)
        key = tl.where(score != score, tl.full(score.shape, 0xFFFFFFFFFFFFFFFF, tl.uint64), ordered)
    else:
        bits = (score + 0.0).to(tl.int32, bitcast=True)
        ordered = tl.where(bits < 0, ~bits, bits | (-2147483647 - 1)).to(tl.uint32, bitcast=True)
        key = tl.where(score != score, tl.full(score.shape, 0xFFFFFFFF, tl.uint32), ordered)
    return key


@triton.jit
def _keys_at(scores_NF, n, begin, units, HALF: tl.constexpr, C: tl.constexpr):
    """Keys of units begin .. begin + C; beyond the row 0, which only -NaN's bits would reach and NaN has the highest."""
    at_C = begin + tl.arange(0, C)
    key_C = _key(tl.load(scores_NF + n * units + at_C, at_C < units, 0), HALF)
    return tl.where(at_C < units, key_C, tl.zeros_like(key_C))


@triton.jit
def _rows(scores_NF, out_NK, units, k, BITS: tl.constexpr, HALF: tl.constexpr, ONE: tl.constexpr, C: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    first_C = _keys_at(scores_NF, n, 0, units, HALF, C)
    least = tl.zeros([], first_C.dtype)
    bit = tl.full([], 1, first_C.dtype) << (BITS - 1)
    for _ in range(BITS):
        trial = least | bit
        count = tl.sum((first_C >= trial).to(tl.int32))
        if not ONE:
            for begin in range(C, units, C):
                count += tl.sum((_keys_at(scores_NF, n, begin, units, HALF, C) >= trial).to(tl.int32))
        least = tl.where(count >= k, trial, least)
        bit = bit >> 1
    above = tl.sum((first_C > least).to(tl.int32))
    if not ONE:
        for begin in range(C, units, C):
            above += tl.sum((_keys_at(scores_NF, n, begin, units, HALF, C) > least).to(tl.int32))
    room, put = k - above, 0
    for begin in range(0, units, C):
        at_C = begin + tl.arange(0, C)
        key_C = first_C
        if not ONE:
            key_C = _keys_at(scores_NF, n, begin, units, HALF, C)
        equal_C = ((key_C == least) & (at_C < units)).to(tl.int32)
        take_C = (key_C > least) | ((equal_C > 0) & (tl.cumsum(equal_C, 0) <= room))
        place_C = put + tl.cumsum(take_C.to(tl.int32), 0) - 1
        tl.store(out_NK + n * k + place_C, at_C.to(tl.int64), take_C)
        put += tl.sum(take_C.to(tl.int32))
        room -= tl.sum(equal_C)


def top_k_rows(scores_NF: Tensor, k: int) -> Tensor:
    """See top_k: int64 [N, K], each row's in ascending order."""
    scores_NF = scores_NF.contiguous()
    out_NK = torch.empty(len(scores_NF), k, dtype=torch.long, device=scores_NF.device)
    if len(scores_NF):
        units = scores_NF.shape[1]
        part = min(_AT_ONCE, triton.next_power_of_2(units))
        _rows[(len(scores_NF),)](
            scores_NF, out_NK, units, k, BITS=64 if scores_NF.dtype == torch.float64 else 32,
            HALF=scores_NF.dtype in (torch.bfloat16, torch.float16), ONE=units <= part, C=part, num_warps=8,
        )
    return out_NK
