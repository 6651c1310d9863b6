"""Gated autoencoder with p-annealing (Karvonen et al. 2024, arXiv 2408.00113): see p_annealing.py.

What is raised to the power p is the gate's ReLU(pi), which the L1 penalty of the Gated autoencoder is on.
"""

from __future__ import annotations

from .dictionary import Widths
from .gated import Gated
from .p_annealing import PAnnealing


class GatedPAnnealed(PAnnealing, Gated):
    """Gated autoencoder whose penalty goes from L1 towards L0.

    Args:
        p_end: last exponent, in (0, 1]. hold: steps before p begins to fall. anneal: steps over which it falls. l1: weight of
            the gate's penalty at p = 1. Others as for Gated.
    """

    name = "latents/gated_p_annealed"

    def __init__(
        self, d_in: Widths, width: int, d_out: Widths = 0, l1: float = 0.02, p_end: float = 0.2, hold: int = 500, anneal: int = 2000,
        warmup: int = 100, dead_after: int = 1_000_000, seed: int = 0, skip: bool | str = False,
    ) -> None:
        super().__init__(d_in, width, d_out, l1, warmup, dead_after, seed, skip)
        self.anneal_p(p_end, hold, anneal)
