"""Greedy shares by measured damage (as TEAL allocates sparsity within a block, Liu et al. 2024, alg. 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ..errors import BadInput


def greedy(
    scores: Mapping[str, Tensor], budget: float, *, damage: Callable[[str, float], float], step: float = 0.05,
) -> dict[str, float]:
    """Start dense; again and again take `step` of one site's units away where that costs least damage a unit.

    Args:
        damage: (site, fraction kept) -> measured damage, such as a CE increase; called once for each pair tried.
    """
    if not 0 < step < 1:
        raise BadInput(f"step={step} must be in (0, 1)")
    sizes = {name: s.numel() for name, s in scores.items()}
    total, kept = sum(sizes.values()), dict.fromkeys(scores, 1.0)
    known: dict[tuple[str, float], float] = {}

    def at(name: str, fraction: float) -> float:
        key = (name, round(fraction, 9))
        if key not in known:
            known[key] = 0.0 if fraction >= 1 else damage(name, fraction)
        return known[key]

    while True:
        surplus = sum(kept[n] * sizes[n] for n in kept) - budget * total
        if surplus <= 1e-9 * total:
            return kept
        best, price = "", float("inf")
        for name in kept:
            lower = kept[name] - min(step, surplus / sizes[name])
            if lower <= 1e-9:
                continue
            cost = (at(name, lower) - at(name, kept[name])) / ((kept[name] - lower) * sizes[name])
            if cost < price:
                best, price = name, cost
        if not best:
            raise BadInput(f"budget={budget} cannot be reached with step={step}; use a smaller step")
        kept[best] -= min(step, surplus / sizes[best])
