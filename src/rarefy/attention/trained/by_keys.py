"""Attention to chosen key blocks with the loop over *key* blocks outside: each meets all queries that chose it, exact softmax merged after.

The order of Flash Sparse Attention (FSA, arXiv 2508.18224) and of MoBA's own implementation (arXiv 2502.13189): where every
query chooses for itself, a query's blocks share nothing, while a block's queries, of all heads that read its key head, fill one dense
product whatever the size of the GQA group. Work and memory are those of the chosen pairs; gradients are autograd's.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width, N = key blocks, M = keys of a block,
P = (query, block) pairs chosen, X = rows B * H * T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.block_attention.softmax import attend


def by_keys(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_BHTN: Tensor, *, block: int, scale: float, causal: bool = True,
) -> Tensor:
    """[B, H, T, D], equal to `block_attention` with query_block=1; a query without keys gives zeros."""
    B, H, T, D = q_BHTD.shape
    G, S = k_BGSD.shape[1:3]
    at_P4 = mask_BHTN.expand(B, H, T, -1).nonzero()
    b, h, t, n = at_P4.unbind(1)
    place = (b * G + h // (H // G)) * mask_BHTN.shape[-1] + n       # pairs of one key block of one key head lie together
    order = place.argsort(stable=True)
    b, h, t, n = (x[order] for x in (b, h, t, n))
    row_P = (b * H + h) * T + t
    outs, lses, start = [], [], 0
    for count in torch.unique_consecutive(place[order], return_counts=True)[1].tolist():
        cut = slice(start, start + count)
        first, batch, group = int(n[start]) * block, int(b[start]), int(h[start]) // (H // G)
        k_MD, v_MD = k_BGSD[batch, group, first : first + block], v_BGSD[batch, group, first : first + block]
        key_M = torch.arange(first, first + len(k_MD), device=q_BHTD.device)
        keep = key_M <= (S - T + t[cut])[:, None] if causal else torch.ones(count, len(k_MD), dtype=torch.bool, device=q_BHTD.device)
        out, lse = attend(q_BHTD[batch, h[cut], t[cut]], k_MD, v_MD, keep, scale)
        outs.append(out)
        lses.append(lse)
        start += count
    if not outs:
        return torch.zeros_like(q_BHTD)
    return _merged(torch.cat(outs), torch.cat(lses), row_P, B * H * T).view(B, H, T, D)


def _merged(out_PD: Tensor, lse_P: Tensor, row_P: Tensor, rows: int) -> Tensor:
    """[X, D]: softmax over the union of each row's pairs, from its parts."""
    top_X = lse_P.new_full((rows,), -torch.inf).scatter_reduce(0, row_P, lse_P.detach(), "amax")
    top_X = torch.where(top_X > -torch.inf, top_X, 0.0)
    some_P = lse_P > -torch.inf
    weight_P = torch.where(some_P, lse_P, top_X[row_P]).sub(top_X[row_P]).exp() * some_P
    total_X = weight_P.new_zeros(rows).index_add(0, row_P, weight_P)
    total_X = torch.where(total_X > 0, total_X, 1.0)
    share_P = (weight_P / total_X[row_P]).to(out_PD.dtype)
    return out_PD.new_zeros(rows, out_PD.shape[1]).index_add(0, row_P, share_P[:, None] * out_PD)
