"""Sparse Forcing (Xu et al. 2026, arXiv 2604.21221): a persistent memory of salient blocks beside the best blocks of a sliding window.

A query in block i attends to
    block i itself, as far as it is causal
    of the `window` blocks before it, the `top` best by query . mean key
    all blocks in memory, at most `memory`, of those that have left the window
The memory follows the stream, block by block. When block i is complete, it looks at the blocks still held, memory and window:
    a_c = softmax over c of (mean key_i . mean key_c) / sqrt(D),    salience_c <- decay salience_c + a_c - 1 / number of blocks held
and a block that leaves the window is put into memory; while that is too full, the least salient block (of equal ones the oldest) is dropped for good.
Only what exceeds an equal share counts: a plain sum would grow with age, and memory would keep the first blocks whatever they hold.

The method reads its memory from completed blocks' keys, so decoding gives what prefill gives, and what is dropped need not be stored. It has no
parameters: the model is trained with it in place (`Trained`), as the paper's is within its own rollout. After the abstract, which leaves score and
update open: keys look in place of queries, which a cache does not hold, and memory keeps blocks whole, where the paper compresses them.

Shape letters as in attention/block.py; G = key heads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import BadInput, Unsupported
from ...method import positive
from ..block import BlockAttention, highest


class Forcing(BlockAttention):
    """Window with dynamic choice, and persistent memory; causal.

    Args:
        memory: blocks kept of those before the window; 0 is none. window: blocks before the query's own that are still at hand.
        top: of these, how many are attended to; 0 is all. decay: of salience, a block. block, query_block: see BlockAttention.
    """

    name = "attention/forcing"

    def __init__(self, memory: int = 4, window: int = 8, top: int = 4, decay: float = 0.98, block: int = 16, query_block: int = 1) -> None:
        super().__init__(1.0, block, query_block)
        for what, value in {"memory": memory, "top": top}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise BadInput(f"{what}={value!r} must be a whole number, 0 or more")
        self.memory, self.window, self.top = memory, positive("window", window), top
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 < decay <= 1:
            raise BadInput(f"decay={decay!r} must be above 0 and at most 1")
        self.decay = decay
        if self.block % self.query_block:
            raise BadInput(f"query_block={query_block} must divide block={block}, so that its queries stand in one block")

    def describe(self, k_BGSD: Tensor) -> Tensor:
        """[B, G, N, D] mean keys; of a ragged last block, of what it holds."""
        S = k_BGSD.shape[2]
        held_N = (S - torch.arange(0, S, self.block, device=k_BGSD.device)).clamp_max(self.block)
        return pad(k_BGSD, (0, 0, 0, -S % self.block)).unflatten(2, (-1, self.block)).sum(3) / held_N[:, None]

    @torch.no_grad()
    def remembered(self, mean_BGND: Tensor) -> Tensor:
        """[B, G, N, N] bool: which blocks are in memory, row by row, when the queries of block i are served."""
        B, G, N, D = mean_BGND.shape
        look = mean_BGND @ mean_BGND.mT / D**0.5
        salience, held = look.new_zeros(B, G, N), torch.zeros(B, G, N, dtype=torch.bool, device=look.device)
        kept = torch.zeros(B, G, N, N, dtype=torch.bool, device=look.device)
        for i in range(2, N if self.memory else 0):              # before block i is served: i - 1 looks, and i - 1 - window leaves
            leaves = i - 1 - self.window
            salience = self._looked(look[:, :, i - 1], salience, held, max(0, leaves), i - 1)
            if leaves < 0:
                continue
            held[..., leaves] = True
            if leaves >= self.memory:                            # one too many
                worst = salience.masked_fill(~held, torch.inf).argmin(-1, keepdim=True)
                held = held.scatter(-1, worst, False)
            kept[:, :, i] = held
        return kept

    def _looked(self, look_BGN: Tensor, salience_BGN: Tensor, held_BGN: Tensor, begin: int, end: int) -> Tensor:
        """Salience after one block has looked at memory and at blocks begin .. end - 1."""
        there = held_BGN.clone()
        there[..., begin:end] = True
        weight = look_BGN.masked_fill(~there, -torch.inf).softmax(-1)
        return self.decay * salience_BGN + (weight - 1 / there.sum(-1, keepdim=True)) * there

    def choose(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
        """[B, H, Q, N] bool. Raises Unsupported where attention is not causal: memory follows a stream."""
        if not causal:
            raise Unsupported(f"{self.name} follows a stream and cannot serve layer {self._layer}, whose attention is not causal")
        q, (T, S) = q_BHTD.detach(), (q_BHTD.shape[2], k_BGSD.shape[2])
        rows, share = self._rows(T), q.shape[1] // k_BGSD.shape[1]
        mean = self.summary(k_BGSD.detach())
        row_Q = torch.div(torch.arange((S - T) // rows, (S - 1) // rows + 1, device=q.device) * rows, self.block, rounding_mode="floor")
        n = torch.arange(mean.shape[2], device=q.device)
        own, near = n == row_Q[:, None], (n < row_Q[:, None]) & (n >= row_Q[:, None] - self.window)
        kept = self.remembered(mean)[:, :, row_Q].repeat_interleave(share, 1)
        if not self.top or self.top >= self.window:
            return kept | near | own
        lead = (S - T) % rows
        pooled = pad(q, (0, 0, lead, -(lead + T) % rows)).unflatten(2, (-1, rows)).sum(3)        # of one size in a row: the order of a mean
        score = (pooled @ mean.repeat_interleave(share, 1).mT).masked_fill(~near, -torch.inf)
        best = highest(score, torch.full_like(row_Q, self.top)[:, None].clamp_max(len(n))) & near
        return kept | best | own

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """Products with the window's mean keys, and the look of a block, by its queries."""
        return 2 * heads * width * self.window + 2 * heads * width * (self.window + self.memory) / self.block
