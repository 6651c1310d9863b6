"""Attention of each query to its own list of keys.

Shape letters: B = batch, H = query heads, G = key heads (H is a multiple of G), T = queries, S = keys, D = head width,
K = places in a query's list.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import BadInput
from .decode import available, decode_tokens
from .softmax import attend

CHUNK_BYTES = 8 << 20
"""Keys and values gathered at a time."""


def token_attention(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, index_BHTK: Tensor, *, scale: float, bias_BHTK: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """[B, H, T, D]: softmax(q k^T scale + bias) v over the listed keys; with `return_lse` also lse [B, H, T].

    A key listed twice counts twice (samples drawn with replacement); index -1 is no key, and so is a bias of -inf. A query without any
    gives zeros and -inf. Differentiable in q, k, v and bias.

    Args:
        index_BHTK: whole numbers in -1 .. S - 1; dimensions B, H and T may be 1 where all share.
        bias_BHTK: added to the logit (the logarithm of an importance weight); broadcasts to the index.

    Raises:
        BadInput: shapes that do not fit, an index that is no key, tensors on different devices.
    """
    check_shapes(q_BHTD, k_BGSD, v_BGSD)
    B, H, T, D = q_BHTD.shape
    G, S = k_BGSD.shape[1:3]
    unfit = index_BHTK.is_floating_point() or index_BHTK.dtype == torch.bool or index_BHTK.ndim != 4
    if unfit or any(n not in (1, m) for n, m in zip(index_BHTK.shape, (B, H, T), strict=False)):
        raise BadInput(f"index must be whole numbers [{B}, {H}, {T}, K], not {index_BHTK.dtype} {list(index_BHTK.shape)}")
    if index_BHTK.device != q_BHTD.device:
        raise BadInput(f"queries are on {q_BHTD.device}, the index on {index_BHTK.device}: move them to one device")
    if index_BHTK.numel() and not -1 <= int(index_BHTK.min()) <= int(index_BHTK.max()) < S:
        raise BadInput(f"index goes from {int(index_BHTK.min())} to {int(index_BHTK.max())}; there are {S} keys, and -1 is no key")
    index = index_BHTK.long().expand(B, H, T, -1)
    K = index.shape[-1]
    bias = None
    if bias_BHTK is not None:
        if bias_BHTK.ndim != 4 or any(n not in (1, m) for n, m in zip(bias_BHTK.shape, (B, H, T, K), strict=True)):
            raise BadInput(f"bias {list(bias_BHTK.shape)} must be [{B}, {H}, {T}, {K}], where any dimension may be 1")
        bias = bias_BHTK.expand(B, H, T, K)
    if not q_BHTD.numel() or not K or not S:
        out, lse = torch.zeros_like(q_BHTD), q_BHTD.new_full((B, H, T), -torch.inf, dtype=torch.promote_types(q_BHTD.dtype, torch.float32))
        return (out, lse) if return_lse else out
    if available(q_BHTD, k_BGSD, v_BGSD) and not (bias is not None and torch.is_grad_enabled() and bias.requires_grad):
        out, lse = decode_tokens(q_BHTD, k_BGSD, v_BGSD, index_BHTK, scale, bias)
        return (out, lse) if return_lse else out
    step = max(1, CHUNK_BYTES // (2 * B * H * K * D * q_BHTD.element_size()))
    base_BH = (torch.arange(B, device=index.device)[:, None] * G + torch.arange(H, device=index.device) // (H // G)) * S
    k_XD, v_XD = k_BGSD.reshape(-1, D), v_BGSD.reshape(-1, D)
    parts = []
    for start in range(0, T, step):
        cut = slice(start, start + step)
        at = index[:, :, cut]
        rows = (base_BH[..., None, None] + at.clamp_min(0)).flatten()
        k, v = k_XD.index_select(0, rows).view(*at.shape, D), v_XD.index_select(0, rows).view(*at.shape, D)
        more = None if bias is None else bias[:, :, cut, None]
        out, lse = attend(q_BHTD[:, :, cut, None], k, v, (at >= 0)[..., None, :], scale, more)
        parts.append((out[..., 0, :], lse[..., 0]))
    out, lse = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    return (out, lse) if return_lse else out


def check_shapes(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> None:
    """Raise BadInput where queries, keys and values do not belong together."""
    if not q_BHTD.ndim == k_BGSD.ndim == v_BGSD.ndim == 4:
        raise BadInput(f"queries {list(q_BHTD.shape)}, keys {list(k_BGSD.shape)} and values {list(v_BGSD.shape)} need four dims, as [B, H, T, D]")
    B, H, _, D = q_BHTD.shape
    if not k_BGSD.shape[1] or H % k_BGSD.shape[1] or k_BGSD.shape != v_BGSD.shape or k_BGSD.shape[0] != B or k_BGSD.shape[-1] != D:
        raise BadInput(f"queries {list(q_BHTD.shape)} do not fit keys {list(k_BGSD.shape)} and values {list(v_BGSD.shape)}")
    if not q_BHTD.device == k_BGSD.device == v_BGSD.device:
        raise BadInput(f"queries are on {q_BHTD.device}, keys on {k_BGSD.device}, values on {v_BGSD.device}: move them to one device")
    if not q_BHTD.is_floating_point() or (not q_BHTD.dtype == k_BGSD.dtype == v_BGSD.dtype and not torch.is_autocast_enabled(q_BHTD.device.type)):
        raise BadInput(f"queries are {q_BHTD.dtype}, keys {k_BGSD.dtype}, values {v_BGSD.dtype}: give all in one dtype of floating point")


def key_lists(mask_BHTS: Tensor) -> Tensor:
    """[B, H, T, K] key numbers of a mask, -1 where a query has fewer than the most; what `token_attention` reads."""
    mask_XS = mask_BHTS.flatten(0, 2)
    count_X = mask_XS.sum(1)
    row_P, key_P = mask_XS.nonzero(as_tuple=True)
    out_XK = torch.full((len(mask_XS), max(1, int(count_X.max())) if mask_BHTS.numel() else 1), -1, device=mask_BHTS.device)
    out_XK[row_P, torch.arange(len(row_P), device=row_P.device) - (count_X.cumsum(0) - count_X)[row_P]] = key_P
    return out_XK.unflatten(0, mask_BHTS.shape[:3])
