"""CPU path for float32 where bfloat16 products are fast: a bfloat16 product says which units can be among the k largest,
and only those are computed in float32. Which k are chosen and what their values are is that of float32.

Let x' and w' be x and w rounded to bfloat16, and q the product x'.w' summed in float32 and rounded to bfloat16. Then

    |q - x.w| <= |x - x'| |w| + |x'| |w - w'| + g |x'| |w| + |q| / 256        (Cauchy-Schwarz; g |x'| |w| bounds the rounding of sums)

whose norms are computed, not estimated, for each row and each group of units. So each unit's value in float32 lies between
a least and a most, and a unit whose most is below the k-th largest least cannot be chosen. A handful more than k are left.

With `coarse` the bound is taken as 0: the k are those of the bfloat16 product, their values still float32.

With `absolute` everything is said of |x.w + bias|, whose distance from |q + bias| the same bound covers.

Shape letters: N = rows, F = units, K = kept, D = width, G = groups of units.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from ...compiled import loop
from .. import native, pool
from ..sparse_decode.cpu import sort_by_unit
from ..top_k.cpu import GROUP, kth_largest, take

ROWS_AT_ONCE = 256
_LARGEST = 1e30
"""Products of norms up to here cannot overflow anywhere below; larger ones go the plain way."""


@cache
def pays(rows: int, units: int, width: int, k: int) -> bool:
    """Whether a product in bfloat16 is worth its preparation: fast on this CPU, many rows, and a group for each unit kept."""
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(fast and fast()) and torch.backends.mkldnn.is_available() and rows >= 128 and width >= 32 and units >= GROUP * k


@loop(fastmath={"contract", "reassoc", "nsz"})
def halve(start, stop, full_ND, half_ND, size_N, lost_N):  # type: ignore[no-untyped-def]
    """Bits of each row rounded to bfloat16 (nearest, ties to even), its norm, and the norm of what rounding took away."""
    for n in range(start, stop):
        bits, full, half = full_ND[n].view(np.int32), full_ND[n], half_ND[n]
        size = lost = np.float32(0)
        for d in range(len(full)):
            rounded = np.int32((bits[d] + np.int32(0x7FFF) + ((bits[d] >> np.int32(16)) & np.int32(1))) >> np.int32(16))
            half[d] = rounded
            gone = full[d] - np.int32(rounded << np.int32(16)).view(np.float32)
            size += full[d] * full[d]
            lost += gone * gone
        size_N[n], lost_N[n] = np.sqrt(size), np.sqrt(lost)


@loop(fastmath={"nnan", "nsz"})
def near_and_best(bits, bias, near, best):  # type: ignore[no-untyped-def]
    """q + bias of every unit, and the largest of each group; unit i is of group i mod G."""
    groups = len(best)
    best[:] = -np.inf
    for start in range(0, len(bits), groups):
        q, b, to = bits[start : start + groups], bias[start : start + groups], near[start : start + groups]
        for g in range(len(q)):
            to[g] = np.int32(np.int32(q[g]) << np.int32(16)).view(np.float32) + b[g]
            best[g] = max(best[g], to[g])


@loop(fastmath={"nnan", "nsz"})
def near_and_best_size(bits, bias, near, best):  # type: ignore[no-untyped-def]
    """near_and_best of |q + bias|; a loop of its own, so that the other does not pay for it."""
    groups = len(best)
    best[:] = -np.inf
    for start in range(0, len(bits), groups):
        q, b, to = bits[start : start + groups], bias[start : start + groups], near[start : start + groups]
        for g in range(len(q)):
            to[g] = abs(np.int32(np.int32(q[g]) << np.int32(16)).view(np.float32) + b[g])
            best[g] = max(best[g], to[g])


@loop()
def candidates(  # type: ignore[no-untyped-def]
    start, stop, bits_NF, size_N, lost_N, bias_F, size_G, lost_G, sums, reach, coarse, absolute, k, unit_NC, count_N
):
    """Units of each row that can be among its k largest x.w + bias, from the bits of q, and how many they are.

    The count is 0 for a row whose k largest are not all surely positive, and for one that has more than C candidates.
    `reach` bounds |bias|, `sums` times two norms the rounding of a sum.
    """
    units, groups, room = len(bias_F), len(size_G), unit_NC.shape[1]
    best, low, margin = np.empty(groups, np.float32), np.empty(groups, np.float32), np.zeros(groups, np.float32)
    near, unit = np.empty(units, np.float32), np.empty(units, np.int64)
    least, most = np.empty(units, np.float32), np.empty(units, np.float32)
    last = np.float32(0 if coarse else 1.01 / 256)                     # of |q| <= |q + bias| + reach
    for n in range(start, stop):
        if absolute:
            near_and_best_size(bits_NF[n], bias_F, near, best)
        else:
            near_and_best(bits_NF[n], bias_F, near, best)
        if not coarse:
            size, lost = np.float32(1.01) * (size_N[n] + lost_N[n]), np.float32(1.01) * lost_N[n]
            for g in range(groups):
                margin[g] = lost * size_G[g] + size * (lost_G[g] + sums * size_G[g]) + last * reach
        for g in range(groups):
            low[g] = best[g] * (1 - last) - margin[g]
        edge, count, kept = kth_largest(low.view(np.int32), groups, k), 0, 0
        if edge > 0:                                # negative floats are negative as integers too, if in another order
            floor = np.int32(edge).view(np.float32)
            for g in range(groups):
                cut = floor - margin[g]
                cut /= 1 + last if cut > 0 else 1 - last
                if best[g] >= cut:
                    for i in range(g, units, groups):
                        if near[i] >= cut:
                            unit[count] = i
                            least[count], most[count] = near[i] * (1 - last) - margin[g], near[i] + last * abs(near[i]) + margin[g]
                            count += 1
            floor = np.int32(kth_largest(least.view(np.int32), count, k)).view(np.float32)
            for i in range(count):
                if most[i] >= floor:
                    unit_NC[n, min(kept, room - 1)] = unit[i]
                    kept += 1
        count_N[n] = kept if kept <= room else 0


@loop(fastmath={"contract", "reassoc", "nsz"})
def products_by_unit(start, stop, x_ND, weight_FD, bias_F, order_P, row_P, edges_F1, value_M):  # type: ignore[no-untyped-def]
    """value[order[p]] = x[row[p]] . weight[f] + bias[f] for the pairs p of units start..stop: each weight is read once."""
    for f in range(start, stop):
        weight = weight_FD[f]
        for p in range(edges_F1[f], edges_F1[f + 1]):
            x, total = x_ND[row_P[p]], x_ND.dtype.type(0)
            for d in range(len(x)):
                total += x[d] * weight[d]
            value_M[order_P[p]] = total + bias_F[f]


@loop()
def choose(start, stop, unit_NC, value_NC, count_N, absolute, k, value_NK, index_NK):  # type: ignore[no-untyped-def]
    """The k largest of each row's candidates, of equals the lowest units; rows without candidates are left as they are."""
    key_C = np.empty(unit_NC.shape[1], np.int32)
    for n in range(start, stop):
        if count_N[n]:
            bits = value_NC[n].view(np.int32)
            for i in range(count_N[n]):
                key_C[i] = bits[i] if bits[i] >= 0 else np.int32(-2147483648) - bits[i]
                if absolute:
                    key_C[i] = abs(key_C[i])
            take(key_C, unit_NC[n], count_N[n], k, index_NK[n])
            for j in range(k):
                i = index_NK[n, j]
                value_NK[n, j], index_NK[n, j] = value_NC[n, i], unit_NC[n, i]


