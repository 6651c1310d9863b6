"""SparseD (Wang et al. 2025, arXiv 2509.24014): one choice of blocks a head, made once, for all later steps of denoising.

Attention patterns of a diffusion language model differ between heads and hardly change between steps, while the first steps decide most. So
the first `dense` share of the steps is dense; then each head's softmax is averaged over blocks, each query block keeps the budget's share of the
key blocks with the most, of the prompt's and of those being written each by themselves, and that mask serves the rest of the run.

The authors' code ranks blocks of the prompt among all blocks, keeps one block more than the share, and divides logits by the root of the number of
heads; here each region has its share, rounded, of attention as it is (logits over the root of the width).

Shape letters as in scores.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ...errors import BadInput
from ...kernels.block_attention import blocks_of
from ..block import highest
from .scores import block_sums, mean, probabilities
from .steps import Stepwise


class SparseD(Stepwise):
    """Key blocks by exact attention, chosen once a run; outside a run, at each call.

    Args:
        budget: share of the visible key blocks, in each of the two regions.
        dense: share of a run's steps, the first ones, that are dense.
    """

    name = "attention/sparse_d"

    def __init__(self, budget: float = 0.3, block: int = 32, query_block: int = 32, dense: float = 0.2) -> None:
        super().__init__(budget, block, query_block)
        if isinstance(dense, bool) or not 0 <= dense <= 1:
            raise BadInput(f"dense={dense!r} must be in [0, 1]: the share of steps that are dense")
        self.dense, self._prompt = dense, 0

    @contextmanager
    def denoising(self, steps: int, prompt: int = 0) -> Iterator[None]:
        """As `Stepwise.denoising`; the first `prompt` tokens are given, the rest is being written. A block across the two is the prompt's."""
        before, self._prompt = self._prompt, prompt
        try:
            with super().denoising(steps):
                yield
        finally:
            self._prompt = before

    def scores(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> Tensor:
        """[B, H, Q, N] mean attention of a block's queries to each key block."""
        return mean(block_sums(probabilities(q_BHTD, k_BGSD, causal), self.block), k_BGSD.shape[2], rows)

    def rule(self, score_BHQN: Tensor, visible_Q: Tensor) -> Tensor:
        """The budget's share of each region."""
        edge = min(-(-self._prompt // self.block), score_BHQN.shape[-1])
        parts = []
        for part, seen_Q in ((score_BHQN[..., :edge], visible_Q.clamp_max(edge)), (score_BHQN[..., edge:], (visible_Q - edge).clamp_min(0))):
            keep_Q = torch.tensor([max(1, round(self._budget * n)) for n in seen_Q.tolist()], device=part.device)
            mask = highest(part, keep_Q[:, None].clamp_max(max(1, part.shape[-1]))) if part.shape[-1] else torch.zeros_like(part, dtype=torch.bool)
            parts.append(mask & (part > -torch.inf) | (part == torch.inf))
        return torch.cat(parts, -1)

    def _chosen(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor | None, causal: bool) -> Tensor:
        now, shape = self.step(), (*q_BHTD.shape[:2], *blocks_of(q_BHTD.shape[2], k_BGSD.shape[2], self.block, self._rows(q_BHTD.shape[2])))
        if now is None:
            return self.choose(q_BHTD, k_BGSD, causal)
        number, state = now
        if number < round(self.dense * self._steps):
            return torch.ones(shape, dtype=torch.bool, device=q_BHTD.device)
        if "mask" not in state or state["mask"].shape != shape:
            state["mask"] = self.choose(q_BHTD, k_BGSD, causal)
        return state["mask"]

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """All logits, once a run; a call outside a run pays for them itself."""
        return 2 * heads * width * keys / max(1, self._steps)
