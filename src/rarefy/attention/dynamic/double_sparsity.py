"""Double Sparsity (Yang et al. 2024, arXiv 2408.07092): few channels tell which keys matter.

Offline, channels of each head are ranked by how much they add to |q . k|: the mean of |q_c k_c|. The cache keeps a copy of
the keys in the r best channels, the labels; a step scores all keys with those, and attends exactly to the best.

Shape letters as in scores.py; R = channels kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...method import fraction
from ...selection import kept
from ..heads import per_head
from .ranked import Ranked


class DoubleSparsity(Ranked):
    """Top keys by q . k over calibrated channels.

    One choice of channels a key head, over all its query heads. The mean of |q_c k_c| is taken over all pairs of a position's q and
    another's k, where it is the product of the two means (the authors' code multiplies a position's own q and k, one choice a query head, and keeps
    labels in 4 bits); the paper leaves prefill dense, here it selects too.

    Args:
        budget: fraction of the keys that a query can see.
        channels: fraction of channels in the labels (1/16 in the paper, of a width of 128).
    """

    name = "attention/double_sparsity"
    labels_GD: Tensor

    def __init__(self, budget: float = 0.25, channels: float = 0.25) -> None:
        super().__init__(budget, 1, 1)
        self.channels = fraction("channels", channels)

    def shapes(self, H: int, G: int, D: int) -> Mapping[str, tuple[int, ...]]:
        """labels_GD: 1 at the channels kept."""
        return {"labels_GD": (G, D)}

    def gather(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Mapping[str, Tensor]:
        """Sums of |q_c| by key head and of |k_c|."""
        q_BGXTD = q_BHTD.double().abs().unflatten(1, (k_BGSD.shape[1], -1))
        return {"q": q_BGXTD.sum((0, 2, 3)), "k": k_BGSD.double().abs().sum((0, 2))}

    def settle(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The channels with the largest products."""
        score_GD = sums["q"] * sums["k"]
        best = score_GD.topk(kept(self.channels, score_GD.shape[-1]), -1).indices
        return {"labels_GD": torch.zeros_like(score_GD).scatter(-1, best, 1.0)}

    def _channels(self) -> Tensor:
        return self.labels_GD.topk(kept(self.channels, self.labels_GD.shape[-1]), -1).indices.sort(-1).values

    def describe(self, k_BGSD: Tensor) -> Tensor:
        """[B, G, S, R] labels."""
        at_GR = self._channels()
        return k_BGSD.gather(-1, at_GR[None, :, None].expand(k_BGSD.shape[0], -1, k_BGSD.shape[2], -1))

    def low(self, q_BHTD: Tensor) -> Tensor:
        """The queries' labels."""
        at_HR = per_head(self._channels()[None], q_BHTD.shape[1])[0]
        return q_BHTD.gather(-1, at_HR[None, :, None].expand(q_BHTD.shape[0], -1, q_BHTD.shape[2], -1))

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """A product over the channels kept."""
        return 2 * heads * kept(self.channels, width) * keys
