"""CPU path for float32 where bfloat16 products are fast: a bfloat16 product says which units can be among the k largest,
and only those are computed in float32. Which k are chosen and what their values are is that of float32.

Let x' and w' be x and w rounded to bfloat16, and q the product x'.w' summed in float32 and rounded to bfloat16. Then

    |q - x.w| <= |x - x'| |w| + |x'| |w - w'| + g |x| |w| + |q| / 256        (Cauchy-Schwarz; g |x| |w| bounds the rounding of sums)

whose norms are computed, not estimated, for each row and each group of units. A unit whose q + bias lies more than twice
that below the k-th largest q + bias cannot be chosen. With trained or random dictionaries 1.3 to 2 k units are left.

With `coarse` the bound is taken as 0: the k are those of the bfloat16 product, their values still float32.

Shape letters: N = rows, F = units, K = kept, D = width, G = groups of units.
"""

from __future__ import annotations

from functools import cache

import numba
import numpy as np
import torch
from torch import Tensor

from .. import native, pool
from ..top_k.cpu import GROUP, kth_largest, take

ROWS_AT_ONCE = 256
_LARGEST = 1e30
"""Products of norms up to here cannot overflow anywhere below; larger ones go the plain way."""


@cache
def pays(rows: int, units: int, width: int, k: int) -> bool:
    """Whether a product in bfloat16 is worth its preparation: fast on this CPU, many rows, and a group for each unit kept."""
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(fast and fast()) and torch.backends.mkldnn.is_available() and rows >= 128 and width >= 32 and units >= GROUP * k


@numba.njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
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


@numba.njit(cache=True, nogil=True)
def key(value):  # type: ignore[no-untyped-def]
    """An integer that orders as the float32 does."""
    bits = np.float32(value).view(np.int32)
    return np.int32(bits if bits >= 0 else np.int32(-2147483648) - bits)


@numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def near_and_best(bits, bias, near, best):  # type: ignore[no-untyped-def]
    """q + bias of every unit, and the largest of each group; unit i is of group i mod G."""
    groups = len(best)
    best[:] = -np.inf
    for start in range(0, len(bits), groups):
        q, b, to = bits[start : start + groups], bias[start : start + groups], near[start : start + groups]
        for g in range(len(q)):
            to[g] = np.int32(np.int32(q[g]) << np.int32(16)).view(np.float32) + b[g]
            best[g] = max(best[g], to[g])


@numba.njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def dot(a, b):  # type: ignore[no-untyped-def]
    """Inner product of two rows."""
    total = a.dtype.type(0)
    for d in range(len(a)):
        total += a[d] * b[d]
    return total


@numba.njit(cache=True, nogil=True)
def screen_rows(  # type: ignore[no-untyped-def]
    start, stop, bits_NF, x_ND, size_N, lost_N, weight_FD, bias_F, size_G, lost_G, reach, coarse, k, value_NK, index_NK, sound_N
):
    """The k largest x.w + bias of each row from the bits of q; sound_N is False where fewer than k are surely positive."""
    units, groups = len(bias_F), len(size_G)
    best, low, margin = np.empty(groups, np.float32), np.empty(groups, np.float32), np.zeros(groups, np.float32)
    near, unit = np.empty(units, np.float32), np.empty(units, np.int64)
    least, most, exact, keys = np.empty(units, np.float32), np.empty(units, np.float32), np.empty(units, np.float32), np.empty(units, np.int32)
    sums = np.float32((x_ND.shape[1] + 16) * 2.0**-22)
    for n in range(start, stop):
        near_and_best(bits_NF[n], bias_F, near, best)
        if not coarse:
            size, lost, last = size_N[n] + lost_N[n], lost_N[n], (max(best.max(), np.float32(0)) + reach) / np.float32(256)
            for g in range(groups):
                margin[g] = np.float32(1.01) * (lost * size_G[g] + size * (lost_G[g] + sums * size_G[g]) + last)
        for g in range(groups):
            low[g] = best[g] - margin[g]
        edge = kth_largest(low.view(np.int32), groups, k)
        sound_N[n] = edge > 0                       # negative floats are negative as integers too, if in another order
        if not sound_N[n]:
            continue
        floor, count = np.int32(edge).view(np.float32), 0
        for g in range(groups):
            cut = floor - margin[g]
            if best[g] >= cut:
                for i in range(g, units, groups):
                    if near[i] >= cut:
                        unit[count], least[count], most[count] = i, near[i] - margin[g], near[i] + margin[g]
                        count += 1
        floor, left = np.int32(kth_largest(least.view(np.int32), count, k)).view(np.float32), 0
        for i in range(count):
            if most[i] >= floor:
                u = unit[i]
                unit[left], exact[left] = u, dot(x_ND[n], weight_FD[u]) + bias_F[u]
                keys[left] = key(exact[left])
                left += 1
        take(keys, unit, left, k, index_NK[n])
        for j in range(k):
            i = index_NK[n, j]
            value_NK[n, j], index_NK[n, j] = exact[i], unit[i]


def _per_group(value_F: Tensor) -> Tensor:
    """[G] the largest of each group."""
    groups = -(-len(value_F) // GROUP)
    return torch.nn.functional.pad(value_F, (0, -len(value_F) % groups)).view(-1, groups).amax(0)


def _halves(full_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    half_ND = pool.empty(tuple(full_ND.shape), torch.int16)
    size_N, lost_N = torch.empty(2, len(full_ND)).unbind()
    native.spread(halve, len(full_ND), full_ND.numpy(), half_ND.numpy(), size_N.numpy(), lost_N.numpy())
    return half_ND.view(torch.bfloat16), size_N, lost_N


def screened_top_k(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor, k: int, coarse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(values, units, sound), [N, K] twice and [N] bool: rows that are not sound are left unwritten.

    Args: contiguous float32. coarse: choose by the bfloat16 product itself.
    """
    n, units = len(x_ND), len(weight_FD)
    value_NK, index_NK, sound_N = torch.empty(n, k), torch.empty(n, k, dtype=torch.long), torch.zeros(n, dtype=torch.bool)
    x_half_ND, size_N, lost_N = _halves(x_ND)
    w_half_FD, size_F, lost_F = _halves(weight_FD)
    size_G, lost_G, reach = _per_group(size_F), _per_group(lost_F), bias_F.abs().max()
    if not float(size_N.max() + lost_N.max()) * float(size_F.max() + lost_F.max()) + float(reach) < _LARGEST:
        return value_NK, index_NK, sound_N
    buffer_CF = pool.empty((min(n, ROWS_AT_ONCE), units), torch.bfloat16)
    unit = [t.numpy() for t in (weight_FD, bias_F, size_G, lost_G)]
    for start in range(0, n, ROWS_AT_ONCE):
        at = slice(start, start + ROWS_AT_ONCE)
        q = torch.mm(x_half_ND[at], w_half_FD.T, out=buffer_CF[: len(x_half_ND[at])]).view(torch.int16)
        row = [t[at].numpy() for t in (x_ND, size_N, lost_N)]
        out = [t[at].numpy() for t in (value_NK, index_NK, sound_N)]
        native.spread(screen_rows, len(q), q.numpy(), *row, *unit, np.float32(reach), coarse, k, *out, least=16)
    return value_NK, index_NK, sound_N
