"""Erdos-Renyi shares (Mocanu et al. 2018; as in RigL, Evci et al. 2020, arXiv 1911.11134, sec. 3): (O + I) / (O * I)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import BadInput
from .scale import scaled


def erk(scores: Mapping[str, Tensor], budget: float) -> dict[str, float]:
    """Matrices keep in proportion to (O + I) / (O * I): the larger, the sparser."""
    for name, score in scores.items():
        if score.ndim != 2:
            raise BadInput(f"{name}: erk needs matrices, got shape {list(score.shape)}")
    raw = {name: sum(s.shape) / s.numel() for name, s in scores.items()}
    return scaled(raw, {name: s.numel() for name, s in scores.items()}, budget)
