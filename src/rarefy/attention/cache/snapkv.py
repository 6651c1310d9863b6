"""SnapKV (Li et al. 2024, arXiv 2404.14469): the last queries of a prompt vote for what of it is kept.

Shape letters as in evicting.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from ...errors import BadInput
from ...method import positive
from .entries import attend_entries
from .evicting import EvictingLayer
from .policy import Policy


class _Layer(EvictingLayer):
    only_prompts = True

    def rank(self, q_BHTD: Tensor, at_BT: Tensor, keep_B: Tensor, scale: float) -> Tensor:
        """Votes of the window, each entry with the best of its neighbours; the window itself is above all."""
        e, policy = self.entries, self.policy
        at = e["at"]
        first_B = at.amax((1, 2)) + 1 - (keep_B // 2).clamp(1, policy.window)           # type: ignore[attr-defined]
        voter_BT = at_BT.masked_fill(at_BT < first_B[:, None], -1)
        start = int((voter_BT >= 0).any(0).int().argmax())
        votes = attend_entries(q_BHTD[:, :, start:], e["k"], e["v"], at, voter_BT[:, start:], scale, sums=True)[1]
        before = at < first_B[:, None, None]
        order = at.argsort(dim=-1, stable=True)                  # empty slots first: neighbours in the text are neighbours here
        sorted_votes = votes.masked_fill(~before, 0.0).gather(-1, order)
        width = policy.kernel                                    # type: ignore[attr-defined]
        pooled = max_pool1d(sorted_votes, width, stride=1, padding=width // 2)
        return torch.empty_like(votes).scatter_(-1, order, pooled).masked_fill(~before, torch.inf)


class SnapKV(Policy):
    """The probability that the last queries of a prompt give each key, pooled over neighbours, says what stays (sec. 4, fig. 2).

    Evicts once a prompt (or a further chunk of tokens) was read; single tokens are all kept. Votes of all query heads that
    a key head serves are summed, so that every key head keeps its own entries. Where the budget is below twice the window,
    the window shrinks to half of it.

    Args:
        window: queries that vote; their own entries stay.
        kernel: neighbours over which the best vote counts, odd (7 in the authors' settings).
    """

    name = "cache/snapkv"
    layer = _Layer

    def __init__(self, budget: float | list[float] = 0.25, window: int = 32, kernel: int = 7) -> None:
        super().__init__(budget)
        self.window, self.kernel = positive("window", window), positive("kernel", kernel)
        if kernel % 2 == 0:
            raise BadInput(f"kernel={kernel} must be odd: as many neighbours before as behind")
