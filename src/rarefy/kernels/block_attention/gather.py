"""Plain torch: chosen key blocks are gathered a chunk of query blocks at a time, then an ordinary exact softmax.

Works everywhere, in any dtype, with autograd. Shape letters as in __init__.py; K = most key blocks of a query block
in the chunk, C = query blocks of the chunk, R = queries in a block, M = keys in a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ..native import transformed
from .mask import BlockMask, as_mask, ask, by_head
from .reference import block_attention_reference
from .softmax import attend

CHUNK_BYTES = 8 << 20
"""Gathered keys of a chunk: small enough for the last-level cache, large enough to amortise a kernel launch."""
ROWS = 256
"""Queries whose dense scores are held at once where every query chooses for itself."""


def gather_blocks(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask: Any, *, block: int, query_block: int, scale: float,
    causal: bool, allowed: Any = None, return_lse: bool = False,
) -> Any:
    """See block_attention."""
    mask = as_mask(mask, block, query_block)
    B, H, T, D = q_BHTD.shape
    G, S = k_BGSD.shape[1:3]
    Q, N = mask.blocks.shape[2:]
    lead = (S - T) % query_block
    q_BHQRD = pad(q_BHTD, (0, 0, lead, Q * query_block - lead - T)).unflatten(2, (Q, query_block))
    k_XMD = pad(k_BGSD, (0, 0, 0, N * block - S)).reshape(B * G * N, block, D)
    v_XMD = pad(v_BGSD, (0, 0, 0, N * block - S)).reshape(B * G * N, block, D)
    group_H = torch.arange(H, device=q_BHTD.device) // (H // G)
    base_BH = (torch.arange(B, device=q_BHTD.device)[:, None] * G + group_H) * N
    count_Q = mask.blocks.sum(-1).amax((0, 1)).tolist()
    per_block = 2 * B * H * block * D * q_BHTD.element_size()
    out, lse, start = [], [], 0
    while start < Q:
        stop, most = start + 1, max(1, count_Q[start])
        while stop < Q and (stop + 1 - start) * max(most, count_Q[stop]) * per_block <= CHUNK_BYTES:
            most = max(most, count_Q[stop])
            stop += 1
        part = _chunk(q_BHQRD[:, :, start:stop], k_XMD, v_XMD, mask, base_BH, most, start, (S - T) // query_block, S, scale, causal,
                      allowed, return_lse)
        out.append(part[0])
        lse.append(part[1])
        start = stop
    whole = torch.cat(out, 2).flatten(2, 3)[:, :, lead : lead + T]
    return (whole, torch.cat(lse, 2).flatten(2, 3)[:, :, lead : lead + T]) if return_lse else whole


def _chunk(
    q_BHCRD: Tensor, k_XMD: Tensor, v_XMD: Tensor, mask: BlockMask, base_BH: Tensor, most: int, start: int, first: int, S: int,
    scale: float, causal: bool, allowed: Any, return_lse: bool,
) -> tuple[Tensor, Tensor]:
    B, H, C, R, D = q_BHCRD.shape
    M = mask.block
    blocks = mask.blocks[:, :, start : start + C]
    partial = None if mask.partial is None else mask.partial[:, :, start : start + C]
    if not any(x.stride(0) or x.stride(1) for x in (blocks, partial) if x is not None) and not (allowed is not None and by_head(allowed)):
        blocks, partial = blocks[:1, :1], None if partial is None else partial[:1, :1]       # expanded: one mask serves every head
    chosen, index = blocks.to(torch.uint8).topk(most, -1)
    index = torch.where(chosen.bool(), index, index[..., :1])       # places left over: no block is read that its row did not choose
    at = (base_BH[..., None, None] + index).flatten()
    shape = (B, H, C, most * M, D)
    k, v = k_XMD.index_select(0, at).view(shape), v_XMD.index_select(0, at).view(shape)
    key = (index[..., None] * M + torch.arange(M, device=at.device)).flatten(-2)
    query_CR = (first + start + torch.arange(C, device=at.device))[:, None] * R + torch.arange(R, device=at.device)
    keep = (chosen.bool().repeat_interleave(M, -1) & (key < S))[..., None, :]
    if causal:
        keep = keep & (key[..., None, :] <= query_CR[..., None])
    if allowed is not None:
        asked = query_CR.clamp_max(S - 1)[..., None], key.clamp_max(S - 1)[..., None, :]
        keep = keep & ask(allowed, *asked, torch.arange(H, device=at.device)[:, None, None, None])
    if partial is not None and mask.tiles is not None:
        number = partial.expand(index.shape[:3] + partial.shape[3:]).gather(-1, index)
        inside = mask.tiles[number.clamp_min(0)] | (number < 0)[..., None, None]                      # [b, h, C, K, R, M]
        keep = keep & inside.transpose(3, 4).flatten(-2)
    if return_lse or transformed():                        # torch's own attention has no forward-mode derivative
        return attend(q_BHCRD, k, v, keep, scale)
    # [B * H, C] as batch and heads; a query without keys comes out as zeros
    heads = keep.shape[:2] if keep.shape[:2].numel() == 1 else (B, H)
    flat = keep.expand(*heads, C, R, most * M).flatten(0, 1)
    out = scaled_dot_product_attention(q_BHCRD.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=flat, scale=scale)
    return out.view(q_BHCRD.shape), q_BHCRD.new_empty(0)


def by_rows(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask: BlockMask, *, block: int, query_block: int, scale: float, causal: bool,
    allowed: Any = None, return_lse: bool = False,
) -> Any:
    """The dense definition for single queries, some at a time; causal ones leave out the keys that come after all of them.

    Gathering keys for each query would move more bytes than a masked dense product costs.
    """
    how = {"block": block, "query_block": 1, "scale": scale, "causal": causal, "allowed": allowed}
    if not causal:            # rows could not be told their positions: a query stands where its keys end
        return block_attention_reference(q_BHTD, k_BGSD, v_BGSD, mask, return_lse=return_lse, **how)
    T, S = q_BHTD.shape[2], k_BGSD.shape[2]
    parts = []
    for start in range(0, T, ROWS):
        stop = min(T, start + ROWS)
        seen = S - T + stop
        cut = (slice(None), slice(None), slice(start, stop), slice(-(-seen // block)))
        part = BlockMask(mask.blocks[cut], None if mask.partial is None else mask.partial[cut], mask.tiles, block, 1)
        parts.append(block_attention_reference(
            q_BHTD[:, :, start:stop], k_BGSD[:, :, :seen], v_BGSD[:, :, :seen], part, return_lse=True, **how))
    out, lse = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    return (out, lse) if return_lse else out
