"""The k largest scores of each row, without sorting the row.

Shape letters: N = rows, F = units, K = kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gpu, native
from .reference import top_k_reference

__all__ = ["top_k", "top_k_reference"]

_BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def top_k(scores_NF: Tensor, k: int) -> Tensor:
    """Units of the k largest scores of each row: int64 [N, K], in no particular order.

    Of equal scores the lower index is chosen; 0.0 and -0.0 are equal, infinities are scores like others, and NaN counts as
    larger than all of them. The result does not follow gradients: gather the scores with it.

    Args:
        scores_NF: floats of any width. k: in 1..F.
    """
    scores_NF = scores_NF.detach()
    if torch.compiler.is_compiling():
        return top_k_reference(scores_NF, k)
    if gpu.serves(scores_NF):
        from .triton import top_k_rows

        return top_k_rows(scores_NF, k)
    return _loops(scores_NF, k) if native.serves(scores_NF, dtypes=tuple(_BITS)) else _torch(scores_NF, k)


def _torch(scores_NF: Tensor, k: int) -> Tensor:
    """By torch.topk, which leaves open which of equals it takes: rows where that matters are sorted."""
    top = scores_NF.topk(k, sorted=False)
    edge_N1 = top.values.amin(-1, keepdim=True)
    open_N = edge_N1.isnan()[:, 0] | ((scores_NF == edge_N1).sum(-1) > (top.values == edge_N1).sum(-1))
    if open_N.any():
        top.indices[open_N] = top_k_reference(scores_NF[open_N], k)
    return top.indices


def _loops(scores_NF: Tensor, k: int) -> Tensor:
    from .cpu import top_k_rows

    ints = _BITS[scores_NF.dtype]
    bits_NF, lowest = scores_NF.contiguous().view(ints), torch.iinfo(ints).min
    infinity = int(torch.tensor(torch.inf, dtype=scores_NF.dtype).view(ints))
    index_NK = torch.empty(len(bits_NF), k, dtype=torch.long)
    sound_N = torch.empty(len(bits_NF), dtype=torch.bool)
    native.spread(top_k_rows, len(bits_NF), bits_NF.numpy(), k, lowest, infinity, index_NK.numpy(), sound_N.numpy())
    if not sound_N.all():
        index_NK[~sound_N] = top_k_reference(scores_NF[~sound_N], k)
    return index_NK
