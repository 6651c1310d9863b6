"""Locality-sensitive hashing by random hyperplanes (SimHash, Charikar 2002): near directions share bits.

Two vectors at an angle a agree in one bit with probability 1 - a / pi, in a table of K bits with the K-th power of that.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width, L = tables, K = bits of a table.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...kernels.block_attention.agree import narrowest


def planes(D: int, tables: int, bits: int, seed: int, like: Tensor) -> Tensor:
    """[D, L K] normals of the hyperplanes, the same for every head, in the dtype and on the device of `like`."""
    return _drawn(D, tables * bits, seed).to(like)


@lru_cache(maxsize=8)
def _drawn(D: int, X: int, seed: int) -> Tensor:
    """Kept for the next step."""
    return torch.randn(D, X, generator=torch.Generator().manual_seed(seed))


def codes(x: Tensor, planes_DX: Tensor, bits: int) -> Tensor:
    """[..., L] bucket of each vector [..., D] in each table, in the smallest whole numbers; autocast must not round what decides about a side."""
    with torch.autocast(x.device.type, enabled=False):
        side = (x @ planes_DX > 0).unflatten(-1, (-1, bits))
    kind = torch.uint8 if bits <= 8 else torch.int32
    place = 2 ** torch.arange(bits, device=x.device, dtype=kind)
    return (side.to(kind) * place).sum(-1, dtype=kind).to(narrowest(bits))


def share_two(cosine: Tensor, bits: int, tables: int) -> Tensor:
    """Probability that vectors with this cosine share their bucket in two tables or more, float64."""
    p = 1 - cosine.double().clamp(-1 + 1e-12, 1 - 1e-12).acos() / torch.pi
    x = p**bits
    return 1 - (1 - x) ** tables - tables * x * (1 - x) ** (tables - 1)
