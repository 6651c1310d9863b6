"""Key heads as query heads see them, and rows of a batch without their padding.

Shape letters: B = batch, G = key heads, H = query heads (a multiple of G), T = queries, S = keys.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def per_head(x_BG: Tensor, heads: int) -> Tensor:
    """[B, H, ...] of [B, G, ...]: each key head once a query head that reads it."""
    return x_BG if heads == x_BG.shape[1] else x_BG.repeat_interleave(heads // x_BG.shape[1], 1)


def real_places(padding_BS: Tensor, T: int, causal: bool) -> Iterator[tuple[int, Tensor | slice, Tensor]]:
    """Of each row that has both: its number, the places of its real keys, the places of its real queries.

    Queries are the newest T keys where attention is causal, and the keys themselves where as many look both ways; those of
    anything else (another sequence) are all real. Keys beside padding at one side come as a slice: no copy of a long cache.
    """
    S = padding_BS.shape[1]
    for b, real_S in enumerate(padding_BS):
        keys = real_S.nonzero()[:, 0]
        queries = real_S[S - T :].nonzero()[:, 0] if causal or T == S else torch.arange(T, device=real_S.device)
        if len(keys) and len(queries):
            first, end = int(keys[0]), int(keys[-1]) + 1
            yield b, slice(first, end) if end - first == len(keys) else keys, queries
