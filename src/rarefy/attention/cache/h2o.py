"""H2O (Zhang et al. 2023, arXiv 2306.14048): heavy hitters, the entries that all queries so far attended to most.

Shape letters as in evicting.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .evicting import EvictingLayer
from .policy import Policy


class _Layer(EvictingLayer):
    accumulates = True

    def above(self, keep: int) -> tuple[int, int]:
        return 0, self.seen - 1 - keep // 2

    def rank(self, q_BHTD: Tensor, at_BT: Tensor, keep_B: Tensor, scale: float) -> Tensor:
        """Accumulated probability; the newest half of the budget is above it."""
        at = self.entries["at"]
        newest_B = at.amax((1, 2)) - keep_B // 2
        return self.entries["sum"].masked_fill(at > newest_B[:, None, None], torch.inf)


class H2O(Policy):
    """Half of the budget goes to the newest entries, half to those with the most probability summed over queries (sec. 4.1, alg. 1).

    The sum of a key head is over all query heads that it serves. A prompt attends densely and is evicted from afterwards,
    as in the authors' code; every further token then takes an entry's place.
    """

    name = "cache/h2o"
    layer = _Layer
