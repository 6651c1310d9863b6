"""AdaSpa (Xia et al. 2025, arXiv 2502.21079): blocks by their exact share of softmax, found at few steps of denoising and used at all.

The last dense step of a run leaves each query's log-sum-exp L. The mass of a block is then one pass over its logits, sum exp(q k - L)
(the paper's listings write Log for Exp), also at a later search, where L is the old one: it hardly moves from step to step. An old L
below a logit, which no L can be, is raised to it here, so that no weight passes 1. Each query block keeps as many key blocks as any other of its
head ("row wise"). Of the heads, n keep more than 0.8 of their mass at the even budget d; the n that keep most then go down to d / 2 and
the n that keep least up to 3 d / 2.

Not here: the blocks of text that the paper always keeps beside a video ("text sink").
Shape letters as in scores.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import BadInput
from ...kernels.block_attention import blocks_of
from ...method import positive
from ..block import highest
from .scores import block_sums, later, logits, query_rows
from .steps import Stepwise

ENOUGH = 0.8
"""Recall above which a head can do with less, as in the paper."""


def wide_logits(q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
    """[B, H, T, S] q k / sqrt(D), float32 at least, -inf at keys not seen."""
    score = logits(q_BHTD, k_BGSD)
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    return score.masked_fill(later(score.shape[2], score.shape[3], score), -torch.inf) if causal else score


class AdaSpa(Stepwise):
    """Key blocks by exact mass with budgets by head; outside a run of denoising each call finds its own L and mask.

    Heads are sorted within a sequence, so that the mean of their budgets is `budget`; 2 n is at most all heads, and where 3 d / 2 would be
    more than everything both shifts are what is left, 1 - d, so that a budget of 1 is dense.

    Args:
        budget: mean share of the visible key blocks.
        dense: share of a run's steps, the first ones, that are dense; one at least.
        every: steps from one search to the next (20 in the paper, after 10 dense ones of 50).
    """

    name = "attention/adaspa"
    wants = ("cache",)
    prefill_only = True

    def __init__(self, budget: float = 0.2, block: int = 64, query_block: int = 64, dense: float = 0.2, every: int = 20) -> None:
        super().__init__(budget, block, query_block)
        if isinstance(dense, bool) or not 0 <= dense <= 1:
            raise BadInput(f"dense={dense!r} must be in [0, 1]: the share of steps that are dense")
        self.dense, self.every = dense, positive("every", every)

    def masses(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool, lse_BHT: Tensor | None = None) -> Tensor:
        """[B, H, Q, N] sum over a block's queries and keys of exp(q k / sqrt(D) - L); L is these queries' own unless given."""
        score = wide_logits(q_BHTD, k_BGSD, causal)
        lse_BHT = score.logsumexp(-1) if lse_BHT is None else torch.maximum(lse_BHT, score.amax(-1))
        mass = block_sums((score - lse_BHT[..., None]).exp(), self.block)
        rows = self._rows(q_BHTD.shape[2])
        return mass if rows == 1 else query_rows(mass, k_BGSD.shape[2], rows, 0.0).sum(3)

    def scores(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> Tensor:
        """`masses` with these queries' own L."""
        return self.masses(q_BHTD, k_BGSD, causal)

    def shares(self, recall_BH: Tensor) -> Tensor:
        """[B, H] budget of each head from the share of its mass that the even budget keeps."""
        H, shift = recall_BH.shape[1], min(self._budget / 2, 1 - self._budget)
        count_B1 = (recall_BH > ENOUGH).sum(-1, keepdim=True).clamp_max(H // 2)
        rank_BH = recall_BH.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return self._budget + shift * ((rank_BH >= H - count_B1).double() - (rank_BH < count_B1).double())

    def heaviest(self, mass_BHQN: Tensor, T: int, S: int, causal: bool) -> Tensor:
        """[B, H, Q, N] bool: of each row the blocks of most mass, as many as its head's share; the queries' own among them if causal."""
        score, visible_Q = self.bounded(mass_BHQN, T, S, self._rows(T), causal)
        even = super().rule(score, visible_Q)
        recall_BH = (mass_BHQN * even).sum((2, 3)) / mass_BHQN.sum((2, 3))
        keep = (self.shares(recall_BH)[..., None, None] * visible_Q[:, None]).round().long().clamp_min(1)
        return highest(score, keep) & (score > -torch.inf) | (score == torch.inf)

    def choose(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
        """[B, H, Q, N] bool block mask of queries whose logits are q k / sqrt(D)."""
        return self.heaviest(self.masses(q_BHTD.detach(), k_BGSD.detach(), causal), q_BHTD.shape[2], k_BGSD.shape[2], causal)

    def _chosen(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor | None, causal: bool) -> Tensor:
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        now = None if T == 1 else self.step()
        if now is None:
            return super()._chosen(q_BHTD, k_BGSD, v_BGSD, causal)
        number, state = now
        warm, shape = max(1, round(self.dense * self._steps)), (*q_BHTD.shape[:2], *blocks_of(T, S, self.block, self._rows(T)))
        if "mask" in state and state["mask"].shape != shape:
            raise BadInput(f"{self.name}: a step of {T} queries and {S} keys in a run of other sizes; begin a run for each generation")
        if number < warm:
            if number == warm - 1:
                state["lse"] = wide_logits(q_BHTD.detach(), k_BGSD.detach(), causal).logsumexp(-1)
                state["mask"] = self.heaviest(self.masses(q_BHTD.detach(), k_BGSD.detach(), causal, state["lse"]), T, S, causal)
            return torch.ones(shape, dtype=torch.bool, device=q_BHTD.device)
        if (number - warm + 1) % self.every == 0:
            state["mask"] = self.heaviest(self.masses(q_BHTD.detach(), k_BGSD.detach(), causal, state["lse"]), T, S, causal)
        return state["mask"]

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """All logits at each search of a run, and the exact L with the attention; a call outside a run forms them once for both."""
        searches = 1 + max(0, self._steps - max(1, round(self.dense * self._steps))) // self.every
        return 2 * heads * width * keys * searches / max(1, self._steps)
