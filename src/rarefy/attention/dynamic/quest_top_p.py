"""Pages by the bounds of QUEST (Tang et al. 2024, arXiv 2406.10774), as many as hold a share p of their softmax (Lin et al. 2025, Twilight).

A bound stands for a page's largest logit, so the share is one of promises: pages that promise too much are kept too.
"""

from __future__ import annotations

from torch import Tensor

from ..quest import Quest
from .rules import TopP


class QuestTopP(TopP, Quest):
    """Quest's score with the rule of top-p.

    Args:
        budget: mean share of visible pairs, met by fitting p, unless `dial` sets p.
        dial: p, in (0, 1), or 0.
    """

    name = "attention/quest_top_p"

    def scores(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> Tensor:
        """Bounds of logits: sum_d max(q_d m_d, q_d M_d) / sqrt(D)."""
        return super().scores(q_BHTD, k_BGSD, rows, causal) * q_BHTD.shape[-1] ** -0.5
