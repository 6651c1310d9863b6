"""CPU path: which calls it serves, and how tensors reach the compiled loops.

Shape letters as in __init__.py; P = distinct tiles, R = queries in a block, M = keys in a block.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import native
from .decode import memory, shared
from .mask import BlockMask


@cache
def _empty(ndim: int, kind: Any) -> np.ndarray:
    return np.empty((0,) * ndim, kind)


def mask_arrays(mask: BlockMask) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(blocks, partial, tiles [P, M, R]) for the loops; empty where there are no tiles."""
    if mask.partial is None or mask.tiles is None:
        return shared(mask.blocks).numpy(), _empty(4, np.int32), _empty(3, np.bool_)
    blocks, partial = mask.blocks, mask.partial
    if [blocks.stride(i) == 0 for i in (0, 1)] == [partial.stride(i) == 0 for i in (0, 1)]:
        blocks, partial = shared(blocks), shared(partial)
    return blocks.contiguous().numpy(), partial.contiguous().numpy(), mask.tiles.mT.contiguous().numpy()


def plan(q_BHTD: Tensor, k_BGSD: Tensor, mask: BlockMask, causal: bool) -> tuple[np.ndarray, tuple[int, ...]]:
    """(work items, sizes) as forward.forward takes them; items are dealt out in turn, so that each thread gets early and late queries."""
    B, H, T, _ = q_BHTD.shape
    G, S = k_BGSD.shape[1:3]
    lanes = min(64, mask.query_block)
    tiles = mask.blocks.shape[2] * (mask.query_block // lanes)
    threads = torch.get_num_threads()
    items = np.arange(B * H * tiles)
    if threads > 1:
        items = np.concatenate([items[i::threads] for i in range(threads)])
    return items, (B, H, G, T, S, mask.block, mask.query_block, lanes, int(causal), tiles)


def forward(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask: BlockMask, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """(out [B, H, T, D], lse [B, H, T] float32); for calls that tiles.path gives to this module."""
    from . import forward as single
    from . import tile

    B, H, T, D = q_BHTD.shape
    dtype = q_BHTD.dtype
    half = dtype == torch.bfloat16 and tile.PAIRS and D % 2 == 0
    if dtype == torch.bfloat16 and not half:
        q_BHTD, k_BGSD, v_BGSD = (x.detach().float() for x in (q_BHTD, k_BGSD, v_BGSD))
    out = torch.empty(B, H, T, D, dtype=torch.float32)
    lse = torch.empty(B, H, T, dtype=torch.float32)
    items, sizes = plan(q_BHTD, k_BGSD, mask, causal)
    k, ks = memory(k_BGSD, pairs=half)
    into = (out.view(-1, D).numpy(), lse.view(-1).numpy(), *mask_arrays(mask), sizes, scale)
    if half:
        from . import forward_half as paired

        q = memory(q_BHTD.detach().contiguous(), pairs=True)[0].reshape(B * H * T, D // 2)
        v_XSD = v_BGSD.detach().contiguous().view(torch.int16).flatten(0, 1).numpy().view(np.uint16)
        X, S = v_XSD.shape[:2]
        v_XZD = np.empty((X, -(-S // 2), D), np.uint32)
        native.spread(paired.pair_values, X, v_XSD, v_XZD, least=1)
        vs = (v_XZD[0].size * v_BGSD.shape[1], v_XZD[0].size, D)
        native.spread(paired.forward, len(items), items, q, k, ks, v_XZD.reshape(-1), vs, *into, least=1)
        return out.to(dtype), lse
    q = q_BHTD.detach().contiguous().view(B * H * T, D).numpy()
    native.spread(single.forward, len(items), items, q, k, ks, *memory(v_BGSD), *into, least=1)
    return out.to(dtype), lse


def backward(
    grad_BHTD: Tensor, grad_lse_BHT: Tensor, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, out_BHTD: Tensor, lse_BHT: Tensor,
    mask: BlockMask, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their dtype; half precision is worked on in float32."""
    from .backward import backward as run
    from .tile import W

    dtype = q_BHTD.dtype
    grad, q, k, v, out = (x.detach().float() for x in (grad_BHTD, q_BHTD, k_BGSD, v_BGSD, out_BHTD))
    grad, q = grad.contiguous(), q.contiguous()
    delta = (grad * out).sum(-1) - grad_lse_BHT
    B, G, S, D = k.shape
    _, sizes = plan(q, k, mask, causal)
    dq, (dk, dv) = torch.empty_like(q), torch.zeros(2, B, G, S, -(-D // W) * W)
    rows = (x.reshape(-1, D).numpy() for x in (q, grad))
    flat = (x.reshape(-1).numpy() for x in (lse_BHT, delta))
    native.spread(run, B * G, *rows, *flat, *memory(k), *memory(v), *mask_arrays(mask), sizes, scale, dq.view(-1, D).numpy(),
                  dk.view(-1).numpy(), dv.view(-1).numpy(), least=1)
    return dq.to(dtype), dk[..., :D].mul(math.log(2)).to(dtype), dv[..., :D].to(dtype)
