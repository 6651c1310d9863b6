"""From catalogue names to dictionaries at one L0: k where a method takes it, else a penalty searched for it.

The search trains candidates of all such methods in one pass over the rows: a coarse grid about each method's default, where its L0 all
lie on one side of the target more of it on that side, then a finer one between the two candidates whose L0 lie about the target. What
it finds is shared by all seeds.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..catalogue import Entry
from ..errors import BadInput
from ..method import Sparse
from ..tasks.learned import read
from .build import dictionary, fixes_k, takes

KNOBS = ("l1", "sparsity", "weight")
"""Names of the argument that sets L0 in methods that take no k."""
_ANNEALED: Callable[[int], dict[str, Any]] = lambda steps: {"hold": steps // 5, "anneal": steps * 3 // 5}
SHORT: dict[str, Callable[[int], dict[str, Any]]] = {
    "latents/p_annealed": _ANNEALED, "latents/gated_p_annealed": _ANNEALED,
    "latents/jumprelu": lambda steps: {"theta": 0.1, "bandwidth": 0.1},
}
"""Defaults that suit long runs on wide rows, set for short ones on narrow rows, and why: schedules that would outlast the run; a
kernel so narrow that a batch of some hundred rows has no pre-activation in it, and a threshold too low to arrive in the steps there are."""
COARSE = tuple(4.0**i for i in range(-3, 5))
"""Multiples of a method's default that are tried first."""
MORE = (4.0, 16.0, 64.0, 256.0)
"""Multiples of the last value tried if no two values lie about the target yet."""
FINE = 4
"""Candidates of the last pass, evenly spaced in logarithm between two of the first."""


def knob(card: Entry, settings: Mapping[str, Any]) -> str:
    """The argument to search, or "" where k is taken or the user has set it."""
    if fixes_k(card):
        return ""
    found = next((name for name in KNOBS if name in takes(card)), "")
    return "" if found in settings else found


def usable(card: Entry) -> None:
    """Raise BadInput unless the method is a trained dictionary of its own rows that the suite can make."""
    if card.unit != "latent" or card.fitted != "trained":
        raise BadInput(f"{card.name} is not a dictionary that is trained; the suite judges those, with baselines of its own beside them")
    parameters = inspect.signature(inspect.unwrap(card.load().__init__)).parameters.values()
    if more := [p.name for p in parameters if p.default is p.empty and p.name not in ("self", "d_in", "width")]:
        raise BadInput(f"{card.name} needs {', '.join(more)}: it is no dictionary of single rows, and planted data has nothing else")


def build(card: Entry, settings: Mapping[str, Any], *, d: int, width: int, k: int, seed: int, steps: int, batch: int) -> Sparse:
    """A dictionary for planted rows, with SHORT for its defaults; a latent is dead after a fortieth of all rows of training."""
    own = {"dead_after": max(1, steps * batch // 40)} if "dead_after" in takes(card) else {}
    own |= SHORT.get(card.name, lambda steps: {})(steps)
    own |= {name: value for name, value in settings.items() if name in takes(card)}
    return dictionary(card, d, width=width, k=k, seed=seed, settings=own)


def default_of(card: Entry, name: str) -> float:
    """A constructor argument's default."""
    return float(inspect.signature(inspect.unwrap(card.load().__init__)).parameters[name].default)


def between(tried: Mapping[float, float], target: float) -> list[float]:
    """Values to try next: spaced evenly in logarithm between the neighbours, in value, whose L0 lie about the target.

    Where all lie on one side there are none: the nearest end is the best there is.
    """
    values = sorted(tried)
    for low, high in zip(values, values[1:], strict=False):
        if min(tried[low], tried[high]) <= target <= max(tried[low], tried[high]):
            ratio = (high / low) ** (1 / (FINE + 1))
            return [low * ratio**i for i in range(1, FINE + 1)]
    return []


def beyond(tried: Mapping[float, float], target: float) -> list[float]:
    """Further values, past the end whose L0 is nearer to the target, where all lie on one side of it; none where they do not."""
    if min(tried.values()) <= target <= max(tried.values()):
        return []
    low, high = min(tried), max(tried)
    return [high * m for m in MORE] if abs(tried[high] - target) <= abs(tried[low] - target) else [low / m for m in MORE]


def nearest(tried: Mapping[float, float], target: float) -> float:
    """The value whose L0 is nearest to the target in ratio."""
    return min(tried, key=lambda value: abs(math.log(max(tried[value], 1e-3) / target)))


class Search:
    """Penalties of several methods for one L0.

    Args:
        make: (card, settings, seed) -> dictionary. train: trains a plan; told what for. x_held: rows that L0 is counted on.
    """

    def __init__(
        self, make: Callable[[Entry, dict[str, Any], int], Sparse], train: Callable[[dict[str, Sparse], str], None], x_held: Tensor, target: float,
    ) -> None:
        self.make, self.train, self.x_held, self.target = make, train, x_held, target

    def run(self, cards: list[Entry], settings: Mapping[str, Any]) -> dict[str, tuple[str, float, float]]:
        """Name of each method -> (argument, value, the L0 it gave)."""
        names = {card.name: knob(card, settings) for card in cards}
        tried: dict[str, dict[float, float]] = {card.name: {} for card in cards}
        ask = {card.name: [default_of(card, names[card.name]) * m for m in COARSE] for card in cards}
        for step in ("coarse", "wider", "fine"):
            plan = {
                f"{card.name}@{i}": self.make(card, {**settings, names[card.name]: value}, 0)
                for card in cards for i, value in enumerate(ask[card.name])
            }
            if plan:
                self.train(plan, f"{step} search of penalties")
            for card in cards:
                for i, value in enumerate(ask[card.name]):
                    tried[card.name][value] = read(plan[f"{card.name}@{i}"], self.x_held).codes.l0
            ask = {card.name: (beyond if step == "coarse" else between)(tried[card.name], self.target) for card in cards}
        best = {card.name: nearest(tried[card.name], self.target) for card in cards}
        return {card.name: (names[card.name], best[card.name], tried[card.name][best[card.name]]) for card in cards}
