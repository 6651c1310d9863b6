"""TidalDecode (Yang et al. 2024, arXiv 2410.05076): layers attend to the positions that an earlier layer found.

The first layers are dense; a selection layer scores every key exactly and keeps the highest; layers behind it attend to the same
positions, until a layer further on selects anew.

Shape letters as in scores.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import BadInput
from ...method import positive
from ..block import TokenAttention
from .scores import logits


class Tidal(TokenAttention):
    """Top keys by exact scores at some layers, which the layers between them take over head by head.

    One method serves all layers, as `replaced(model, attention="tidal")` puts it in; between a pass's layers it remembers a choice,
    and nothing from pass to pass. A layer without one before it selects for itself. The authors' code leaves prompts dense and selects anew at
    one layer only, found by trial; here prompts select too, and layers `every` apart.

    Args:
        budget: fraction of the keys that a query can see.
        dense: first layers that attend to everything (2 in the paper).
        every: layers from one selection to the next; the first is layer `dense`.
    """

    name = "attention/tidal"
    wants = ("cache",)
    serves_all = True

    def __init__(self, budget: float = 0.25, dense: int = 2, every: int = 14) -> None:
        super().__init__(budget)
        if not isinstance(dense, int) or dense < 0:
            raise BadInput(f"dense={dense!r} must be a whole number >= 0")
        self.dense = dense
        self.every = positive("every", every)
        self._carried: dict[int, Tensor] = {}

    def scores(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> Tensor:
        """q k."""
        return logits(q_BHTD, k_BGSD)

    def selects(self, layer: int) -> bool:
        """Whether a layer scores for itself."""
        return layer >= self.dense and (layer - self.dense) % self.every == 0

    def choose(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
        """[B, H, T, S] bool."""
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        if self._layer < self.dense:
            self._carried.pop(self._row, None)
            score, _ = self.bounded(q_BHTD.new_zeros(*q_BHTD.shape[:2], T, S), T, S, 1, causal)
            return score > -torch.inf
        held = self._carried.get(self._row)
        if held is None or self.selects(self._layer) or held.shape != (*q_BHTD.shape[:2], T, S):
            held = super().choose(q_BHTD, k_BGSD, causal)
        self._carried[self._row] = held
        return held

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """Every product, at one layer of `every`."""
        return 2 * heads * width * keys / self.every