def _per_group(value_F: Tensor) -> Tensor:
    """[G] the largest of each group."""
    groups = -(-len(value_F) // GROUP)
    return torch.nn.functional.pad(value_F, (0, -len(value_F) % groups)).view(-1, groups).amax(0)


def _halves(full_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    half_ND = pool.empty(tuple(full_ND.shape), torch.int16)
    size_N, lost_N = torch.empty(2, len(full_ND)).unbind()
    native.spread(halve, len(full_ND), full_ND.numpy(), half_ND.numpy(), size_N.numpy(), lost_N.numpy())
    return half_ND.view(torch.bfloat16), size_N, lost_N


def _screen(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor, k: int, coarse: bool, absolute: bool, unit_NC: Tensor) -> Tensor:
    """[N] how many candidates each row has in `unit_NC`."""
    n, units, sums = len(x_ND), len(weight_FD), np.float32((x_ND.shape[1] + 16) * 2.0**-22)
    x_half_ND, size_N, lost_N = _halves(x_ND)
    w_half_FD, size_F, lost_F = _halves(weight_FD)
    size_G, lost_G, reach = _per_group(size_F), _per_group(lost_F), bias_F.abs().max()
    count_N = torch.zeros(n, dtype=torch.long)
    if not float(size_N.max() + lost_N.max()) * float(size_F.max() + lost_F.max()) + float(reach) < _LARGEST:
        return count_N
    buffer_CF = pool.empty((min(n, ROWS_AT_ONCE), units), torch.bfloat16)
    shared = (bias_F.numpy(), size_G.numpy(), lost_G.numpy(), sums, np.float32(reach), coarse, absolute, k)
    for start in range(0, n, ROWS_AT_ONCE):
        at = slice(start, start + ROWS_AT_ONCE)
        q = torch.mm(x_half_ND[at], w_half_FD.T, out=buffer_CF[: len(x_half_ND[at])]).view(torch.int16)
        row, out = (size_N[at].numpy(), lost_N[at].numpy()), (unit_NC[at].numpy(), count_N[at].numpy())
        native.spread(candidates, len(q), q.numpy(), *row, *shared, *out, least=16)
    return count_N


def screened_top_k(
    x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor, k: int, coarse: bool, absolute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, units, done), [N, K] twice and [N] bool: rows that are not done are left unwritten.

    Args: contiguous float32. coarse: choose by the bfloat16 product itself. absolute: the k largest in absolute value.
    """
    n, units, room = len(x_ND), len(weight_FD), 8 * k + 2 * GROUP
    unit_NC, value_NC = pool.empty((n, room), torch.long), pool.empty((n, room), torch.float32)
    count_N = _screen(x_ND, weight_FD, bias_F, k, coarse, absolute, unit_NC)
    begin_N, pairs = torch.arange(n) * room, int(count_N.sum())
    order_P, row_P, edges_F1 = torch.empty(pairs, dtype=torch.long), torch.empty(pairs, dtype=torch.long), torch.zeros(units + 1, dtype=torch.long)
    by_unit = [t.numpy() for t in (order_P, row_P, edges_F1)]
    sort_by_unit(unit_NC.view(-1).numpy(), begin_N.numpy(), (begin_N + count_N).numpy(), *by_unit)
    given = [t.numpy() for t in (x_ND, weight_FD, bias_F)]
    native.spread(products_by_unit, units, *given, *by_unit, value_NC.view(-1).numpy())
    value_NK, index_NK = torch.empty(n, k), torch.empty(n, k, dtype=torch.long)
    found = [t.numpy() for t in (unit_NC, value_NC, count_N)]
    native.spread(choose, n, *found, absolute, k, value_NK.numpy(), index_NK.numpy())
    return value_NK, index_NK, count_N > 0
