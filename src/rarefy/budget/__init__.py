"""Sharing one budget over sites: a selection of how much to select.

Every rule gives each site a fraction in (0, 1] whose mean, weighted by the sites' numbers of units, is the budget.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..errors import BadInput
from ..method import fraction
from ..selection import check_finite
from .erk import erk
from .greedy import greedy
from .owl import owl
from .uniform import uniform

RULES: dict[str, Callable[..., dict[str, float]]] = {"uniform": uniform, "erk": erk, "owl": owl, "greedy": greedy}


def share(scores: Mapping[str, Tensor], budget: float, rule: str = "uniform", **arguments: Any) -> dict[str, float]:
    """Site -> fraction of its units to keep.

    Args:
        scores: site -> importance of its units, [O, I] for weights; rules that need only sizes read only the shape.
        rule: uniform, erk, owl or greedy; `arguments` are the rule's own.

    No site's fraction falls when the budget rises.

    Raises:
        BadInput: no sites, NaN or no scores at a site, an unknown rule or argument, or a value out of range.
    """
    fraction("budget", budget)
    if rule not in RULES:
        raise BadInput(f"rule={rule!r} must be one of {', '.join(RULES)}")
    if not scores:
        raise BadInput("no sites to share a budget over")
    takes = list(inspect.signature(RULES[rule]).parameters)[2:]
    for name in arguments:
        if name not in takes:
            raise BadInput(f"rule {rule!r} has no argument {name!r}; it takes {', '.join(takes) or 'none'}")
    for site, score in scores.items():
        if not score.numel():
            raise BadInput(f"{site}: shape {list(score.shape)} holds no units to select from")
        check_finite(score, f"scores of {site}")
    return RULES[rule](scores, budget, **arguments)
