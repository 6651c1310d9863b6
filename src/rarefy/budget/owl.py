"""Outlier-weighed shares (OWL, Yin et al. 2023, arXiv 2310.05175, sec. 3.2)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import BadInput
from .scale import scaled


def owl(scores: Mapping[str, Tensor], budget: float, *, times: float = 5.0, spread: float = 0.08) -> dict[str, float]:
    """Sites with more outliers keep more.

    The outlier share of a site is the fraction of its scores above `times` their mean; shares are mapped linearly onto
    budget +- spread, then scaled to spend the budget exactly.
    """
    if times <= 0 or spread < 0:
        raise BadInput(f"times={times} must be > 0 and spread={spread} >= 0")
    outliers = {name: float((s > times * s.float().mean()).float().mean()) for name, s in scores.items()}
    low, high = min(outliers.values()), max(outliers.values())
    width = min(spread, budget, 1 - budget) if high > low else 0.0
    raw = {n: max(1e-6, budget + width * (2 * (v - low) / (high - low) - 1)) if width else budget for n, v in outliers.items()}
    return scaled(raw, {name: s.numel() for name, s in scores.items()}, budget)
