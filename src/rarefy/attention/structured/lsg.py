"""LSG attention (Condevaux and Harispe 2022, arXiv 2210.15497): near blocks whole, blocks further away by a few tokens of each, global tokens always.

A query of block n attends, under one softmax, to
    global:  the first `globals` keys, which stand before the blocks;
    local:   blocks n - 1 and n, up to itself (and n + 1 where attention is not causal);
    sparse:  the `factor` blocks before those (and, not causal, behind), each brought down to block / factor keys by `pick`:
             norm          its keys of the largest norm
             pool          means of runs of `factor` keys, and of their values
             lsh           means of keys (and of values) that fall into one of block / factor hash classes, argmax [k R, -k R]
             stride        every factor-th key, head h beginning at h mod factor
             block_stride  a run of block / factor keys, head h taking the (h mod factor)-th
What stands for a block depends on its keys alone, so decoding chooses what prefill chose. Heads are key heads here: query heads that share
keys share the choice. A hash class without keys gives none.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width, N = whole blocks, M = keys in a block,
C = keys that stand for a block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ...errors import BadInput
from ...kernels.block_attention.softmax import attend
from ...method import positive
from ..heads import per_head
from .base import Structured

PICKS = ("norm", "pool", "lsh", "stride", "block_stride")


class LSG(Structured):
    """Local, sparse and global.

    Args:
        block: keys in a block.
        factor: blocks of the sparse part and what they are brought down by; a divisor of block.
        globals: keys at the start that all attend to; without causality they attend to all.
        pick: one of PICKS.
        seed: of the hash.
    """

    name = "attention/lsg"

    def __init__(self, block: int = 64, factor: int = 4, globals: int = 1, pick: str = "norm", seed: int = 0) -> None:
        super().__init__()
        self.block, self.factor = positive("block", block), positive("factor", factor)
        if block % factor:
            raise BadInput(f"factor={factor} must divide block={block}")
        if isinstance(globals, bool) or not isinstance(globals, int) or globals < 0:
            raise BadInput(f"globals={globals!r} must be a whole number >= 0")
        if pick not in PICKS:
            raise BadInput(f"pick={pick!r} must be one of {', '.join(PICKS)}")
        if pick == "lsh" and block // factor % 2:
            raise BadInput(f"pick='lsh' has classes in pairs: block / factor must be even, not {block // factor}")
        self.globals, self.pick, self.seed = globals, pick, seed

    def shares(self, k_BGSD: Tensor) -> Tensor:
        """[B, G, N, C, M] of which keys of its block, in which parts, each key that stands for it is made; rows sum to 1, or to 0 for none."""
        M, C, f = self.block, self.block // self.factor, self.factor
        blocks = k_BGSD[:, :, self.globals :]
        N = blocks.shape[2] // M
        blocks, like = blocks[:, :, : N * M].unflatten(2, (N, M)), k_BGSD
        B, G = like.shape[:2]
        c, head = torch.arange(C, device=like.device), torch.arange(G, device=like.device)[:, None] % f
        if self.pick == "norm":
            index = blocks.norm(dim=-1).topk(C, -1).indices
        elif self.pick == "pool":
            pooled = (torch.arange(M, device=like.device) // f == c[:, None]).to(like.dtype) / f
            return pooled.expand(B, G, N, C, M)
        elif self.pick == "lsh":
            draw = torch.Generator().manual_seed(self.seed)
            plane = torch.randn(like.shape[-1], C // 2, generator=draw, dtype=torch.float64).to(like)
            side = blocks.detach() @ plane
            kind = one_hot(torch.cat([side, -side], -1).argmax(-1), C).mT.to(like.dtype)
            return kind / kind.sum(-1, keepdim=True).clamp_min(1)
        else:
            index = (c * f + head if self.pick == "stride" else c + head * C)[None, :, None].expand(B, G, N, C)
        return one_hot(index, M).to(like.dtype)

    def _parts(self, n: int, N: int, S: int, causal: bool) -> tuple[slice, list[int]]:
        """(local keys, blocks of the sparse part) of block n; a block that is not whole stands for nothing."""
        M, g = self.block, self.globals
        local = slice(g + max(0, n - 1) * M, min(S, g + (n + (1 if causal else 2)) * M))
        far = list(range(max(0, n - 1 - self.factor), n - 1)) + ([] if causal else list(range(n + 2, min(N, n + 2 + self.factor))))
        return local, far

    def mix(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        """Block of queries by block of queries."""
        H, T, S, M, g = q.shape[1], q.shape[2], k.shape[2], self.block, self.globals
        share = self.shares(k)
        N = share.shape[2]
        short, there = share.sum(-1) > 0, slice(g, g + N * M)
        k_BGNCD, v_BGNCD = (share @ x[:, :, there].unflatten(2, (N, M)) for x in (k, v))
        outs, start = [], S - T
        while start < S:
            n = (start - g) // M if start >= g else -1
            stop = min(S, g + (n + 1) * M)
            at, rows = torch.arange(start, stop, device=q.device)[:, None], q[:, :, start - S + T : stop - S + T]
            if n < 0:                                      # global queries
                keys = slice(0, g if causal else S)
                keep = torch.arange(S, device=q.device)[keys] <= at if causal else torch.ones_like(at, dtype=torch.bool)
                outs.append(attend(rows, per_head(k[:, :, keys], H), per_head(v[:, :, keys], H), keep, scale)[0])
            else:
                local, far = self._parts(n, N, S, causal)
                key, value = (torch.cat([x[:, :, :g], x[:, :, local], few[:, :, far].flatten(2, 3)], 2) for x, few in ((k, k_BGNCD), (v, v_BGNCD)))
                j = torch.arange(S, device=q.device)[local]
                near = (j <= at if causal else (j >= 0).expand(len(at), -1)).expand(*q.shape[:2], -1, -1)
                first = near.new_ones(()).expand(*near.shape[:3], g)
                some = per_head(short[:, :, far].flatten(2), H)[:, :, None].expand(-1, -1, len(at), -1)
                outs.append(attend(rows, per_head(key, H), per_head(value, H), torch.cat([first, near, some], -1), scale)[0])
            start = stop
        return torch.cat(outs, 2).to(q.dtype)

    def weights(self, q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
        """One softmax over all keys and all that stand for blocks, unseen ones at minus infinity; then what stands for keys is written over them."""
        H, T, S, M, g = q.shape[1], q.shape[2], k.shape[2], self.block, self.globals
        share = per_head(self.shares(k), H)
        N, C = share.shape[2:4]
        at, j = torch.arange(S - T, S, device=q.device)[:, None], torch.arange(S, device=q.device)
        n, m = (at - g).div(M, rounding_mode="floor"), (j - g).div(M, rounding_mode="floor")
        near = (j < g) | (at >= g) & ((m - n).abs() <= 1) | (at < g)
        near = near & (j <= at) if causal else near
        b = torch.arange(N, device=q.device).repeat_interleave(C)
        gap = (n - b) if causal else (n - b).abs()
        far = (at >= g) & (gap >= 2) & (gap <= 1 + self.factor)
        far = far & (share.sum(-1) > 0).flatten(2)[:, :, None]
        few = (share @ per_head(k, H)[:, :, g : g + N * M].unflatten(2, (N, M))).flatten(2, 3)
        keep = torch.cat([near.expand(*far.shape[:3], S), far], -1)
        score = torch.cat([q @ per_head(k, H).mT, q @ few.mT], -1) * scale
        p = score.masked_fill(~keep, -torch.inf).softmax(-1)
        spread = torch.einsum("bhtnc,bhncm->bhtnm", p[..., S:].unflatten(-1, (N, C)), share).flatten(3)
        return p[..., :S] + torch.nn.functional.pad(spread, (g, S - g - N * M))

    def worked(self, T: int, S: int, causal: bool) -> float:
        """Keys and stand-ins, of which a hash may leave some empty."""
        g, M, N, total = self.globals, self.block, max(0, S - self.globals) // self.block, 0
        for at in range(S - T, S):
            if at < g:
                total += at + 1 if causal else S
                continue
            local, far = self._parts((at - g) // M, N, S, causal)
            total += g + (at + 1 if causal else local.stop) - local.start + len(far) * (M // self.factor)
        return float(total)
