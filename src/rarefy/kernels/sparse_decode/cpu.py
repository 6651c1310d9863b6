"""CPU path: plain loops over pairs, rows of a table read four at a time.

Shape letters: N = rows, M = kept pairs, F = units, D = width.
"""

from __future__ import annotations

from ...compiled import loop

_SUMS = {"contract", "reassoc", "nsz"}


@loop()
def sort_by_unit(unit_M, begin_N, end_N, order_P, row_P, edges_F1):  # type: ignore[no-untyped-def]
    """Counting sort of the pairs m in begin_N[n] .. end_N[n] of each row n; edges_F1 comes in as zeros."""
    for n in range(len(begin_N)):
        for m in range(begin_N[n], end_N[n]):
            edges_F1[unit_M[m] + 1] += 1
    for f in range(1, len(edges_F1)):
        edges_F1[f] += edges_F1[f - 1]
    free_F = edges_F1[:-1].copy()
    for n in range(len(begin_N)):
        for m in range(begin_N[n], end_N[n]):
            at = free_F[unit_M[m]]
            free_F[unit_M[m]] = at + 1
            order_P[at], row_P[at] = m, n


@loop(fastmath=_SUMS)
def weighted_sums(start, stop, value_M, index_M, edges_N1, table_FD, begin_D, out_ND):  # type: ignore[no-untyped-def]
    """out[n] = begin + sum over the pairs m of row n of value[m] * table[index[m]]."""
    for n in range(start, stop):
        out, m, end = out_ND[n], edges_N1[n], edges_N1[n + 1]
        out[:] = begin_D
        while m + 4 <= end:                     # the sums are loaded and stored once for four rows
            a, b, c, d = value_M[m], value_M[m + 1], value_M[m + 2], value_M[m + 3]
            p, q, r, s = table_FD[index_M[m]], table_FD[index_M[m + 1]], table_FD[index_M[m + 2]], table_FD[index_M[m + 3]]
            for i in range(len(out)):
                out[i] += a * p[i] + b * q[i] + c * r[i] + d * s[i]
            m += 4
        while m < end:
            a, p = value_M[m], table_FD[index_M[m]]
            for i in range(len(out)):
                out[i] += a * p[i]
            m += 1


@loop(fastmath=_SUMS)
def products(start, stop, row_ND, unit_M, edges_N1, table_FD, out_M):  # type: ignore[no-untyped-def]
    """out[m] = row[n] . table[unit[m]] for the pairs of rows start..stop."""
    for n in range(start, stop):
        row = row_ND[n]
        for m in range(edges_N1[n], edges_N1[n + 1]):
            table, total = table_FD[unit_M[m]], row_ND.dtype.type(0)
            for i in range(len(row)):
                total += row[i] * table[i]
            out_M[m] = total


@loop(fastmath=_SUMS)
def both_gradients(start, stop, value_M, order_M, row_M, edges_F1, grad_ND, table_FD, grad_M, grad_FD):  # type: ignore[no-untyped-def]
    """Of units start..stop: grad_M[m] = grad[n] . table[f] and grad_FD[f] = sum of value[m] * grad[n], reading grad[n] once."""
    for f in range(start, stop):
        table, total_D = table_FD[f], grad_FD[f]
        total_D[:] = 0
        for at in range(edges_F1[f], edges_F1[f + 1]):
            m, grad, total = order_M[at], grad_ND[row_M[at]], grad_ND.dtype.type(0)
            value = value_M[m]
            for i in range(len(grad)):
                total += grad[i] * table[i]
                total_D[i] += value * grad[i]
            grad_M[m] = total
