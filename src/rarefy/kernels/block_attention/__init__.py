"""Attention over chosen key blocks: exact softmax over what is chosen, nothing computed for the rest.

Shape letters: B = batch, H = query heads, G = key heads (H is a multiple of G), T = queries, S = keys, D = head width,
Q = query blocks, N = key blocks. Query t stands at position S - T + t; query blocks are cut at multiples of
`query_block` of that position, key blocks at multiples of `block`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import BadInput
from .bounds import page_scores
from .decode import available, decode_pages
from .gather import gather_blocks
from .reference import block_attention_reference, token_mask

Allowed = Callable[[Tensor, Tensor], Tensor]
"""(query positions [...], key positions [...]) -> bool, for patterns finer than a block."""

ROWS = 256
"""Queries whose dense scores are held at once where every query chooses for itself."""

__all__ = ["Allowed", "available", "block_attention", "block_attention_reference", "blocks_of", "page_scores", "token_mask"]


def blocks_of(T: int, S: int, block: int, query_block: int) -> tuple[int, int]:
    """(Q, N): how many query and key blocks T queries at the end of S keys fall into."""
    first = (S - T) // query_block
    return (-(-S // query_block) - first if T else 0), -(-S // block)


def block_attention(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_BHQN: Tensor, *, block: int, query_block: int, scale: float,
    causal: bool = True, allowed: Allowed | None = None,
) -> Tensor:
    """[B, H, T, D]. A query left without any key gives zeros. Differentiable in q, k and v.

    Raises:
        BadInput: shapes that do not fit, tensors on different devices.
    """
    B, H, T, D = q_BHTD.shape
    G, S = k_BGSD.shape[1:3]
    if H % G or k_BGSD.shape != v_BGSD.shape or k_BGSD.shape[0] != B or k_BGSD.shape[-1] != D:
        raise BadInput(f"queries {list(q_BHTD.shape)} do not fit keys {list(k_BGSD.shape)} and values {list(v_BGSD.shape)}")
    if T > S:
        raise BadInput(f"{T} queries but only {S} keys: each query's own key must be among them")
    if not q_BHTD.device == k_BGSD.device == v_BGSD.device == mask_BHQN.device:
        raise BadInput(f"queries are on {q_BHTD.device}, keys on {k_BGSD.device}, the mask on {mask_BHQN.device}: move them to one device")
    if mask_BHQN.shape != (B, H, *blocks_of(T, S, block, query_block)):
        need = [B, H, *blocks_of(T, S, block, query_block)]
        raise BadInput(f"the block mask has shape {list(mask_BHQN.shape)}; {T} queries and {S} keys need {need}")
    if not q_BHTD.numel():
        return torch.zeros_like(q_BHTD)
    if T == 1 and allowed is None and available(q_BHTD, k_BGSD, v_BGSD):
        return decode_pages(q_BHTD, k_BGSD, v_BGSD, mask_BHQN[:, :, 0], block, scale)
    if query_block == 1 and T > 1:
        # Each query with keys of its own: gathering them moves more bytes than a masked dense product costs.
        return _by_rows(q_BHTD, k_BGSD, v_BGSD, mask_BHQN, block, scale, causal, allowed)
    return gather_blocks(
        q_BHTD, k_BGSD, v_BGSD, mask_BHQN, block=block, query_block=query_block, scale=scale, causal=causal, allowed=allowed
    )


def _by_rows(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_BHTN: Tensor, block: int, scale: float, causal: bool, allowed: Allowed | None
) -> Tensor:
    """The dense definition, some rows at a time; causal rows leave out the keys that come after all of them."""
    T, S = q_BHTD.shape[2], k_BGSD.shape[2]
    if not causal:            # rows could not be told their positions: a query stands where its keys end
        return block_attention_reference(
            q_BHTD, k_BGSD, v_BGSD, mask_BHTN, block=block, query_block=1, scale=scale, causal=False, allowed=allowed
        )
    out = []
    for start in range(0, T, ROWS):
        stop = min(T, start + ROWS)
        seen = S - T + stop
        out.append(block_attention_reference(
            q_BHTD[:, :, start:stop], k_BGSD[:, :, :seen], v_BGSD[:, :, :seen], mask_BHTN[:, :, start:stop, : -(-seen // block)],
            block=block, query_block=1, scale=scale, causal=True, allowed=allowed,
        ))
    return torch.cat(out, 2)
