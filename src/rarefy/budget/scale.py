"""From wishes to fractions: scale raw shares so that their weighted mean is the budget and none passes 1."""

from __future__ import annotations

from collections.abc import Mapping


def scaled(raw: Mapping[str, float], sizes: Mapping[str, int], budget: float) -> dict[str, float]:
    """min(1, c * raw) with the one c that spends the budget exactly; a site at 1 leaves its surplus to the others."""
    full: set[str] = set()
    goal = budget * sum(sizes.values())
    while True:
        free = [name for name in raw if name not in full]
        left = goal - sum(sizes[name] for name in full)
        if not free:
            return dict.fromkeys(raw, 1.0)
        c = left / sum(raw[name] * sizes[name] for name in free)
        over = [name for name in free if c * raw[name] > 1]
        if not over:
            return {name: 1.0 if name in full else c * raw[name] for name in raw}
        full.update(over)
