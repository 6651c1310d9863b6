"""p-annealing (Karvonen et al. 2024, "Measuring Progress in Dictionary Learning for Language Model Interpretability with Board
Game Models", arXiv 2408.00113), for every dictionary that pays a price for its latents.

The price sum_i f_i becomes weight * sum_i f_i^p, p falling linearly from 1 to `p_end`: convex at first, near L0 at the end. Each
time p falls, the weight is multiplied by sum f^p_old / sum f^p_new, so that what is paid for the latents at hand stays as it was.

Departures: p and the weight move every step, on the batch at hand, where the paper moves p a few times and keeps a queue of
batches.

Shape letters: B = rows, F = latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadInput
from ..method import fraction, positive
from .penalised import Penalised

_LEAST = 1e-3
"""A power is (f + least)^p - least^p, as the slope of f^p at 0 is infinite; at p = 1 it is f."""


class PAnnealing(Penalised):
    """Goes before a penalised dictionary among the bases of a method, whose constructor calls `anneal_p`."""

    weight: Tensor

    def anneal_p(self, p_end: float, hold: int, anneal: int) -> None:
        """Take the arguments: last exponent, in (0, 1]; steps before p begins to fall; steps over which it falls."""
        self.p_end = fraction("p_end", p_end)
        if type(hold) is not int or hold < 0:
            raise BadInput(f"hold={hold!r} must be a whole number >= 0: the steps at p = 1")
        self.hold, self.anneal = hold, positive("anneal", anneal)
        self.register_buffer("weight", torch.ones(()))

    def p(self, step: int) -> float:
        """Exponent at a step."""
        return 1 - (1 - self.p_end) * min(1.0, max(0, step - self.hold) / self.anneal)

    def price(self, f_BF: Tensor) -> Tensor:
        """Weighted sum of powers, mean over rows; moves the weight to that of the next step."""
        paid_BF, step = self.paid(f_BF), int(self.steps)
        now, after = self.p(step), self.p(step + 1)
        price = self.weight.clone() * _power(paid_BF, now)
        if after < now:
            with torch.no_grad():
                new = _power(paid_BF, after)
                self.weight.mul_(torch.where(new > 0, _power(paid_BF, now) / new, 1.0))
        return price


def _power(paid_BF: Tensor, p: float) -> Tensor:
    return ((paid_BF + _LEAST).pow(p) - _LEAST**p).sum(-1).mean()
