"""The same fraction everywhere."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def uniform(scores: Mapping[str, Tensor], budget: float) -> dict[str, float]:
    """Every site keeps `budget` of its units."""
    return {name: budget for name in scores}
