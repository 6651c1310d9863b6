"""The definition: a full score matrix with unchosen pairs at minus infinity.

Shape letters as in __init__.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def token_mask(mask_BHQN: Tensor, T: int, S: int, *, block: int, query_block: int, causal: bool, allowed: Any = None) -> Tensor:
    """[B, H, T, S] bool: the pairs that a block mask, causality and a finer pattern leave."""
    at_T = torch.arange(S - T, S, device=mask_BHQN.device)
    at_S = torch.arange(S, device=mask_BHQN.device)
    row_T = at_T // query_block - (S - T) // query_block
    mask = mask_BHQN[:, :, row_T][..., at_S // block]
    if causal:
        mask = mask & (at_S <= at_T[:, None])
    if allowed is not None:
        mask = mask & allowed(at_T[:, None], at_S)
    return mask


def block_attention_reference(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_BHQN: Tensor, *, block: int, query_block: int, scale: float,
    causal: bool = True, allowed: Any = None,
) -> Tensor:
    """softmax(q k^T * scale, over the pairs of `token_mask`) v; zeros for a query without keys."""
    groups = q_BHTD.shape[1] // k_BGSD.shape[1]
    k, v = k_BGSD.repeat_interleave(groups, 1), v_BGSD.repeat_interleave(groups, 1)
    T, S = q_BHTD.shape[2], k.shape[2]
    mask = token_mask(mask_BHQN, T, S, block=block, query_block=query_block, causal=causal, allowed=allowed)
    score = (q_BHTD @ k.mT) * scale
    score = score.masked_fill(~mask, torch.finfo(score.dtype).min)
    weight = score.float().softmax(-1).to(score.dtype) if score.dtype in (torch.bfloat16, torch.float16) else score.softmax(-1)
    return torch.where(mask, weight, weight.new_zeros(())) @ v
