"""Pairs that exist, pairs that a block mask keeps, and the keys of one query as a list.

Shape letters: B = batch, H = heads, S = keys, K = places in a list of keys.
"""

from __future__ import annotations

from torch import Tensor

from ...kernels.block_attention.pairs import kept_pairs, visible_pairs

__all__ = ["kept_keys", "kept_pairs", "visible_pairs"]


def kept_keys(keep_BH1S: Tensor) -> Tensor:
    """[B, H, 1, K] positions of the kept keys, -1 behind the last."""
    at = keep_BH1S.nonzero()
    place = keep_BH1S.cumsum(-1)[keep_BH1S] - 1
    out = at.new_full((*keep_BH1S.shape[:3], max(1, int(keep_BH1S.sum(-1).max()))), -1)
    out[at[:, 0], at[:, 1], 0, place] = at[:, 3]
    return out
