"""From a catalogue name, a model and a budget to a plan: site -> method."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..catalogue import FAMILY_OF_UNIT, Entry, entry
from ..errors import BadInput, RarefyError, Unsupported
from ..families import config_of
from ..latents.dictionary import Widths
from ..method import Sparse
from ..site import Site, sites

DEFAULT_SITES = {"weights": "layers.*.*_proj", "neurons": "layers.*.*_proj", "attention": "layers.*.attn"}
KINDS = {"latents": "stream", "weights": "linear", "neurons": "linear", "attention": "attention"}
_LINEAR = {"d_in", "d_out", "bias", "budget"}
FILLED_IN = {"latents": {"d_in", "d_out", "width", "k", "seed"}, "weights": _LINEAR, "neurons": _LINEAR, "attention": {"budget"}}
"""Family -> constructor arguments that a command fills in itself, from its own options or from the model."""


def check_names(names: list[str]) -> list[Entry]:
    """Cards of the methods named; BadInput for an unknown one, one named twice, or none."""
    if not names:
        raise BadInput("no method named; `rarefy methods` lists them")
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise BadInput(f"{twice[0]} is named twice; name each method once")
    return [entry(name) for name in names]


def refuse_untrained(cards: Iterable[Entry]) -> None:
    """Raise BadInput for attention with parameters of its own, which says nothing before it is trained inside its model."""
    if raw := [card.name for card in cards if card.fitted == "trained" and card.unit != "latent"]:
        raise BadInput(
            f"{raw[0]} has to be trained inside its model before it means anything, which no command does: plan = rarefy.plan({raw[0]!r}, model), "
            "train it with rarefy.attention.trained (docs/trained-attention.md), then rarefy.measure(model, plan, ...)"
        )


def check_budget(budget: float) -> None:
    """Raise BadInput unless the budget is a fraction of units to keep."""
    if not 0 < budget <= 1:
        raise BadInput(f"budget={budget} must be in (0, 1]: the fraction of units kept")


def takes(card: Entry) -> list[str]:
    """A method's own arguments: those of its constructor that no command fills in."""
    return sorted(_arguments(card) - FILLED_IN[FAMILY_OF_UNIT[card.unit]])


def fixes_k(card: Entry) -> bool:
    """Whether a dictionary keeps a number of latents that it is told."""
    return "k" in _arguments(card)


def check_settings(cards: list[Entry], settings: Mapping[str, Any]) -> None:
    """Raise BadInput for a setting that none of the methods takes, or that is no plain value."""
    for name, value in settings.items():
        if not isinstance(value, bool | int | float | str):
            raise BadInput(f"--set {name}: {value!r} is a {type(value).__name__}; give a number, true, false or a word")
        if any(name in takes(card) for card in cards):
            continue
        if any(name in _arguments(card) & FILLED_IN[FAMILY_OF_UNIT[card.unit]] for card in cards):
            raise BadInput(f"--set {name}: a method's {name} comes from the model or from an option of its own, --{name}")
        own = "; ".join(f"{card.name} has {', '.join(takes(card)) or 'none'}" for card in cards)
        raise BadInput(f"no argument {name!r} to --set; {own}")


def settings_for(card: Entry, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that this method takes, where they were given to several methods at once."""
    return {name: value for name, value in settings.items() if name in takes(card)}


def _arguments(card: Entry) -> set[str]:
    return set(inspect.signature(inspect.unwrap(card.load().__init__)).parameters) - {"self"}


def places(model: nn.Module, card: Entry, pattern: str) -> dict[str, Site]:
    """Sites that a pattern names, refusing those the method cannot serve."""
    pattern = pattern or DEFAULT_SITES.get(FAMILY_OF_UNIT[card.unit], f"layers.{config_of(model).num_hidden_layers // 2}.resid_post")
    found = sites(model, pattern)
    wanted = KINDS[FAMILY_OF_UNIT[card.unit]]
    wrong = [s.name for s in found.values() if s.kind != wanted]
    if wrong:
        raise Unsupported(f"{card.name} works at {wanted} sites; {wrong[0]} is a {found[wrong[0]].kind} site: `rarefy sites MODEL` lists them")
    return found


def _own(card: Entry, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, if the method takes all of them."""
    for name in settings:
        if name not in takes(card):
            raise BadInput(f"{card.name} has no argument {name!r} to set; it has {', '.join(takes(card)) or 'none'}")
    return dict(settings)


def dictionary(card: Entry, d: Widths, *, width: int, k: int, seed: int, settings: Mapping[str, Any], d_out: Widths = 0) -> Sparse:
    """A dictionary of `width` latents for rows of d, or of several sites' widths; with d_out, a transcoder to rows of that width."""
    there = _arguments(card)
    if fixes_k(card) and width < k:
        raise BadInput(f"width={width} is smaller than k={k}: a token cannot activate more latents than there are")
    if d_out and "d_out" not in there:
        raise BadInput(f"{card.name} gives back what it reads and has no form that reproduces another site; leave it out")
    given = {"d_in": d, "width": width, "k": k, "seed": seed, "d_out": d_out}
    return card.load()(**{name: value for name, value in given.items() if name in there}, **_own(card, settings))


def plan(name: str, model: nn.Module, budget: float = 0.5, site: str = "", **settings: Any) -> dict[str, Sparse]:
    """Site -> method for a catalogue name, not fitted yet; what `calibrate`, `measure` and `replaced` take.

    Args:
        name: such as "weights/wanda", "neurons/wina" or "attention/quest"; dictionaries are made by their class.
        budget: fraction of units kept. site: name or glob; default every site the method serves.
        settings: the method's own arguments.
    """
    return make_plan(model, entry(name), site, budget, settings)


def make_plan(model: nn.Module, card: Entry, pattern: str, budget: float, settings: Mapping[str, Any]) -> dict[str, Sparse]:
    """Site -> unfitted method at one budget, for weights, neurons and attention."""
    check_budget(budget)
    if card.unit == "latent":
        raise BadInput(f"{card.name} has a width and k, not only a budget; train it with `rarefy fit` and then `rarefy judge`")
    cls, own = card.load(), _own(card, settings)
    plan: dict[str, Sparse] = {}
    for name, site in places(model, card, pattern).items():
        if cls.serves_all and plan:
            plan[name] = next(iter(plan.values()))
            continue
        try:
            if site.kind == "attention":
                given = {"budget": budget} if "budget" in _arguments(card) else {}
                made = cls(**given, **own) if card.fitted != "trained" else cls.for_module(model.get_submodule(site.module_path), **given, **own)
            else:
                made = cls.for_module(model.get_submodule(site.module_path), budget=budget, **own)
        except RarefyError as error:
            raise type(error)(f"{name}: {error}") from None
        plan[name] = made.eval()
    return plan
