"""SeerAttention (Gao et al. 2024, arXiv 2410.13276): a small gate learns which key blocks a block of queries attends to.

    gate = softmax(R(mean(Q_block) W_q) . R([max; min; mean](K_block) W_k) / sqrt(d_gate)) over blocks not later
    loss = KL(truth || gate),  truth = the dense map max-pooled in each (query block, key block), each row divided by its sum

R rotates by the number of the block, as RoPE does by position. Departures: queries and keys are pooled after the model's own rotation,
since that is what a cache holds (the paper's gate reads them before it, and its code rotates by the place of a block's first token and leaves the
first quarter of the rows out of the loss); each query head has a W_q and each key head a W_k.

Shape letters as in ../block.py; C = gate width, R = queries in a block, M = keys in a block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import kl_div, pad

from ...errors import BadInput
from ...kernels.block_attention import blocks_of
from ...method import Loss
from ..block import BlockAttention
from .base import Made, dense_map, drawn
from .moba import block_means


def rotated(x_ABNC: Tensor, at_N: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary embedding of [..., N, C] at positions at_N, first half with second half; C is even."""
    half = x_ABNC.shape[-1] // 2
    rate = base ** (-torch.arange(half, device=x_ABNC.device, dtype=torch.float64) / half)
    angle = (at_N[:, None] * rate).to(x_ABNC.dtype)
    a, b = x_ABNC.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def pooled_queries(q_BHTD: Tensor, S: int, rows: int) -> Tensor:
    """[B, H, Q, D] mean of the queries of each block of `rows` positions, of those that are there."""
    T, lead = q_BHTD.shape[2], (S - q_BHTD.shape[2]) % rows
    cut = (lead, -(lead + T) % rows)
    count = pad(q_BHTD.new_ones(T), cut).unflatten(0, (-1, rows)).sum(1)
    return pad(q_BHTD, (0, 0, *cut)).unflatten(2, (-1, rows)).sum(3) / count[:, None]


class Seer(Made, BlockAttention):
    """The budget's share of blocks by a learned gate; train it with `Distilled`.

    Args:
        block, query_block: keys and queries that share a choice in prefill (64 in the paper); decoding chooses for its own query.
        d_gate: width of the gate, even; 0 is the head's.
    """

    name = "attention/seer"

    def __init__(
        self, heads: int, key_heads: int, d_head: int, budget: float = 0.25, block: int = 64, query_block: int = 64, d_gate: int = 0, seed: int = 0,
    ) -> None:
        super().__init__(budget, block, query_block)
        draw = self.sized(heads, key_heads, d_head, seed)
        if not isinstance(d_gate, int) or d_gate < 0 or (d_gate or d_head) % 2:
            raise BadInput(f"d_gate={d_gate!r} must be an even number >= 0 (0 is the head's width, {d_head}): halves are rotated together")
        self.d_gate = d_gate or d_head
        self.query_HDC = drawn(draw, heads, d_head, self.d_gate, std=d_head**-0.5)
        self.key_GDC = drawn(draw, key_heads, 3 * d_head, self.d_gate, std=(3 * d_head) ** -0.5)

    def describe(self, k_BGSD: Tensor) -> Tensor:
        """[B, G, N, C] largest, smallest and mean key of each block, projected."""
        short = -k_BGSD.shape[2] % self.block
        ends = [pad(k_BGSD, (0, 0, 0, short), value=x).unflatten(2, (-1, self.block)) for x in (-torch.inf, torch.inf)]
        return torch.cat([ends[0].amax(3), ends[1].amin(3), block_means(k_BGSD, self.block)], -1) @ self.key_GDC

    def gate(self, q_BHTD: Tensor, described_BGNC: Tensor, S: int, rows: int) -> Tensor:
        """[B, H, Q, N] logits of the gate, differentiable in its parameters."""
        T, share = q_BHTD.shape[2], self.heads // self.key_heads
        first = (S - T) // rows
        mean_BHQD = pooled_queries(q_BHTD, S, rows)
        row_Q = torch.arange(first, first + mean_BHQD.shape[2], device=q_BHTD.device) * rows // self.block
        query = rotated(mean_BHQD @ self.query_HDC, row_Q)
        key = rotated(described_BGNC, torch.arange(described_BGNC.shape[2], device=q_BHTD.device))
        return query @ key.repeat_interleave(share, 1).mT * self.d_gate**-0.5

    @torch.no_grad()
    def scores(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> Tensor:
        """The gate's logits."""
        self.refuse_other_sizes(q_BHTD, k_BGSD)
        return self.gate(q_BHTD, self.summary(k_BGSD), k_BGSD.shape[2], rows)

    def truth(self, q_BHTD: Tensor, k_BGSD: Tensor, scale: float, causal: bool, rows: int) -> Tensor:
        """[B, H, Q, N] dense map, max-pooled, rows divided by their sum."""
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        lead, (Q, N) = (S - T) % rows, blocks_of(T, S, self.block, rows)
        full = pad(dense_map(q_BHTD, k_BGSD, scale, causal), (0, N * self.block - S, lead, Q * rows - lead - T))
        pooled = full.unflatten(3, (N, self.block)).amax(4).unflatten(2, (Q, rows)).amax(3)
        return pooled / pooled.sum(-1, keepdim=True)

    def distil(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, scale: float, causal: bool, hidden_BTD: Tensor | None = None) -> Loss:
        """KL of the gate from the pooled dense map, nats a row."""
        self.refuse_other_sizes(q_BHTD, k_BGSD)
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        rows = self._rows(T)
        with torch.no_grad():
            truth = self.truth(q_BHTD, k_BGSD, scale, causal, rows)
        logit = self.gate(q_BHTD * (scale * self.d_head**0.5), self.describe(k_BGSD), S, rows)
        later = self.bounded(logit.detach(), T, S, rows, causal)[0] == -torch.inf
        logit = logit.masked_fill(later, torch.finfo(logit.dtype).min)
        kl = kl_div(logit.log_softmax(-1), truth, reduction="none").sum(-1).mean()
        return Loss(kl, {"kl": kl})

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """Projections of a query and, shared by the queries of a block, of the keys; their product."""
        of_keys = 6 * self.key_heads * width * self.d_gate * keys / self.block / max(1.0, keys)
        return (2 * heads * width * self.d_gate + 2 * heads * self.d_gate * keys / self.block) / self.query_block + of_keys
