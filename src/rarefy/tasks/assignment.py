"""The assignment problem in compiled loops: what `planted.assign` runs where numba is there.

As there: shortest augmenting paths with dual variables, one path a row, but each path touches only columns and rows that it
reaches, and no array is made on the way. Starting duals are the columns' least costs, which give most rows their partner at
once (Jonker & Volgenant 1987, column reduction).
"""

from __future__ import annotations

import numpy as np

from ..compiled import loop


@loop()
def shortest_paths(cost):  # type: ignore[no-untyped-def]
    """Row matched to each column (-1: none) at least total cost; every row is matched. Needs rows <= columns, contiguous float64."""
    rows, columns = cost.shape
    u, v = np.zeros(rows), np.zeros(columns)
    row_of = np.full(columns, -1, np.int64)
    matched = np.zeros(rows, np.bool_)
    for i in range(rows):                                   # row reduction; a free cheapest column is taken at once
        best = 0
        for j in range(1, columns):
            if cost[i, j] < cost[i, best]:
                best = j
        u[i] = cost[i, best]
        if row_of[best] < 0:
            row_of[best] = i
            matched[i] = True
    shortest, came_from = np.empty(columns), np.empty(columns, np.int64)
    open_ = np.empty(columns, np.int64)
    for first in range(rows):
        if matched[first]:
            continue
        for j in range(columns):
            shortest[j], came_from[j], open_[j] = np.inf, -1, j
        left, row, column, reached = columns, first, -1, 0.0
        while True:
            at, least = -1, np.inf
            shift = reached - u[row]
            for k in range(left):
                j = open_[k]
                through = shift + cost[row, j] - v[j]
                if through < shortest[j]:
                    shortest[j], came_from[j] = through, column
                if shortest[j] < least or (shortest[j] == least and row_of[j] < 0):
                    least, at = shortest[j], k
            column, reached = open_[at], least
            left -= 1
            open_[at], open_[left] = open_[left], column
            if row_of[column] < 0:
                break
            row = row_of[column]
        u[first] += reached
        for k in range(left + 1, columns):                  # columns passed through; the last one keeps its dual
            j = open_[k]
            u[row_of[j]] += reached - shortest[j]
            v[j] -= reached - shortest[j]
        while column >= 0:
            before = came_from[column]
            row_of[column] = first if before < 0 else row_of[before]
            column = before
    return row_of
