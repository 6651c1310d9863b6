"""In how many tables a query and a key share their bucket: what hashing methods choose keys by.

Shape letters: B = batch, H = query heads, G = key heads (H is a multiple of G), T = queries, S = keys, L = tables; X = B * H, Y = B * G.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import native
from .decode import memory

_FEW = 8
"""Queries up to which keys' codes are read as they lie; for more it pays to turn them."""
_NARROW = (torch.uint8, torch.int16, torch.int32)


def narrowest(bits: int) -> torch.dtype:
    """The smallest whole numbers that hold so many bits: a step reads the codes of all keys."""
    return torch.uint8 if bits <= 8 else torch.int16 if bits < 16 else torch.int32


def agreements(code_BHTL: Tensor, code_BGSL: Tensor) -> Tensor:
    """[B, H, T, S] tables in which a query and a key share their bucket; uint8, int16 beyond 255 tables. Codes are of one dtype."""
    (B, H, T, L), (G, S) = code_BHTL.shape, code_BGSL.shape[1:3]
    if L > 255 or not native.serves(code_BHTL, code_BGSL, dtypes=_NARROW) or not code_BHTL.numel():
        keys_BHSL = code_BGSL.repeat_interleave(H // G, 1)
        count = torch.zeros(B, H, T, S, dtype=torch.int16 if L > 255 else torch.uint8, device=code_BHTL.device)
        for table in range(L):
            count += code_BHTL[..., table, None] == keys_BHSL[..., None, :, table]
        return count
    from .agree_loops import by_code, by_key

    queries, out = code_BHTL.flatten(0, 1).mT.contiguous().numpy(), np.empty((B * H, T, S), np.uint8)
    if T <= _FEW:
        native.spread(by_key, B * H, queries, *memory(code_BGSL), (H, G), out, least=1)
    else:
        native.spread(by_code, B * H, queries, code_BGSL.flatten(0, 1).mT.contiguous().numpy(), H // G, out, least=1)
    return torch.from_numpy(out).view(B, H, T, S)
