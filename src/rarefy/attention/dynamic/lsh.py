"""Sparse attention of HT Demucs (Rouard et al. 2023, arXiv 2211.08553): pairs that hash alike often enough.

Queries and keys are hashed into few buckets, many times over; pairs that share their bucket in at least a threshold of rounds are attended
to, and the threshold is set for a target sparsity. Buckets are signs of random projections here.
Shape letters as in hashing.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import BadInput
from ...kernels.block_attention.agree import agreements
from ...method import not_negative, positive
from .hashing import codes, planes
from .rules import Levels


class LSH(Levels):
    """Keys that share the query's bucket in at least `dial` of the rounds; the query's own key always.

    Args:
        budget: share of visible pairs that `rarefy.calibrate` fits the threshold to; how near it comes depends on the rounds.
        dial: rounds in which a pair must agree, or 0 to fit it to the budget.
        rounds: hashes. bits: of a bucket (2 bits, the paper's 4 buckets).
        seed: of the projections.
    """

    name = "attention/lsh"
    unit = "key"
    by_query = True
    wants = ("cache",)

    def __init__(self, budget: float = 0.1, dial: int = 0, rounds: int = 32, bits: int = 2, seed: int = 0) -> None:
        super().__init__(budget, 1, 1, dial)
        self.rounds, self.bits = positive("rounds", rounds), positive("bits", bits, 24)
        if dial > rounds:
            raise BadInput(f"dial={dial} must be at most rounds={rounds}: a pair agrees in no more rounds than there are")
        self.seed = int(not_negative("seed", seed))

    def level_of(self, dial: float) -> float:
        """Rounds that may differ, as a part of the span; half a round more, so that rounding decides nothing."""
        return self.span[1] * (self.rounds - dial + 0.5) / self.rounds

    def levels(self, score_BHQN: Tensor, always_BHQN: Tensor) -> Tensor:
        """Rounds that differ, as a part of the span."""
        return self.span[1] * (1 - score_BHQN / self.rounds)

    def scores(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> Tensor:
        """[B, H, T, S] rounds in which a pair agrees."""
        return agreements(self.describe(q_BHTD), self.summary(k_BGSD)).to(torch.float32)

    def describe(self, k_BGSD: Tensor) -> Tensor:
        """[B, G, S, rounds] buckets; queries are hashed as keys are."""
        return codes(k_BGSD, planes(k_BGSD.shape[-1], self.rounds, self.bits, self.seed, k_BGSD), self.bits)

    def summary(self, k_BGSD: Tensor) -> Tensor:
        """`describe`; where the layer's cache keeps summaries, of new keys alone."""
        keep = getattr(self._cache, "summary", None)
        if keep is None or self._described is not None:
            return super().summary(k_BGSD)
        return keep(f"{self.name}/{self.rounds}/{self.bits}/{self.seed}", self.describe, 1)

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """Hashes of the query and of one new key; comparing buckets is whole-number work."""
        return 4 * heads * width * self.bits * self.rounds
