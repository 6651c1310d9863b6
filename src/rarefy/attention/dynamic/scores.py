"""Parts of scores: descriptions of keys, cheap logits, exact probabilities, and how rows of a query block speak with one voice.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width, Q = query blocks, N = key blocks.
Query t stands at position S - T + t.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...kernels.block_attention import blocks_of
from ..heads import per_head


def logits(q_BHTD: Tensor, k_BGSD: Tensor) -> Tensor:
    """[B, H, T, S] q k / sqrt(D)."""
    return (q_BHTD * q_BHTD.shape[-1] ** -0.5) @ per_head(k_BGSD, q_BHTD.shape[1]).mT


def later(T: int, S: int, like: Tensor) -> Tensor:
    """[T, S] bool: keys behind a query."""
    return torch.arange(S, device=like.device) > torch.arange(S - T, S, device=like.device)[:, None]


def probabilities(q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
    """[B, H, T, S] exact attention, float32 at least."""
    score = logits(q_BHTD, k_BGSD)
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    T, S = score.shape[2:]
    return (score.masked_fill(later(T, S, score), -torch.inf) if causal else score).softmax(-1)


def page_bounds(k_BGSD: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """(minimum, maximum) [B, G, N, D] of the keys of each page; the last page may be short."""
    short = -k_BGSD.shape[2] % page
    low = pad(k_BGSD, (0, 0, 0, short), value=torch.inf).unflatten(2, (-1, page)).amin(3)
    high = pad(k_BGSD, (0, 0, 0, short), value=-torch.inf).unflatten(2, (-1, page)).amax(3)
    return low, high


def bounds(q_BHTD: Tensor, low_BGND: Tensor, high_BGND: Tensor) -> Tensor:
    """[B, H, T, N] largest q k that a key between the bounds can have: sum_d max(q_d low_d, q_d high_d), as two products."""
    H = q_BHTD.shape[1]
    return q_BHTD.clamp_min(0) @ per_head(high_BGND, H).mT - (-q_BHTD).clamp_min(0) @ per_head(low_BGND, H).mT


def key_blocks(x_BGSD: Tensor, block: int, fill: float = 0.0) -> Tensor:
    """[B, G, N, block, D], the last one filled up."""
    return pad(x_BGSD, (0, 0, 0, -x_BGSD.shape[2] % block), value=fill).unflatten(2, (-1, block))


def key_means(k_BGSD: Tensor, block: int) -> Tensor:
    """[B, G, N, D] mean key of each block; that of a short last one over the keys it has."""
    total, S = key_blocks(k_BGSD, block).sum(3), k_BGSD.shape[2]
    count_N = (S - torch.arange(total.shape[2], device=k_BGSD.device) * block).clamp_max(block)
    return total / count_N[:, None].to(total.dtype)


def query_rows(x_BHTN: Tensor, S: int, rows: int, fill: float) -> Tensor:
    """[B, H, Q, rows, N]: queries cut into their blocks, which begin at multiples of `rows` of the position."""
    T = x_BHTN.shape[2]
    Q, _ = blocks_of(T, S, 1, rows)
    lead = (S - T) % rows
    return pad(x_BHTN, (0, 0, lead, Q * rows - lead - T), value=fill).unflatten(2, (Q, rows))


def largest(x_BHTN: Tensor, S: int, rows: int) -> Tensor:
    """[B, H, Q, N]: of the queries of a block, the highest."""
    return x_BHTN if rows == 1 else query_rows(x_BHTN, S, rows, -torch.inf).amax(3)


def mean(x_BHTN: Tensor, S: int, rows: int) -> Tensor:
    """[B, H, Q, N]: of the queries of a block that are there, the mean."""
    if rows == 1:
        return x_BHTN
    there = query_rows(torch.ones_like(x_BHTN[..., :1]), S, rows, 0.0)
    return query_rows(x_BHTN, S, rows, 0.0).sum(3) / there.sum(3)


def block_sums(x_BHQS: Tensor, block: int) -> Tensor:
    """[B, H, Q, N]: mass of each key block of the mass of each key."""
    return pad(x_BHQS, (0, -x_BHQS.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)
