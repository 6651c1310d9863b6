"""Attention to whole columns and whole diagonals of a causal prefill, without the matrix of pairs.

Shape letters as in __init__.py; X = B * H heads, E = S and 64 places before and behind.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import BadInput
from .. import native
from .decode import available, memory
from .mask import blocks_of
from .tokens import check_shapes

DENSE = 24
"""Distances of 64 from which on their band is worked on by key blocks and not one by one."""
_SIDE = 64


def line_pairs(column_BHS: Tensor, back_BHS: Tensor, T: int) -> Tensor:
    """[B, H] int64: pairs of T queries at the end of S keys that lie in a column or on a diagonal, each once.

    Args:
        column_BHS: bool, keys that every query from their position on attends to.
        back_BHS: bool, distances at which every query attends to a key, if there is one.
    """
    S = column_BHS.shape[-1]
    at_S = torch.arange(S, device=column_BHS.device)
    seen_S = (S - at_S).clamp_max(T)                               # of a column at s, and of a diagonal at distance s
    before = pad(back_BHS.long().cumsum(-1), (1, 0))               # distances below
    both_BHS = before[..., S - at_S] - before[..., (S - T - at_S).clamp_min(0)]
    return (seen_S * column_BHS).sum(-1) + (seen_S * back_BHS).sum(-1) - (both_BHS * column_BHS).sum(-1)


def line_attention(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, column_BHS: Tensor, back_BHS: Tensor, *, scale: float) -> Tensor:
    """[B, H, T, D]: causal softmax attention to the pairs in a column or on a diagonal; zeros where a query has none.

    Time and memory follow the pairs, not T times S. Compiled for float32 and bfloat16 on the CPU (worked on in float32) without
    gradients: `available(q, k, v)` says where; elsewhere, a mask of pairs is made.

    Args:
        column_BHS, back_BHS: as in `line_pairs`; B and H may be 1 where all share.

    Raises:
        BadInput: shapes that do not fit.
    """
    check_shapes(q_BHTD, k_BGSD, v_BGSD)
    (B, H, T, D), (G, S) = q_BHTD.shape, k_BGSD.shape[1:3]
    for what, x in (("columns", column_BHS), ("distances", back_BHS)):
        if x.dtype != torch.bool or x.ndim != 3 or x.shape[0] not in (1, B) or x.shape[1] not in (1, H) or x.shape[2] != S:
            raise BadInput(f"{what} must be bool [{B}, {H}, {S}], not {x.dtype} {list(x.shape)}")
    if T > S:
        raise BadInput(f"{T} queries but only {S} keys: each query's own key must be among them")
    column, back = column_BHS.expand(B, H, S), back_BHS.expand(B, H, S)
    if not available(q_BHTD, k_BGSD, v_BGSD) or scale <= 0 or not q_BHTD.numel():
        return _masked(q_BHTD, k_BGSD, v_BGSD, column, back, scale)
    from .line_loops import lines

    q, k, v = (x.detach().float() for x in (q_BHTD, k_BGSD, v_BGSD))
    group_BH = torch.arange(B)[:, None] * G + torch.arange(H) // (H // G)
    which = column.nonzero()
    rows = group_BH[which[:, 0], which[:, 1]] * S + which[:, 2]
    kc, vc = (x.reshape(-1, D).index_select(0, rows).view(-1) for x in (k, v))
    band = pad(back, (0, -S % _SIDE)).unflatten(-1, (-1, _SIDE))
    dense = band.sum(-1) >= DENSE
    banded = (band & dense[..., None]).flatten(-2)[..., :S]
    single = (back & ~banded).nonzero()
    kt, vt = (pad(x.mT, (_SIDE, _SIDE)).reshape(-1) if len(single) else torch.zeros(1) for x in (k, v))
    out, lse = torch.empty(B, H, T, D), torch.empty(B, H, T)
    tiles = blocks_of(T, S, _SIDE, _SIDE)[0]
    threads = torch.get_num_threads()
    items = np.concatenate([np.arange(B * H * tiles)[i::threads] for i in range(threads)])
    native.spread(
        lines, len(items), items, q.reshape(-1, D).numpy(), *memory(k), *memory(v), _starts(column), which[:, 2].contiguous().numpy(),
        kc.numpy(), vc.numpy(), dense.flatten(0, 1).numpy(), _open(banded, False), _open(~column, True),
        _starts(back & ~banded), single[:, 2].contiguous().numpy(), kt.numpy(), vt.numpy(), (B, H, G, T, S, tiles), scale,
        out.view(-1, D).numpy(), lse.view(-1).numpy(), least=1)
    return out.to(q_BHTD.dtype)


def _starts(chosen_BHS: Tensor) -> np.ndarray:
    """[X + 1] where each head's places begin among those of all."""
    return pad(chosen_BHS.sum(-1).flatten().cumsum(0), (1, 0)).numpy()


def _open(keep_BHS: Tensor, behind: bool) -> np.ndarray:
    """[X, E] 0 where kept, -inf elsewhere and before the first; behind the last place 0 with `behind`, lest all be -inf there."""
    less = torch.zeros(keep_BHS.shape).masked_fill(~keep_BHS, -torch.inf)
    return pad(pad(less, (_SIDE, 0), value=-torch.inf), (0, _SIDE), value=0.0 if behind else -torch.inf).flatten(0, 1).contiguous().numpy()


def _masked(q: Tensor, k: Tensor, v: Tensor, column_BHS: Tensor, back_BHS: Tensor, scale: float) -> Tensor:
    """The definition, from all pairs."""
    from .softmax import attend

    H, T, S = q.shape[1], q.shape[2], k.shape[2]
    back_TS = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)
    keep = (column_BHS[:, :, None] | back_BHS[:, :, back_TS.clamp_min(0)]) & (back_TS >= 0)
    return attend(q, k.repeat_interleave(H // k.shape[1], 1), v.repeat_interleave(H // v.shape[1], 1), keep, scale)[0]
