"""The heaviest numbers of a row that together reach a share of it, without sorting, compiled.

Shape letters: X = rows, N = numbers of a row.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import numpy as np

from ...compiled import loop


@loop(error_model="numpy")
def reach(start, stop, mass_XN, bits_XN, first_XN, rest, out_XN):  # type: ignore[no-untyped-def]
    """out[x, n] = the masses at n and all that come after it make `rest` of the row's or more, for x in start .. stop.

    Those of `first` come before all others and are kept; the others in falling order, of equals the first. bits are those of the masses, which
    are not negative, so that they rise with them: the last mass kept is found by its digits, of 11, 11 and 10 bits, later ones only
    among what shares the earlier. Sums in float64.
    """
    N = mass_XN.shape[1]
    left, total, much = np.empty(N, np.int64), np.empty(2048, np.float64), np.empty(2048, np.int64)
    for x in range(start, stop):
        whole, before, many = 0.0, 0.0, 0
        for n in range(N):
            whole += mass_XN[x, n]
            if first_XN[x, n]:
                before += mass_XN[x, n]
            else:
                left[many] = n
                many += 1
            out_XN[x, n] = first_XN[x, n]
        limit = whole - rest * whole                                    # kept is what has at most so much before it
        if many == 0 or before > limit:
            continue
        least = np.int64(0)
        for digit in range(3):
            shift, mask = (21, 2047) if digit == 0 else ((10, 2047) if digit == 1 else (0, 1023))
            total[: mask + 1], much[: mask + 1] = 0.0, 0
            for i in range(many):
                at = (np.int64(bits_XN[x, left[i]]) >> shift) & mask
                total[at] += mass_XN[x, left[i]]
                much[at] += 1
            at, last = mask, mask
            ahead = before
            while at >= 0:
                if much[at] > 0:
                    if ahead > limit:
                        break
                    last, before = at, ahead
                    ahead += total[at]
                at -= 1
            least |= np.int64(last) << shift
            same = 0
            for i in range(many):
                left[same] = left[i]
                same += ((np.int64(bits_XN[x, left[i]]) >> shift) & mask) == last
            many = same
        for n in range(N):
            if np.int64(bits_XN[x, n]) > least:
                out_XN[x, n] = True
        for i in range(many):                                            # equals, in their order
            if before > limit:
                break
            out_XN[x, left[i]] = True
            before += mass_XN[x, left[i]]
