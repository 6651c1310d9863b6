"""From a catalogue name, a model and a budget to a plan: site -> method."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..catalogue import Entry, entry
from ..errors import BadInput, Unsupported
from ..families import config_of
from ..method import Sparse
from ..site import Site, sites

DEFAULT_SITES = {"weight": "layers.*.*_proj", "neuron": "layers.*.*_proj", "key": "layers.*.attn", "key block": "layers.*.attn"}
KINDS = {"latent": "stream", "weight": "linear", "neuron": "linear", "key": "attention", "key block": "attention"}


def check_names(names: list[str]) -> list[Entry]:
    """Cards of the methods named; BadInput for an unknown one or none."""
    if not names:
        raise BadInput("no method named; `rarefy methods` lists them")
    return [entry(name) for name in names]


def places(model: nn.Module, card: Entry, pattern: str) -> dict[str, Site]:
    """Sites that a pattern names, refusing those the method cannot serve."""
    pattern = pattern or DEFAULT_SITES.get(card.unit, f"layers.{config_of(model).num_hidden_layers // 2}.resid_post")
    found = sites(model, pattern)
    wanted = KINDS[card.unit]
    wrong = [s.name for s in found.values() if s.kind != wanted]
    if wrong:
        raise Unsupported(f"{card.name} works at {wanted} sites; {wrong[0]} is a {found[wrong[0]].kind} site: `rarefy sites MODEL` lists them")
    return found


def _accepted(card: Entry, cls: type[Sparse], given: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments the constructor takes out of those given; a setting it does not take is refused by name."""
    takes = set(inspect.signature(inspect.unwrap(cls.__init__)).parameters) - {"self"}
    unknown = [name for name in settings if name not in takes]
    if unknown:
        raise BadInput(f"{card.name} has no argument {unknown[0]!r}; it has {', '.join(sorted(takes))}")
    return {**{k: v for k, v in given.items() if k in takes}, **settings}


def dictionary(card: Entry, d: int, *, width: int, k: int, seed: int, settings: Mapping[str, Any], d_out: int = 0) -> Sparse:
    """A dictionary of `width` latents for rows of d."""
    if width < k:
        raise BadInput(f"width={width} is smaller than k={k}: a token cannot activate more latents than there are")
    cls = card.load()
    return cls(**_accepted(card, cls, {"d_in": d, "width": width, "k": k, "seed": seed, "d_out": d_out}, settings))


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
    if not 0 < budget <= 1:
        raise BadInput(f"budget={budget} must be in (0, 1]: the fraction of units kept")
    if card.unit == "latent":
        raise BadInput(f"{card.name} has a width and k, not only a budget; train it with `rarefy fit` and then `rarefy judge`")
    cls = card.load()
    plan: dict[str, Sparse] = {}
    for name, site in places(model, card, pattern).items():
        if site.kind == "attention":
            plan[name] = cls(**_accepted(card, cls, {"budget": budget}, settings))
        else:
            plan[name] = cls.for_module(model.get_submodule(site.module_path), budget=budget, **settings)
        plan[name].eval()
    return plan
