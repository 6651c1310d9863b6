"""k-sparse autoencoder (Makhzani & Frey 2013, arXiv 1312.5663): tied weights, linear latents, squared error only.

z = W x + b, of which the k largest entries are kept as they are, sign included, and the rest set to zero; the
reconstruction is W^T z_k + b' (algorithm 1). k begins large and falls linearly, so that no unit starts out dead; in use
alpha * k latents are kept (the paper's alpha lies between 1 and 3).

Departures: rows are scaled as in every dictionary here, and b' begins at their mean. Steps of Adam stand for the paper's
gradient descent with momentum.

Shape letters: D = width of rows, F = latents.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import BadInput
from .annealing import Annealing


class KSparse(Annealing):
    """One matrix that encodes and, transposed, decodes. Its norms are free.

    Args:
        k: latents kept a row at the end of training. alpha: latents kept in use, over k.
        k_begin: latents kept at the first step; 0 means d_in. anneal: steps until k is reached.
    """

    name = "latents/k_sparse"
    tied = True

    def __init__(
        self, d_in: int, width: int, k: int = 32, alpha: float = 1.0, k_begin: int = 0, anneal: int = 100,
        dead_after: int = 10_000_000, seed: int = 0,
    ) -> None:
        super().__init__(d_in, width, k, 0, 0.0, 0, dead_after, k_begin, anneal, seed)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 1 <= alpha <= width / k:
            raise BadInput(f"alpha={alpha!r} must be in [1, {width / k:g}]: latents kept in use, over k")
        self.alpha = float(alpha)

    @property
    def budget(self) -> float:
        """Latents kept in use / F."""
        return self.in_use / self.width

    @property
    def in_use(self) -> int:
        """alpha * k, rounded."""
        return round(self.alpha * self.k)

    @property
    def W_dec_FD(self) -> nn.Parameter:  # type: ignore[override]
        """[F, D] the encoder's own matrix."""
        return self.W_enc_FD

    @property
    def centre_D(self) -> None:
        """Nothing is taken from rows before they are encoded."""
        return None

    def weigh(self, pre: Tensor) -> Tensor:
        """The pre-activation itself: latents are linear."""
        return pre

    def before_step(self) -> None:
        """Nothing: norms are free."""

    def after_step(self, step: int) -> None:
        """Count steps; norms are free."""
        self.steps += 1
