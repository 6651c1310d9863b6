"""The definition: a full score matrix with unchosen pairs at minus infinity.

Shape letters as in __init__.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .mask import as_mask, ask
from .softmax import attend


def token_mask(
    mask: Any, T: int, S: int, *, block: int, query_block: int, causal: bool, allowed: Any = None, heads: int | None = None
) -> Tensor:
    """[b, H, T, S] bool: the pairs that a block mask, causality and a finer pattern leave; b and H may be 1 where all share.

    Args:
        heads: H, for predicates that take the head.
    """
    found = as_mask(mask, block, query_block)
    pairs = found.pairs(T, S, causal)
    if allowed is not None:
        head_H = torch.arange(pairs.shape[1] if heads is None else heads, device=pairs.device)
        at_T, at_S = torch.arange(S - T, S, device=pairs.device), torch.arange(S, device=pairs.device)
        pairs = pairs & ask(allowed, at_T[:, None], at_S, head_H[:, None, None])
    return pairs


def block_attention_reference(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask: Any, *, block: int, query_block: int, scale: float,
    causal: bool = True, allowed: Any = None, return_lse: bool = False,
) -> Any:
    """softmax(q k^T * scale, over the pairs of `token_mask`) v; zeros and lse -inf for a query without keys."""
    groups = q_BHTD.shape[1] // k_BGSD.shape[1]
    k, v = k_BGSD.repeat_interleave(groups, 1), v_BGSD.repeat_interleave(groups, 1)
    T, S = q_BHTD.shape[2], k.shape[2]
    keep = token_mask(mask, T, S, block=block, query_block=query_block, causal=causal, allowed=allowed, heads=q_BHTD.shape[1])
    out, lse = attend(q_BHTD, k, v, keep, scale)
    return (out, lse) if return_lse else out
