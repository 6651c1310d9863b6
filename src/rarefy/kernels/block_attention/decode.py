"""CPU decoding: one query a head reads its chosen pages, or each query its own keys, in place; float32 and bfloat16, no gather.

Shape letters as in __init__.py; K = places in a query's list.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .. import native


def available(*tensors: Tensor) -> bool:
    """Whether this path serves these tensors: float32 or bfloat16 on the CPU, no gradient wanted, numba installed."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return native.serves(*tensors, dtypes=(torch.float32, torch.bfloat16))


def bits(x: Tensor) -> np.ndarray:
    """The numbers as numba takes them: bfloat16 as uint16."""
    x = x.detach()
    return x.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else x.numpy()


def memory(x_BGSD: Tensor, pairs: bool = False) -> tuple[np.ndarray, tuple[int, ...]]:
    """(flat memory, strides over B, G, S), where it lies if rows are contiguous; with `pairs` two bfloat16 neighbours as a uint32."""
    ratio = 2 if pairs else 1
    fits = x_BGSD.stride(-1) == 1 and not any(n % ratio for n in (*x_BGSD.stride()[:3], x_BGSD.storage_offset()))
    x = x_BGSD.detach() if fits else x_BGSD.detach().clone(memory_format=torch.contiguous_format)       # contiguous() would keep an odd offset
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    flat = x.as_strided((extent,), (1,))
    strides = tuple(s // ratio for s in x.stride()[:3])
    return (flat.view(torch.int32).numpy().view(np.uint32) if pairs else bits(flat)), strides


def _begin(q_BHTD: Tensor, scale: float) -> tuple[np.ndarray, Tensor, Tensor]:
    """(q in base-2 logits, room for outputs, room for three numbers a query)."""
    q = q_BHTD.detach().float().mul(scale * math.log2(math.e)).contiguous()
    return q.view(-1).numpy(), torch.empty(q.shape), torch.empty(3, *q.shape[:3])


def decode_pages(q_BH1D: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_BHN: Tensor, block: int, scale: float) -> tuple[Tensor, Tensor]:
    """([B, H, 1, D], lse [B, H, 1] float32) for one query a head, which sees every key of its chosen pages."""
    from .loops import pages

    B, H, _, D = q_BH1D.shape
    G, S = k_BGSD.shape[1:3]
    q, out, room = _begin(q_BH1D, scale)
    top, total, lse = (x.view(-1).numpy() for x in room)
    native.spread(pages, B * G, q, *memory(k_BGSD), *memory(v_BGSD), mask_BHN.contiguous().numpy(), block, (H, G, S, D),
                  out.view(-1).numpy(), top, total, lse, least=1)
    return out.to(q_BH1D.dtype), room[2]


def decode_tokens(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, index_BHTK: Tensor, scale: float, bias_BHTK: Tensor | None
) -> tuple[Tensor, Tensor]:
    """([B, H, T, D], lse [B, H, T] float32) of each query over its listed keys; see token_attention."""
    from .loops import tokens

    B, H, T, D = q_BHTD.shape
    q, out, room = _begin(q_BHTD, scale)
    top, total, lse = (x.view(-1).numpy() for x in room)
    bias = np.empty((1, 1, 1, 0), np.float32) if bias_BHTK is None else bias_BHTK.detach().float().contiguous().numpy()
    native.spread(tokens, B * H * T, q, *memory(k_BGSD), *memory(v_BGSD), index_BHTK.long().contiguous().numpy(), bias,
                  (H, k_BGSD.shape[1], T, D), out.view(-1).numpy(), top, total, lse, least=1)
    return out.to(q_BHTD.dtype), room[2]


def decode_rows(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, keep_BHTN: Tensor, block: int, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """([B, H, T, D], lse [B, H, T] float32) of each query over the key blocks that the mask keeps, which causal ones take up to their own key."""
    from .loops import rows

    B, H, T, D = q_BHTD.shape
    q, out, room = _begin(q_BHTD, scale)
    top, total, lse = (x.view(-1).numpy() for x in room)
    native.spread(rows, B * H * T, q, *memory(k_BGSD), *memory(v_BGSD), shared(keep_BHTN).numpy(), block, causal, (H, *k_BGSD.shape[1:3], T, D),
                  out.view(-1).numpy(), top, total, lse, least=1)
    return out.to(q_BHTD.dtype), room[2]


def shared(x: Tensor) -> Tensor:
    """Dimensions B and H that were expanded, as 1."""
    for i in (0, 1):
        if x.stride(i) == 0 and x.shape[i] > 1:
            x = x.narrow(i, 0, 1)
    return x.contiguous()
