"""Star Attention (Acharya et al. 2024, arXiv 2411.17116): a context encoded in blocks that see an anchor, a question that sees all blocks.

Phase 1: each context block attends to itself and to the first block, the anchor. A host holds the anchor beside its own block, at the
anchor's own positions; since the anchor attends to itself alone, its keys are the same on every host, and one pass over the pairs
{own block, first block} is what all hosts compute.
Phase 2: the question and everything generated attend to all keys. Each host gives its part and log-sum-exp s_h; the whole is
sum_h exp(s_h - log sum_h exp s_h) A_h, which is attention over all keys exactly.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width, Q = query blocks, N = key blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import BadInput, Unsupported
from ...kernels.block_attention import block_attention, merge
from ..block import BlockAttention


class Star(BlockAttention):
    """Blocks with an anchor in prefill, everything for the question and in decoding.

    Args:
        block: keys in a context block (of a host). The paper's default is a quarter of the context.
        question: how many tokens at the end of a prompt ask: they, like all that is generated, see every block.
        anchor: whether blocks see the first one (all of it; the authors' code can take a part). Without it, phase 1 is block-local attention.

    Raises:
        Unsupported: attention that is not causal.
    """

    name = "attention/star"
    unit = "key block"

    def __init__(self, block: int = 64, question: int = 1, anchor: bool = True) -> None:
        super().__init__(1.0, block, 1)
        if isinstance(question, bool) or not isinstance(question, int) or question < 0:
            raise BadInput(f"question={question!r} must be a whole number >= 0: tokens at the end of the prompt that see everything")
        if not isinstance(anchor, bool):
            raise BadInput(f"anchor={anchor!r} must be True or False")
        self.question, self.anchor = question, anchor

    def asking(self, T: int, S: int) -> int:
        """How many of the last T queries are of phase 2. A call that continues a cache is phase 2 altogether."""
        return min(T, self.question) if T == S else T

    def choose(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
        """[B, H, T, N] bool, by position alone: both phases together."""
        if not causal:
            raise Unsupported(f"{self.name} encodes a context for a decoder: attention must be causal")
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        at_T = torch.arange(S - T, S, device=q_BHTD.device)[:, None]
        own_T, n = at_T // self.block, torch.arange(-(-S // self.block), device=q_BHTD.device)
        keep = (n == own_T) | (at_T >= S - self.asking(T, S)) & (n <= own_T)
        keep = keep | (n == 0) if self.anchor else keep
        return keep.expand(*q_BHTD.shape[:2], *keep.shape)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        if not q.numel():
            return torch.zeros_like(q)
        T, S = q.shape[2], k.shape[2]
        self._shape = (q.shape[1], q.shape[-1], S, T)
        self._count(self.choose(q, k, causal), T, S, causal)
        context, outs = T - self.asking(T, S), []
        if context:                                          # T == S here: the context starts at position 0
            N = -(-context // self.block)
            mask = torch.eye(N, dtype=torch.bool, device=q.device)
            mask[:, 0] |= self.anchor
            how = {"block": self.block, "query_block": self.block, "scale": scale}
            outs.append(block_attention(q[:, :, :context], k[:, :, :context], v[:, :, :context], mask[None, None], **how))
        if context < T:
            outs.append(self.ask(q[:, :, context:], k, v, scale))
        return torch.cat(outs, 2)

    def ask(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, scale: float) -> Tensor:
        """Phase 2: [B, H, T, D] of queries at the end of the keys, host by host, merged."""
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        shared = (S - T) // self.block * self.block          # hosts before the one that the first of these queries stands in
        outs, lses = [], []
        for start in range(0, shared, self.block):
            host = slice(start, start + self.block)
            out, lse = _over(q_BHTD, k_BGSD[:, :, host], v_BGSD[:, :, host], scale, False)
            outs.append(out)
            lses.append(lse)
        out, lse = _over(q_BHTD, k_BGSD[:, :, shared:], v_BGSD[:, :, shared:], scale, True)
        return merge([*outs, out], [*lses, lse])[0]


def _over(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """(out, lse) of dense attention to one host's keys, which may be fewer than the queries are: those are then taken some at a time."""
    size, whole = k.shape[2], torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device)
    how = {"block": size, "query_block": size, "scale": scale, "causal": causal, "return_lse": True}
    parts = [block_attention(part, k, v, whole, **how) for part in q.split(size, 2)]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)
