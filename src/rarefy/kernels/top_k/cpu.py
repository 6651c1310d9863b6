"""CPU path: one pass over the scores, then only over the few groups that can hold a chosen unit.

A row's units fall into groups. At least k groups have a maximum >= t, the k-th largest maximum, so at least k units do: no
unit below t is chosen, and a group whose maximum is below t is not looked at again. Unit i belongs to group i mod G, so
that the maxima of many groups are taken side by side. The k-th largest of anything is found by halving the interval it
lies in and counting what is above, which needs no branch and no order.

Scores are compared as integers: the bits of a float of any width, with sign and magnitude turned into two's complement,
order as the float does. So one kernel serves all widths, -0.0 equals 0.0, and infinities are numbers like others; what
lies beyond infinity is NaN.

Shape letters: N = rows, F = units, K = kept, G = groups.
"""

from __future__ import annotations

import numpy as np

from ...compiled import loop

GROUP = 32
"""Units of a group, or one less."""


@loop()
def kth_largest(keys, count, k):  # type: ignore[no-untyped-def]
    """Of keys[:count], integers."""
    low, high = keys[0], keys[0]
    for i in range(count):
        low, high = min(low, keys[i]), max(high, keys[i])
    while low < high:
        middle = keys.dtype.type((low | high) - ((low ^ high) >> 1))      # the mean rounded up, without overflow
        above = 0
        for i in range(count):
            above += keys[i] >= middle
        if above >= k:
            low = middle
        else:
            high = keys.dtype.type(middle - 1)
    return low


@loop()
def take(keys, unit, count, k, place):  # type: ignore[no-untyped-def]
    """Write to place[:k] where in keys[:count] the k largest stand; of equals at the edge those with the lowest units."""
    edge, above, equal = kth_largest(keys, count, k), 0, 0
    for i in range(count):
        above += keys[i] > edge
        equal += keys[i] == edge
    last = np.int64(2**63 - 1)
    if equal > k - above:
        equals, at = np.empty(equal, np.int64), 0
        for i in range(count):
            if keys[i] == edge:
                equals[at] = unit[i]
                at += 1
        equals.sort()
        last = equals[k - above - 1]
    at = 0
    for i in range(count):
        if keys[i] > edge or (keys[i] == edge and unit[i] <= last):
            place[at] = i
            at += 1


@loop()
def extremes(bits, lowest, most, least):  # type: ignore[no-untyped-def]
    """Largest and smallest key of each group; -0.0 counts as just below 0.0 here."""
    small, shift, mask, groups = bits.dtype.type, 8 * bits.itemsize - 1, -1 - lowest, len(most)
    for g in range(groups):
        most[g] = least[g] = small(bits[g] ^ ((bits[g] >> shift) & mask))
    for start in range(groups, len(bits), groups):
        row = bits[start : start + groups]
        for g in range(len(row)):
            key = small(row[g] ^ ((row[g] >> shift) & mask))
            most[g], least[g] = max(most[g], key), min(least[g], key)


@loop()
def top_k_rows(start, stop, bits_NF, k, lowest, infinity, index_NK, sound_N):  # type: ignore[no-untyped-def]
    """Units of the k largest scores of each row; sound_N is False for a row with NaN, whose units are left unwritten.

    Args:
        bits_NF: signed integers that are the scores' bits. lowest: least integer of that width. infinity: bits of +inf.
    """
    units, small = bits_NF.shape[1], bits_NF.dtype.type
    groups = (units + GROUP - 1) // GROUP
    most, least = np.empty(groups, bits_NF.dtype), np.empty(groups, bits_NF.dtype)
    unit, keys = np.empty(4096, np.int64), np.empty(4096, bits_NF.dtype)
    for n in range(start, stop):
        bits = bits_NF[n]
        extremes(bits, lowest, most, least)
        sound_N[n] = most.max() <= infinity and least.min() >= -1 - infinity
        if not sound_N[n]:
            continue
        floor = kth_largest(most, groups, k) if k <= groups else small(lowest)
        floor = small(-1) if floor == 0 else floor
        room = 0
        for g in range(groups):
            room += GROUP * (most[g] >= floor)
        if room > len(unit):
            unit, keys = np.empty(room, np.int64), np.empty(room, bits_NF.dtype)
        count = 0
        for g in range(groups):
            if most[g] >= floor:
                for i in range(g, units, groups):
                    key = small(bits[i] if bits[i] >= 0 else lowest - bits[i])
                    if key >= floor:
                        unit[count], keys[count] = i, key
                        count += 1
        take(keys, unit, count, k, index_NK[n])
        for j in range(k):
            index_NK[n, j] = unit[index_NK[n, j]]
