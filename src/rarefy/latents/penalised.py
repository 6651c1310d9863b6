"""What dictionaries share that pay for every active latent: the rise of the penalty, and the end of the loss.

Shape letters: B = rows, E = output width, F = latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadInput
from ..method import Loss, not_negative
from .dictionary import Dictionary, Widths


class Penalised(Dictionary):
    """Base of dictionaries in which any number of latents may be active, at a price.

    Args:
        warmup: steps over which the price rises linearly from 0. dead_after: rows without firing after which a latent is
            logged as dead. Others as for Dictionary.
    """

    steps: Tensor

    def __init__(
        self, d_in: Widths, width: int, d_out: Widths, warmup: int, dead_after: int, seed: int, skip: bool | str = False,
    ) -> None:
        super().__init__(d_in, width, d_out, seed, skip)
        if type(warmup) is not int or warmup < 0:
            raise BadInput(f"warmup={warmup!r} must be a whole number >= 0: the steps over which the penalty rises")
        self.warmup, self.dead_after = warmup, not_negative("dead_after", dead_after)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @property
    def budget(self) -> float:
        """1: any number of latents may be active."""
        return 1.0

    @property
    def rise(self) -> float:
        """Factor in [0, 1] on the penalty at the step now at work."""
        return min(1.0, int(self.steps) / self.warmup) if self.warmup else 1.0

    def paid(self, f_BF: Tensor) -> Tensor:
        """[B, F] what latents of values f_BF >= 0 cost one by one: their value."""
        return f_BF

    def price(self, f_BF: Tensor) -> Tensor:
        """What a row's latents cost together, mean over rows."""
        return self.paid(f_BF).sum(-1).mean()

    def settled(self, f_BF: Tensor, y: Tensor, y_hat: Tensor, **parts: Tensor) -> Loss:
        """The loss of latents f_BF, the sum of `parts`. y, y_hat: [B, E] in the output's units."""
        on_BF = f_BF.detach() > 0
        return self.ended(parts, y * self.scale_out, y_hat * self.scale_out, on_BF.any(0).nonzero()[:, 0], on_BF.sum(), self.dead_after)

    def after_step(self, step: int) -> None:
        """Unit-norm decoder rows; count steps for the rise."""
        super().after_step(step)
        self.steps += 1
