"""Greedy shares by measured damage (as TEAL allocates sparsity within a block, Liu et al. 2024, alg. 1).

The path from dense to one step each does not depend on the budget, which only says where on it to stop; so no site
gains when the budget falls. Below that all sites keep the budget itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from ..errors import BadInput


def greedy(
    scores: Mapping[str, Tensor], budget: float, *, damage: Callable[[str, float], float] | None = None, step: float = 0.05,
) -> dict[str, float]:
    """Start dense; again and again take `step` of one site's units away where that costs least damage a unit.

    Args:
        damage: (site, fraction kept) -> measured damage, such as a CE increase; called once for each pair tried. That of
            a whole site is 0.
        step: fraction of a site taken at a time, in (0, 0.5]; no site is taken below half a step before all are there.
    """
    if not callable(damage):
        raise BadInput("rule 'greedy' needs damage=f(site, fraction) -> number, such as the CE increase of that site alone")
    if not 0 < step <= 0.5:
        raise BadInput(f"step={step} must be in (0, 0.5]")
    sizes = {name: s.numel() for name, s in scores.items()}
    steps = math.floor(1 / step - 0.5)
    if budget <= 1 - steps * step:
        return dict.fromkeys(sizes, budget)
    taken, kept, harm = dict.fromkeys(sizes, 0), dict.fromkeys(sizes, 1.0), dict.fromkeys(sizes, 0.0)
    ahead: dict[str, tuple[float, float]] = {}                 # site -> damage one step lower, rise a unit taken

    def look(name: str) -> None:
        lower = 1 - (taken[name] + 1) * step
        worse = float(damage(name, lower))
        if not math.isfinite(worse):
            raise BadInput(f"damage of {name} at {lower:.4g} kept is {worse}; it must be a finite number")
        ahead[name] = (worse, (worse - harm[name]) / sizes[name])

    surplus = (1 - budget) * sum(sizes.values())
    if surplus > 0:
        for name in sizes:
            look(name)
    while surplus > 0 and ahead:
        name = min(ahead, key=lambda n: ahead[n][1])           # among equals the first named
        if step * sizes[name] >= surplus:
            kept[name] -= surplus / sizes[name]
            break
        harm[name], surplus = ahead.pop(name)[0], surplus - step * sizes[name]
        taken[name] += 1
        kept[name] = 1 - taken[name] * step
        if taken[name] < steps:
            look(name)
    return kept
