"""TopK that keeps many latents while it begins to learn and fewer with every step, until it keeps k.

While every latent still points at random, a small k leaves most of them without a gradient for good; a large one lets
each find a direction first. What is annealed and nothing else stands here; see AnnealedTopK and KSparse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadInput
from ..method import positive
from .dictionary import Widths
from .topk import TopK


def annealed(begin: int, k: int, steps: int, done: int) -> int:
    """Latents kept at the step after `done` steps: on the line from `begin` at step 0 to `k` at step `steps`, rounded half to
    even, and k from there on."""
    return k if done >= steps else round(begin + (k - begin) * done / steps)


class Annealing(TopK):
    """Base of dictionaries whose k falls linearly over the first `anneal` steps of training. In use they keep k.

    Args:
        k_begin: latents kept a row at the first step, k..width; 0 means d_in, kept in that range. anneal: steps until k is reached.
    """

    steps: Tensor

    def __init__(
        self, d_in: Widths, width: int, k: int = 32, d_out: Widths = 0, aux_alpha: float = 1 / 32, aux_k: int = 0,
        dead_after: int = 10_000_000, k_begin: int = 0, anneal: int = 100, seed: int = 0, skip: bool | str = False,
    ) -> None:
        super().__init__(d_in, width, k, d_out, aux_alpha, aux_k, dead_after, seed, skip)
        self.k_begin = positive("k_begin", k_begin, width) if k_begin else min(max(self.d_in, k), width)
        if self.k_begin < k:
            raise BadInput(f"k_begin={k_begin} must be at least k={k}, or 0 for the width of the input: it falls to k")
        if type(anneal) is not int or anneal < 0:
            raise BadInput(f"anneal={anneal!r} must be a whole number >= 0: steps until k is reached")
        self.anneal = anneal
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @property
    def keeps(self) -> int:
        """Latents kept a row now: on the schedule while a loss is being learned from, else those of use."""
        learning = self.training and torch.is_grad_enabled()
        return annealed(self.k_begin, self.k, self.anneal, int(self.steps)) if learning else self.in_use

    @property
    def in_use(self) -> int:
        """Latents kept a row outside training: k."""
        return self.k

    def after_step(self, step: int) -> None:
        """Count steps, and what TopK does."""
        super().after_step(step)
        self.steps += 1
