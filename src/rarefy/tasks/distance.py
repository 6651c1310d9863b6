"""Text loss by distance: does a token that the context repeats come from near or from far?

A token is recalled when the two tokens (the one before it and itself) stood together earlier in the same document; its
distance is to the last such place (Arora et al. 2023, Zoology, sec. 3.2: recall is most of what separates mixers on text).
What sparsity takes from far context shows at the large distances, and not in the mean over all tokens.

Shape letters: B = windows, T = tokens, V = vocabulary, C = documents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import BadInput
from ..fidelity import Interval, ratio_interval

EDGES = (1, 16, 64, 256, 1024)
"""Distances at which ranges begin."""


def reach(ids_BT: Tensor, doc_BT: Tensor | None = None) -> Tensor:
    """[B, T] int64: tokens back to the last earlier place of the same two tokens in the same document; 0 if there is none.

    The first token of a window or document has no token before it and gets 0.
    """
    doc_BT = torch.zeros_like(ids_BT) if doc_BT is None else doc_BT
    out = torch.zeros_like(ids_BT)
    for b, (ids, docs) in enumerate(zip(ids_BT.tolist(), doc_BT.tolist(), strict=True)):
        last: dict[tuple[int, int, int], int] = {}
        for t in range(1, len(ids)):
            if docs[t] != docs[t - 1]:
                continue
            pair = docs[t], ids[t - 1], ids[t]
            if pair in last:
                out[b, t] = t - last[pair]
            last[pair] = t
    return out


def by_distance(value_BT: Tensor, reach_BT: Tensor, doc_BT: Tensor, edges: Sequence[int] = EDGES) -> dict[str, Interval]:
    """Mean of a token value (loss, loss increase, hit) over each range of distances, with intervals over documents.

    Args:
        value_BT: of the token at each place. The first token of each document is left out.
        edges: rising distances >= 1; the last range has no end. "new" is everything that does not stand earlier.

    Returns:
        range -> interval; ranges without a token are left out.
    """
    if not edges or edges[0] < 1 or any(a >= b for a, b in zip(edges, edges[1:], strict=False)):
        raise BadInput(f"edges={list(edges)} must be rising distances from 1 on")
    inside = torch.zeros_like(doc_BT, dtype=torch.bool)
    inside[:, 1:] = doc_BT[:, 1:] == doc_BT[:, :-1]
    ends = [*edges[1:], 1 << 62]
    ranges = {"new": inside & (reach_BT == 0)}
    for low, high in zip(edges, ends, strict=True):
        ranges[f"{low}+" if high == ends[-1] else f"{low}-{high - 1}"] = inside & (reach_BT >= low) & (reach_BT < high)
    out = {}
    for name, here in ranges.items():
        if here.any():
            total_C = torch.zeros(int(doc_BT.max()) + 1, dtype=torch.float64).index_add_(0, doc_BT[here], value_BT[here].double())
            out[name] = ratio_interval(total_C, torch.bincount(doc_BT[here], minlength=len(total_C)))
    return out
