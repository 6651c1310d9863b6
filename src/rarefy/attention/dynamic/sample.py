"""SampleAttention (Zhu et al. 2024, arXiv 2406.15486): a few rows tell which columns matter to all of them.

Exact attention of a strided sample of queries is summed by column; the fewest columns that hold a share of it are kept for every query,
beside a window of recent keys. For prefill: decoding is dense.

Shape letters as in scores.py; Z = sampled queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.block_attention import blocks_of
from ...method import fraction, positive
from ..heads import per_head
from .by_lines import ByLines
from .rules import TopP, tail_levels
from .scores import logits

AT_ONCE = 32
"""Sampled queries whose attention is held at a time."""


class SampleAttention(ByLines, TopP):
    """Key columns by top-p of their mass in sampled rows, and a window.

    Args:
        budget: mean fraction of visible keys, met by fitting the share of mass, unless `dial` sets it.
        query_block: queries that share the window's edge.
        dial: the share of mass (0.95 in the paper), or 0.
        every: one query of so many is sampled, the last one always; 0.05 of them in the paper.
        window: recent keys that are kept, as a fraction of the length (0.08 in the paper).
    """

    name = "attention/sample"
    unit = "column"
    prefill_only = True

    def __init__(self, budget: float = 0.25, query_block: int = 1, dial: float = 0.0, every: int = 20, window: float = 0.05) -> None:
        super().__init__(budget, 1, query_block, dial)
        self.every, self.window = positive("every", every), fraction("window", window)

    def masses(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
        """[B, H, S] attention of the sampled queries to each key, a mean over those that see it."""
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        at_Z = torch.arange(T - 1, -1, -self.every, device=q_BHTD.device).flip(0)
        wide, k = torch.promote_types(q_BHTD.dtype, torch.float32), per_head(k_BGSD, q_BHTD.shape[1])
        at_S, last_Z = torch.arange(S, device=q_BHTD.device), S - T + at_Z if causal else torch.full_like(at_Z, S - 1)
        total_BHS = q_BHTD.new_zeros(*q_BHTD.shape[:2], S, dtype=wide)
        for some_Z, seen_Z in zip(at_Z.split(AT_ONCE), last_Z.split(AT_ONCE), strict=True):
            first, end = int(seen_Z[0]) + 1, int(seen_Z[-1]) + 1                           # keys that all of them see, and that one does
            score = logits(q_BHTD[:, :, some_Z], k[:, :, :end]).to(wide)
            hidden = score[..., first:].masked_fill(at_S[first:end] > seen_Z[:, None], -torch.inf)
            total_BHS[..., :end] += torch.cat((score[..., :first], hidden), -1).softmax(-1).sum(2)
        return total_BHS / (len(at_Z) - torch.searchsorted(last_Z, at_S)).clamp_min(1)

    def reached(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> tuple[Tensor, Tensor]:
        """A column's level for every query; -inf in the window."""
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        level_BHS = tail_levels(self.masses(q_BHTD, k_BGSD, causal))
        Q, _ = blocks_of(T, S, 1, rows)
        level = level_BHS[:, :, None].expand(-1, -1, Q, -1)
        score, _ = self.bounded(torch.zeros_like(level), T, S, rows, causal)
        first_Q = ((S - T) // rows + torch.arange(Q, device=level.device)) * rows
        near = torch.arange(S, device=level.device) > first_Q[:, None] - max(1, round(self.window * S))
        seen = score > -torch.inf
        return level.masked_fill(seen & near | (score == torch.inf), -torch.inf), seen

    def lines_of(self, q_BHTD: Tensor, k_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        """Columns, and the window's distances."""
        S = k_BGSD.shape[2]
        near_S = torch.arange(S, device=q_BHTD.device) < max(1, round(self.window * S))
        return tail_levels(self.masses(q_BHTD, k_BGSD, True)) <= self.at(1), near_S[None, None]

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """The sampled rows, over all queries."""
        return 2 * heads * width * keys / self.every
