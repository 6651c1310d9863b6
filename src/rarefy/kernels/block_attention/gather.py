"""Plain torch: chosen key blocks are gathered a chunk of query blocks at a time, then an ordinary exact softmax.

Works everywhere, in any dtype, with autograd. Shape letters as in __init__.py; K = most key blocks of a query block
in the chunk, C = query blocks of the chunk, R = queries in a block, M = keys in a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

CHUNK_BYTES = 8 << 20
"""Gathered keys of a chunk: small enough for the last-level cache, large enough to amortise a kernel launch."""


def gather_blocks(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_BHQN: Tensor, *, block: int, query_block: int, scale: float,
    causal: bool, allowed: Any = None,
) -> Tensor:
    """See block_attention."""
    B, H, T, D = q_BHTD.shape
    G, S = k_BGSD.shape[1:3]
    Q, N = mask_BHQN.shape[2:]
    lead = (S - T) % query_block
    q_BHQRD = pad(q_BHTD, (0, 0, lead, Q * query_block - lead - T)).unflatten(2, (Q, query_block))
    k_XMD = pad(k_BGSD, (0, 0, 0, N * block - S)).reshape(B * G * N, block, D)
    v_XMD = pad(v_BGSD, (0, 0, 0, N * block - S)).reshape(B * G * N, block, D)
    group_H = torch.arange(H, device=q_BHTD.device) // (H // G)
    base_BH = (torch.arange(B, device=q_BHTD.device)[:, None] * G + group_H) * N
    count_Q = mask_BHQN.sum(-1).amax((0, 1)).tolist()
    per_block = 2 * B * H * block * D * q_BHTD.element_size()
    out, start = [], 0
    while start < Q:
        stop, most = start + 1, max(1, count_Q[start])
        while stop < Q and (stop + 1 - start) * max(most, count_Q[stop]) * per_block <= CHUNK_BYTES:
            most = max(most, count_Q[stop])
            stop += 1
        out.append(_chunk(q_BHQRD[:, :, start:stop], k_XMD, v_XMD, mask_BHQN[:, :, start:stop], base_BH, most,
                          (S - T) // query_block + start, S, block, query_block, scale, causal, allowed))
        start = stop
    return torch.cat(out, 2).flatten(2, 3)[:, :, lead : lead + T]


def _chunk(
    q_BHCRD: Tensor, k_XMD: Tensor, v_XMD: Tensor, mask_BHCN: Tensor, base_BH: Tensor, most: int, first: int, S: int,
    block: int, query_block: int, scale: float, causal: bool, allowed: Any,
) -> Tensor:
    if not (mask_BHCN.stride(0) or mask_BHCN.stride(1)):
        mask_BHCN = mask_BHCN[:1, :1]                # expanded: every head keeps the same, so one mask serves all
    chosen_BHCK, index_BHCK = mask_BHCN.to(torch.uint8).topk(most, -1)
    at = (base_BH[..., None, None] + index_BHCK).flatten()
    shape = (*base_BH.shape, index_BHCK.shape[2], most * block, -1)
    k, v = k_XMD.index_select(0, at).view(shape), v_XMD.index_select(0, at).view(shape)
    within_M = torch.arange(block, device=at.device)
    key_BHCS = (index_BHCK[..., None] * block + within_M).flatten(-2)
    there = chosen_BHCK.bool().repeat_interleave(block, -1) & (key_BHCS < S)
    C = q_BHCRD.shape[2]
    query_CR = (first + torch.arange(C, device=at.device))[:, None] * query_block + torch.arange(query_block, device=at.device)
    mask = there[..., None, :]
    if causal:
        mask = mask & (key_BHCS[..., None, :] <= query_CR[..., None])
    if allowed is not None:
        mask = mask & allowed(query_CR[..., None], key_BHCS[..., None, :])
    # [B*H, C] as batch and heads; a query without keys comes out as zeros
    out = scaled_dot_product_attention(q_BHCRD.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=mask.flatten(0, 1), scale=scale)
    return out.view(q_BHCRD.shape)
