"""Attention over chosen key blocks: exact softmax over what is chosen, nothing computed for the rest.

Shape letters: B = batch, H = query heads, G = key heads (H is a multiple of G), T = queries, S = keys, D = head width,
Q = query blocks, N = key blocks. Query t stands at position S - T + t; query blocks are cut at multiples of
`query_block` of that position, key blocks at multiples of `block`.

`block_attention` takes a mask of blocks, `token_attention` a list of keys for each query, `line_attention` whole columns and diagonals,
`Paged` a batch of decoding requests over one pool of pages, `Irregular` queries and keys of which some are dropped, or sorted by bucket;
`merge` joins (out, lse) over disjoint keys.

After FlashAttention (Dao et al. 2022, arXiv 2205.14135: tiles, running maximum and sum, recomputation in the backward pass, a block
mask), FlashInfer (Ye et al. 2025, arXiv 2501.01005: partial states that merge exactly) and sparse causal flash attention (Pagliardini et
al. 2023, arXiv 2306.01160: pairs inside a tile masked one by one).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import BadInput
from .. import gpu
from . import tiles
from .bounds import highest, page_meta, page_scores, top_pages
from .decode import available, decode_pages, decode_rows
from .gather import by_rows, gather_blocks
from .lines import line_attention, line_pairs
from .mask import Allowed, BlockMask, as_mask, blocks_of
from .reference import block_attention_reference, token_mask
from .softmax import merge
from .tokens import check_shapes, key_lists, token_attention

__all__ = [
    "Allowed", "BlockMask", "Irregular", "Paged", "available", "block_attention", "block_attention_reference", "blocks_of", "highest",
    "key_lists", "line_attention", "line_pairs", "merge", "page_meta", "page_scores", "paged_attention", "token_attention", "token_mask", "top_pages",
]


def block_attention(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask: Tensor | BlockMask, *, block: int, query_block: int, scale: float,
    causal: bool = True, allowed: Allowed | None = None, return_lse: bool = False,
) -> Any:
    """[B, H, T, D]; with `return_lse` also lse [B, H, T], the logarithm of the sum of exp(logit) over a query's keys.

    A query left without any key gives zeros and lse -inf. Differentiable in q, k and v.

    Args:
        mask: [B, H, Q, N] bool (B and H may be 1 where all share), or a BlockMask.
        allowed: pairs inside chosen blocks: (query position, key position[, head]) -> bool, broadcasting.

    Raises:
        BadInput: shapes that do not fit, tensors on different devices.
    """
    check_shapes(q_BHTD, k_BGSD, v_BGSD)
    (B, H, T, _), S = q_BHTD.shape, k_BGSD.shape[2]
    if T > S:
        raise BadInput(f"{T} queries but only {S} keys: each query's own key must be among them")
    found = as_mask(mask, block, query_block)
    if found.blocks.device != q_BHTD.device:
        raise BadInput(f"queries are on {q_BHTD.device}, the mask on {found.blocks.device}: move them to one device")
    need = (B, H, *blocks_of(T, S, block, query_block))
    b, h, *rest = found.blocks.shape
    if b not in (1, B) or h not in (1, H) or tuple(rest) != need[2:]:
        raise BadInput(f"the block mask has shape {list(found.blocks.shape)}; {T} queries and {S} keys need {list(need)}")
    if not q_BHTD.numel():
        wide = torch.promote_types(q_BHTD.dtype, torch.float32)
        return (q_BHTD * 0, q_BHTD.new_zeros((B, H, T), dtype=wide)) if return_lse else q_BHTD * 0       # with a graph, if there is one
    found = BlockMask(found.blocks.expand(need), None if found.partial is None else found.partial.expand(need), found.tiles, block, query_block)
    if T == 1 and allowed is None and found.partial is None and _one_query(q_BHTD, k_BGSD, v_BGSD):
        out, lse = _decode(q_BHTD, k_BGSD, v_BGSD, found.blocks[:, :, 0], block, scale)
        return (out, lse) if return_lse else out
    tiled = tiles.path(q_BHTD, k_BGSD, v_BGSD, block, query_block, scale)
    if tiled is not None and (allowed is None or found.partial is None):
        if allowed is not None:
            found = BlockMask.of(found.blocks, allowed, T, S, block=block, query_block=query_block, heads=H)
        out, lse = tiles.attend(tiled, q_BHTD, k_BGSD, v_BGSD, found, scale, causal)
        return (out, lse) if return_lse else out
    if query_block == 1 and T > 1 and allowed is None and found.partial is None and available(q_BHTD, k_BGSD, v_BGSD):
        out, lse = decode_rows(q_BHTD, k_BGSD, v_BGSD, found.blocks, block, scale, causal)
        return (out, lse) if return_lse else out
    path = by_rows if query_block == 1 and T > 1 else gather_blocks
    how = {"block": block, "query_block": query_block, "scale": scale, "causal": causal, "allowed": allowed, "return_lse": return_lse}
    return path(q_BHTD, k_BGSD, v_BGSD, found, **how)


def _one_query(*tensors: Tensor) -> bool:
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return available(*tensors) or (gpu.serves(*tensors, dtypes=tiles.HALVES) and not wanted)


def _decode(q: Tensor, k: Tensor, v: Tensor, mask_BHN: Tensor, block: int, scale: float) -> tuple[Tensor, Tensor]:
    if gpu.serves(q, k, v, dtypes=tiles.HALVES):
        from .triton import decode_pages as on_gpu

        return on_gpu(q, k, v, mask_BHN, block, scale)
    return decode_pages(q, k, v, mask_BHN, block, scale)


from .irregular import Irregular  # noqa: E402  (both call block_attention)
from .paged import Paged, paged_attention  # noqa: E402
