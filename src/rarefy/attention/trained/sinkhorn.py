"""Sinkhorn block matching (Tay et al. 2020, arXiv 2002.11296; the encoder of DialogLM, Zhong et al. 2021, arXiv 2109.02492).

    logit_ij = (row_i W_row) . (mean key_j W_col) / sqrt(R)          blocks i that look, blocks j that are looked at; row_i = mean key of block i
    log P = (logit + Gumbel noise while training) / temperature, then `rounds` times  log P -= logsumexp over i,  log P -= logsumexp over j
    a query of block i attends, in one softmax, to its own block and to block sum_j P_ij [keys, values]_j  (soft) or argmax_j P_ij (hard)

Causal: row_i = first key of block i, j < i only, and column j is balanced over the rows up to i (causal Sinkhorn balancing), so that nothing
later is read and decoding gives what prefill gives; the first block has no match. Of strictly lower matrices whose rows sum to one and columns
to at most one there is one alone, the block before: many rounds forget what the blocks hold, and one does already (docs/trained-attention.md).
So causal ones have a number of their own, by default 0: a softmax of each row. While training, the hard match is taken straight through the
soft one.

Departures: DialogLM compares mean queries with mean keys, and takes the logarithm of their product above zero; a cache holds no queries of
earlier blocks, so both sides are keys, through projections of a head's own, and logits are taken as they are (as Tay does). Rounds end with
rows, so that a soft block is a mean. Hybrid stacks, as DialogLM's, are plans that leave layers out.

Shape letters as in base.py; N = key blocks, Q = query blocks, M = keys in a block, R = width of the projections.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import BadInput
from ...kernels.block_attention import BlockMask, block_attention
from ...method import positive
from .balancing import balanced
from .base import PairAttention, drawn, masked_softmax


class Sinkhorn(PairAttention):
    """A block and its match; train it in its model (`Trained`).

    Args:
        block: keys in a block. rounds, causal_rounds: of balancing. temperature: of the logits. width: R.
        match: "hard", one block, or "soft", a mixture of blocks.
    """

    name = "attention/sinkhorn"
    unit = "key block"

    def __init__(
        self, heads: int, key_heads: int, d_head: int, block: int = 64, rounds: int = 8, causal_rounds: int = 0,
        temperature: float = 0.7, width: int = 32, match: str = "hard", seed: int = 0,
    ) -> None:
        super().__init__()
        draw = self.sized(heads, key_heads, d_head, seed)
        self.block, self.rounds, self.width = positive("block", block), positive("rounds", rounds), positive("width", width)
        if isinstance(causal_rounds, bool) or not isinstance(causal_rounds, int) or causal_rounds < 0:
            raise BadInput(f"causal_rounds={causal_rounds!r} must be a whole number, 0 or more")
        self.causal_rounds = causal_rounds
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
            raise BadInput(f"temperature={temperature!r} must be a finite number above 0")
        if match not in ("hard", "soft"):
            raise BadInput(f'match={match!r} must be "hard" or "soft"')
        self.temperature, self.match = temperature, match
        self.row_HDR, self.col_HDR = (drawn(draw, heads, d_head, width, std=d_head**-0.5) for _ in range(2))

    def blocks(self, x_BGSD: Tensor) -> Tensor:
        """[B, H, N, M, D], zeros behind the last key."""
        x = pad(x_BGSD, (0, 0, 0, -x_BGSD.shape[2] % self.block)).unflatten(2, (-1, self.block))
        return x.repeat_interleave(self.heads // self.key_heads, 1)

    def matching(self, k: Tensor, causal: bool) -> Tensor:
        """[B, H, N, N] P: how much of block j block i is given."""
        block_BHNMD, S = self.blocks(k), k.shape[2]
        held_N = (S - torch.arange(0, S, self.block, device=k.device)).clamp_max(self.block)
        mean = block_BHNMD.sum(3) / held_N[:, None]
        logit = ((block_BHNMD[:, :, :, 0] if causal else mean) @ self.row_HDR) @ (mean @ self.col_HDR).mT / self.width**0.5
        if self.training:
            logit = logit - torch.empty_like(logit).exponential_().clamp_min(1e-20).log()          # Gumbel noise
        return balanced(logit / self.temperature, self.causal_rounds if causal else self.rounds, causal)

    def _best(self, P_BHNN: Tensor, causal: bool) -> Tensor:
        best = torch.zeros_like(P_BHNN, dtype=torch.bool).scatter(3, P_BHNN.argmax(3, keepdim=True), True)
        return best & (P_BHNN > 0) if causal else best

    def _rows(self, T: int, S: int, causal: bool) -> int:
        if T > S or not causal and T != S:
            raise BadInput(f"{self.name} matches blocks of one sequence: {T} queries of {S} keys are served where attention is causal and T <= S")
        return (S - T) // self.block

    @torch.no_grad()
    def choice(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """[B, H, Q, N] bool: own and best matched block; soft: the blocks of which as many keys are made."""
        first = self._rows(q.shape[2], k.shape[2], causal)
        return self._chosen(self.matching(k, causal), first, causal)

    def _chosen(self, P: Tensor, first: int, causal: bool) -> Tensor:
        own = torch.eye(P.shape[-1], dtype=torch.bool, device=P.device)
        return (self._best(P, causal) | own)[:, :, first:]

    def mix(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """Hard: the blocks' own kernel. Soft, or while training: two score matrices a block."""
        if self.match == "hard" and not (self.training and torch.is_grad_enabled()):
            return block_attention(q, k, v, mask, block=self.block, query_block=self.block, scale=scale, causal=causal)
        T, S, M = q.shape[2], k.shape[2], self.block
        first = self._rows(T, S, causal)
        weight = self.matching(k, causal)
        if self.match == "hard":
            weight = self._best(weight, causal).to(weight.dtype) + weight - weight.detach()
        real_NM = (torch.arange(len(mask[0, 0, 0]) * M, device=q.device) < S).view(-1, M).to(q.dtype)
        k_blocks, v_blocks, weight = self.blocks(k), self.blocks(v), weight[:, :, first:]
        held = torch.einsum("bhqn,nm->bhqm", weight, real_NM)
        some = held.detach() > 0
        share = 1 / held.where(some, 1.0)                        # a ragged last block gives what it holds
        mixed_k, mixed_v = (torch.einsum("bhqn,bhnmd->bhqmd", weight, x) * share[..., None] for x in (k_blocks, v_blocks))
        lead = S - T - first * M
        rows = pad(q, (0, 0, lead, -(lead + T) % M)).unflatten(2, (-1, M))
        keys, values = torch.cat([k_blocks[:, :, first:], mixed_k], 3), torch.cat([v_blocks[:, :, first:], mixed_v], 3)
        there = real_NM[first:].bool()[:, None].expand(-1, M, -1)
        there = there & torch.ones(M, M, dtype=torch.bool, device=q.device).tril() if causal else there
        there = torch.cat([there.expand(*some.shape[:3], M, M), some[:, :, :, None].expand(-1, -1, -1, M, M)], -1)
        score = rows @ keys.mT * scale
        score = score.masked_fill(~there, torch.finfo(score.dtype).min)
        return (score.softmax(-1) @ values).flatten(2, 3)[:, :, lead : lead + T]

    def naive(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """Hard: dense and masked. Soft: each query with its own block and its mixture written out."""
        T, S, M, share = q.shape[2], k.shape[2], self.block, self.heads // self.key_heads
        if self.match == "hard":
            return masked_softmax(q, k, BlockMask(mask, None, None, M, M).pairs(T, S, causal), scale) @ v.repeat_interleave(share, 1)
        P, k, v, outs = self.matching(k, causal), k.repeat_interleave(share, 1), v.repeat_interleave(share, 1), []
        for t in range(T):
            i, at = (S - T + t) // M, S - T + t + 1 if causal else S
            mixed = []
            for m in range(M if i or not causal else 0):
                weight = P[:, :, i, : len(range(m, S, M))]
                mixed.append([(weight[..., None] * x[:, :, m::M]).sum(2) / weight.sum(-1, keepdim=True) for x in (k, v)])
            own = slice(i * M, min(at, (i + 1) * M))
            keys, values = (torch.cat([x[:, :, own], *(one[n][:, :, None] for one in mixed)], 2) for n, x in enumerate((k, v)))
            outs.append(((q[:, :, t, None] * keys).sum(-1) * scale).softmax(-1)[:, :, None] @ values)
        return torch.cat(outs, 2)

    @torch.no_grad()
    def count(self, mask: Tensor, T: int, S: int, causal: bool) -> None:
        """Pairs of chosen blocks."""
        visible = BlockMask(mask, None, None, self.block, self.block).visible(T, S, causal)
        self._kept += float((mask * visible).sum())
        self._seen += float(visible.sum()) * mask.shape[0] * mask.shape[1]

    def own_flops(self, heads: int, width: int, keys: float) -> float:
        """Projecting and comparing blocks, by their queries; soft: mixing keys and values as well."""
        blocks = keys / self.block
        match = 4 * heads * width * self.width / self.block + 2 * heads * self.width * blocks / self.block
        return match + (4 * heads * width * blocks if self.match == "soft" else 0)
