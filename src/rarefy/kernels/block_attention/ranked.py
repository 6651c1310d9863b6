"""Causal attention of each query to the keys that a cheap product ranks highest: scores, choice and attention in one pass.

Shape letters: B = batch, H = query heads, G = key heads (H is a multiple of G), T = queries, S = keys, D = head width, R = channels that rank.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import BadInput
from .. import native
from .decode import _begin, memory


def ranked_attention(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, low_BHTR: Tensor, low_BGSR: Tensor, keep_T: Tensor, *, scale: float
) -> Tensor:
    """[B, H, T, D]: softmax attention of query t, at position S - T + t, to its own key and the keep_T - 1 before it whose low_q . low_k are highest.

    Of equal scores the earlier key. Compiled for the CPU, without gradients; ask `available(q, k, v)` first. Scores of 16 queries are held at a
    time, and never a matrix of pairs.

    Args:
        low_BHTR, low_BGSR: float32, without NaN.
        keep_T: how many keys each query attends to, between 1 and those it sees.

    Raises:
        BadInput: counts out of range.
    """
    (B, H, T, D), (G, S) = q_BHTD.shape, k_BGSD.shape[1:3]
    if keep_T.numel() and not bool(((keep_T >= 1) & (keep_T <= torch.arange(S - T + 1, S + 1))).all()):
        raise BadInput(f"each query keeps 1 key to as many as it sees ({S - T + 1} .. {S}), not {int(keep_T.min())} .. {int(keep_T.max())}")
    from .ranked_loops import ROWS, ranked

    q, out, room = _begin(q_BHTD, scale)
    top, total, lse = (x.view(-1).numpy() for x in room)
    low_q = low_BHTR.detach().float().contiguous().view(B * H * T, -1).numpy()
    low_k = pad(low_BGSR.detach().float().flatten(0, 1).mT, (0, -S % 64)).contiguous().numpy()
    tiles = -(-T // ROWS)
    threads = torch.get_num_threads()
    items = np.concatenate([np.arange(B * H * tiles)[i::threads] for i in range(threads)])
    native.spread(ranked, len(items), items, low_q, low_k, keep_T.long().numpy(), q, *memory(k_BGSD), *memory(v_BGSD), (H, G, T, D, S, tiles),
                  out.view(-1).numpy(), top, total, lse, least=1)
    return out.to(q_BHTD.dtype)
