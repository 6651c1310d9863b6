"""Triton path: a program a row (or unit) and a stretch of D, pairs read a few at a time, sums in float32 or wider.

Shape letters: N = rows, M = kept pairs, P = pairs at a time, F = units, D = width, C = part of D.
"""

# pyright: basic, reportMissingImports=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PAIRS = 8
_WIDEST = 512
"""Columns of a program."""


@triton.jit
def _sums(value_M, index_M, edges_N1, table_FD, begin_D, out_ND, width, BEGIN: tl.constexpr, WIDE: tl.constexpr, P: tl.constexpr, C: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    at_C = tl.program_id(1) * C + tl.arange(0, C)
    inside_C = at_C < width
    total_C = tl.zeros([C], WIDE)
    if BEGIN:
        total_C += tl.load(begin_D + at_C, inside_C, 0).to(WIDE)
    start, stop = tl.load(edges_N1 + n), tl.load(edges_N1 + n + 1)
    for m in range(start, stop, P):
        pair_P = m + tl.arange(0, P)
        there_P = pair_P < stop
        value_P = tl.load(value_M + pair_P, there_P, 0).to(WIDE)
        row_P = tl.load(index_M + pair_P, there_P, 0)
        row_PC = tl.load(table_FD + row_P[:, None] * width + at_C[None, :], there_P[:, None] & inside_C[None, :], 0).to(WIDE)
        total_C += tl.sum(value_P[:, None] * row_PC, 0)
    tl.store(out_ND + n * width + at_C, total_C, inside_C)


@triton.jit
def _products(row_ND, unit_M, edges_N1, table_FD, out_M, width, WIDE: tl.constexpr, P: tl.constexpr, C: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(edges_N1 + n), tl.load(edges_N1 + n + 1)
    for m in range(start, stop, P):
        pair_P = m + tl.arange(0, P)
        there_P = pair_P < stop
        unit_P = tl.load(unit_M + pair_P, there_P, 0)
        total_P = tl.zeros([P], WIDE)
        for begin in range(0, width, C):
            at_C = begin + tl.arange(0, C)
            inside_C = at_C < width
            row_C = tl.load(row_ND + n * width + at_C, inside_C, 0).to(WIDE)
            table_PC = tl.load(table_FD + unit_P[:, None] * width + at_C[None, :], there_P[:, None] & inside_C[None, :], 0).to(WIDE)
            total_P += tl.sum(table_PC * row_C[None, :], 1)
        tl.store(out_M + pair_P, total_P, there_P)


def _wide(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def weighted_sums(value_M: Tensor, index_M: Tensor, edges_N1: Tensor, table_FD: Tensor, begin_D: Tensor | None) -> Tensor:
    """[N, D]: begin + sum over the pairs m of row n of value[m] * table[index[m]]."""
    table_FD, width = table_FD.detach().contiguous(), table_FD.shape[1]
    out_ND = table_FD.new_empty(len(edges_N1) - 1, width)
    if out_ND.numel():
        part = min(_WIDEST, triton.next_power_of_2(width))
        begin = table_FD if begin_D is None else begin_D.detach().to(table_FD.dtype).contiguous()
        _sums[(len(out_ND), triton.cdiv(width, part))](
            value_M.detach().contiguous(), index_M.contiguous(), edges_N1.contiguous(), table_FD, begin, out_ND, width,
            BEGIN=begin_D is not None, WIDE=_wide(table_FD.dtype), P=PAIRS, C=part,
        )
    return out_ND


def products(row_ND: Tensor, unit_M: Tensor, edges_N1: Tensor, table_FD: Tensor) -> Tensor:
    """[M]: row[n] . table[unit[m]] for the pairs m of each row n."""
    row_ND, table_FD, width = row_ND.detach().contiguous(), table_FD.detach().contiguous(), row_ND.shape[1]
    out_M = row_ND.new_empty(len(unit_M))
    if len(unit_M):
        part = min(_WIDEST, triton.next_power_of_2(width))
        _products[(len(row_ND),)](
            row_ND, unit_M.contiguous(), edges_N1.contiguous(), table_FD, out_M, width, WIDE=_wide(row_ND.dtype), P=PAIRS, C=part,
        )
    return out_M
