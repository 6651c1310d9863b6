"""Locality-sensitive hashing by random hyperplanes (SimHash, Charikar 2002): near directions share bits.

Two vectors at an angle a agree in one bit with probability 1 - a / pi, in a table of K bits with the K-th power of that.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width, L = tables, K = bits of a table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..heads import per_head


def planes(D: int, tables: int, bits: int, seed: int, like: Tensor) -> Tensor:
    """[D, L K] normals of the hyperplanes, the same for every head, in the dtype and on the device of `like`."""
    return torch.randn(D, tables * bits, generator=torch.Generator().manual_seed(seed)).to(like)


def codes(x: Tensor, planes_DX: Tensor, bits: int) -> Tensor:
    """[..., L] int32 bucket of each vector [..., D] in each table; autocast must not round what decides about a side."""
    with torch.autocast(x.device.type, enabled=False):
        side = (x @ planes_DX > 0).unflatten(-1, (-1, bits))
    return (side * 2 ** torch.arange(bits, device=x.device)).sum(-1).int()


def collisions(code_BHTL: Tensor, code_BGSL: Tensor) -> Tensor:
    """[B, H, T, S] int16: tables in which a query and a key share their bucket."""
    code_BHSL = per_head(code_BGSL, code_BHTL.shape[1])
    count = torch.zeros(*code_BHTL.shape[:3], code_BHSL.shape[2], dtype=torch.int16, device=code_BHTL.device)
    for table in range(code_BHTL.shape[-1]):
        count += code_BHTL[..., table, None] == code_BHSL[..., None, :, table]
    return count


def share_two(cosine: Tensor, bits: int, tables: int) -> Tensor:
    """Probability that vectors with this cosine share their bucket in two tables or more, float64."""
    p = 1 - cosine.double().clamp(-1 + 1e-12, 1 - 1e-12).acos() / torch.pi
    x = p**bits
    return 1 - (1 - x) ** tables - tables * x * (1 - x) ** (tables - 1)
