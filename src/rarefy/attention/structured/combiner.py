"""Combiner (Ren et al. 2021, arXiv 2107.05768): each key keeps a chance, the near ones directly and the far ones through their region.

    p(j | i) = exp(q_i k_j) / Z_i                                        of a key in the direct set, here the query's own block
             = exp(q_i k_r) / Z_i * p(j | r)                             of a key in region r, of the blocks before
    Z_i = sum over direct keys exp(q_i k_j) + sum over regions exp(q_i k_r);  p(j | r) = softmax_j(q_r k_j)
with k_r and q_r pooled over the region: Combiner-Fixed. q_r asks for the region as a whole, whoever the query is; so a region's values are
mixed once. Departure: by default q_r is k_r, since a cache holds keys and not queries; `summary="queries"` is the paper's, for whole
sequences only.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width, R = regions, M = keys in a region.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import BadInput, Unsupported
from ...kernels.block_attention import block_attention, blocks_of, merge
from ...kernels.block_attention.softmax import attend
from ...method import positive
from ..heads import per_head
from .base import Structured, places

ROWS = 512
"""Queries whose logits with regions are held at once."""
POOLS = ("max", "mean")
ASKERS = ("keys", "queries")


class Combiner(Structured):
    """Own block directly, earlier blocks through pooled regions, under one softmax.

    Args:
        block: keys in a block.
        region: keys in a region, a divisor of block; 1 is dense attention.
        pool: "max" (the paper's) or "mean".
        summary: what asks for a region, its pooled "keys" or its pooled "queries".

    Raises:
        Unsupported: attention that is not causal, and pooled queries where some of them are not there.
    """

    name = "attention/combiner"

    def __init__(self, block: int = 64, region: int = 16, pool: str = "max", summary: str = "keys") -> None:
        super().__init__()
        self.block, self.region = positive("block", block), positive("region", region)
        if block % region:
            raise BadInput(f"region={region} must divide block={block}: regions lie within blocks")
        for what, value, known in (("pool", pool, POOLS), ("summary", summary, ASKERS)):
            if value not in known:
                raise BadInput(f"{what}={value!r} must be one of {', '.join(known)}")
        self.pool, self.summary = pool, summary

    def _pooled(self, x: Tensor, count: int) -> Tensor:
        """[.., R, D] of the first `count` regions."""
        x = x[:, :, : count * self.region].unflatten(2, (count, self.region))
        return x.amax(3) if self.pool == "max" else x.mean(3)

    def regions(self, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(k_r [B, G, R, D], p(j | r) [B, G or H, R, M]) of the regions of all whole blocks."""
        T, S = q.shape[2], k.shape[2]
        count = S // self.block * (self.block // self.region)
        key = self._pooled(k, count)
        asks, keys = key, k[:, :, : count * self.region].unflatten(2, (count, self.region))
        if self.summary == "queries":
            if T != S:
                raise Unsupported(f'{self.name} with summary="queries" pools the queries of all {S} keys and is given {T}; take summary="keys"')
            asks, keys = self._pooled(q, count), per_head(keys, q.shape[1])
        return key, ((keys @ asks[..., None])[..., 0] * scale).softmax(-1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        """The two parts, merged by their log-sum-exps."""
        self._only(causal)
        (H, T), S, rows = q.shape[1:3], k.shape[2], 1 if q.shape[2] == 1 else self.block
        Q, N = blocks_of(T, S, self.block, rows)
        own = (torch.arange(Q, device=q.device)[:, None] + (S - T) // rows) * rows // self.block == torch.arange(N, device=q.device)
        near = block_attention(q, k, v, own[None, None], block=self.block, query_block=rows, scale=scale, return_lse=True)
        key, share = self.regions(q, k, scale)
        if not key.shape[2]:
            return near[0]
        values = v[:, :, : key.shape[2] * self.region].unflatten(2, (key.shape[2], self.region))
        value = (share[..., None, :] @ (values if share.shape[1] == v.shape[1] else per_head(values, H)))[..., 0, :]
        parts = []
        for start in range(0, T, ROWS):
            at = slice(start, min(T, start + ROWS))
            parts.append(attend(q[:, :, at], per_head(key, H), per_head(value, H), self._earlier(T, S, q.device)[at], scale))
        far, lse = (torch.cat(x, 2) for x in zip(*parts, strict=True))
        return merge([near[0], far], [near[1], lse])[0]

    def _earlier(self, T: int, S: int, device: torch.device) -> Tensor:
        """[T, R] bool: regions of blocks before the query's own."""
        r = torch.arange(S // self.block * (self.block // self.region), device=device)
        return r * self.region // self.block < places(T, S, device)[0] // self.block

    def weights(self, q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
        """p(j | i), each key's region written over its keys."""
        self._only(causal)
        (H, T), S = q.shape[1:3], k.shape[2]
        at, j = places(T, S, q.device)
        key, share = self.regions(q, k, scale)
        direct = (q @ per_head(k, H).mT * scale).masked_fill((at // self.block != j // self.block) | (j > at), -torch.inf)
        region = (q @ per_head(key, H).mT * scale).masked_fill(~self._earlier(T, S, q.device), -torch.inf)
        p = torch.cat([direct, region], -1).softmax(-1)
        far = p[..., S:, None] * per_head(share, H)[:, :, None]
        return p[..., :S] + pad(far.flatten(-2), (0, S - far.shape[-2] * far.shape[-1]))

    def worked(self, T: int, S: int, causal: bool) -> float:
        """Keys of the own block and regions before it."""
        at = torch.arange(S - T, S)
        return float((at % self.block + 1 + at // self.block * (self.block // self.region)).sum())

    def _only(self, causal: bool) -> None:
        if not causal:
            raise Unsupported(f"{self.name} here is Combiner-Fixed of decoders: attention must be causal")
