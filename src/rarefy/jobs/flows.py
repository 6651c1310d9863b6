"""From what `rarefy fit` was asked for to a Flow: the sites read, the sites reproduced, how they are joined, and a second model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..catalogue import Entry
from ..errors import BadInput, Unsupported
from ..latents.dictionary import Dictionary
from ..places import known_sites, sites
from ..streams import JOINS, Flow
from .build import dictionary, places, settings_for
from .models import Opened, opened
from .screen import Screen

if TYPE_CHECKING:
    from .fit import FitRequest


def names_in(text: str) -> list[str]:
    """Names and globs separated by commas; [""] for none."""
    return [part.strip() for part in text.split(",") if part.strip()] or [""]


def plain(widths: list[int]) -> int | list[int]:
    """Widths as a dictionary's constructor takes them."""
    return widths[0] if len(widths) == 1 else widths


def join_of(cards: Sequence[Entry], asked: str) -> str:
    """How sites are joined: as asked, or as the methods need it. Raises BadInput where these contradict each other."""
    if asked and asked not in JOINS:
        raise BadInput(f"--join {asked!r} must be one of {', '.join(JOINS)}")
    for card in cards:
        needed = getattr(card.load(), "join", "")
        if needed and asked and asked != needed:
            raise BadInput(f"--join {asked}: {card.name} reads and writes several sites at once; leave --join out, or say {needed}")
    needed = {getattr(card.load(), "join", "") for card in cards}
    return asked or (needed.pop() if len(needed) == 1 else "")


def check_joined(request: FitRequest, cards: Sequence[Entry]) -> None:
    """Raise BadInput for what can be seen to be wrong before a model is opened; makes each dictionary with small widths."""
    join = join_of(cards, request.join)
    if join and request.objective != "local":
        raise BadInput(f"--objective {request.objective} puts a dictionary at one site; it is not trained on joined sites: leave --join out")
    if request.beside and join != "concat":
        raise BadInput("--beside reads two models side by side, a row of both: say --join concat")
    if request.beside and request.target:
        raise BadInput("--beside makes a crosscoder that gives back what it reads; leave --target out")
    if request.target and request.store:
        raise BadInput("--store keeps one site's activations; a transcoder (--target) is trained on the fly: leave --store out")
    d = request.k or 1                                      # enough for whatever is bounded by it
    one: Any = [d, d] if join == "concat" else d
    for card in cards:
        if join and not issubclass(card.load(), Dictionary):
            raise BadInput(f"--join {join}: {card.name} codes the rows of one site; leave it out")
        if getattr(card.load(), "join", "") and not request.target:
            raise BadInput(f"{card.name} reproduces other sites than it reads; name both: --site 'layers.*.mlp.in' --target 'layers.*.mlp.out'")
        least = 2 * -(-request.width // 2) if join else request.width
        dictionary(
            card, one, width=least, k=request.k or 1, seed=0, settings=settings_for(card, request.settings), d_out=one if request.target else 0,
        )


def reads_gradients(cards: Sequence[Entry]) -> bool:
    """Whether the first method is one that learns from the gradient of the model's loss beside each activation."""
    return getattr(cards[0].load(), "reads_gradients", False)


def check_gradients(request: FitRequest, cards: Sequence[Entry]) -> None:
    """Raise BadInput where gradients would be asked of something that has none, or be handed to a method that reads none."""
    names = [card.name for card in cards if reads_gradients([card])]
    if not names:
        return
    for card in cards:
        if card.name not in names:
            raise BadInput(f"{names[0]} is trained with gradients of the model's loss beside its rows and {card.name} is not; fit them in two runs")
    for option in ("target", "store", "join", "beside"):
        if getattr(request, option):
            raise BadInput(f"{names[0]} needs gradients of the model's loss, taken at one site on the fly; leave --{option} out")
    if request.objective != "local":
        raise BadInput(f"{names[0]} brings an objective of its own; leave --objective {request.objective} out")


def flow_of(request: FitRequest, cards: Sequence[Entry], model: Opened, beside: Opened | None) -> Flow:
    """The request's sites and targets. Raises BadInput for those that do not go together, Unsupported for other kinds of site."""
    found = list(dict.fromkeys(name for card in cards for part in names_in(request.site) for name in places(model.model, card, part)))
    join = join_of(cards, request.join)
    paired = join == "mix" or any(getattr(card.load(), "join", "") for card in cards)
    goals = _targets(model.model, found, request.target, paired)
    return Flow.of(model.model, found, goals, join, beside is not None)


def _targets(model: nn.Module, read: list[str], asked: str, paired: bool) -> list[str]:
    """Canonical names of the sites to reproduce; none for the sites themselves. With `paired`, the n-th is of the n-th site."""
    if not asked:
        return []
    names = list(dict.fromkeys(name for part in names_in(asked) for name in sites(model, part)))
    known = known_sites(model)
    order = list(known)
    for name in names:
        if name in known and known[name].kind != "stream":
            raise BadInput(f"--target {name} is a {known[name].kind} site; a dictionary reproduces a stream site, such as layers.0.mlp.out")
    if paired and len(names) != len(read):
        raise BadInput(f"--site names {len(read)} sites and --target {len(names)}; the n-th site goes with the n-th target, so name as many of each")
    pairs = zip(read, names, strict=True) if paired else [(min(read, key=_rank(order)), name) for name in names]
    for site, name in pairs:
        if name in known and site in known and order.index(name) < order.index(site):
            raise BadInput(f"--target {name} comes before {site} in the model; a transcoder goes forward")
    return [] if names == read else names


def _rank(order: list[str]) -> Any:
    return lambda name: order.index(name) if name in order else -1


def one_site(run: Path, made: Mapping[str, Any], what: str) -> str:
    """The site of a run's record. Raises BadInput, naming what was to be done, where several sites were joined."""
    if made.get("join"):
        raise BadInput(f"{run} holds dictionaries of {len(made['sites'])} joined sites (--join {made['join']}); {what} takes a run of one site")
    return made["sites"][0]


def open_beside(spec: str, model: Opened, screen: Screen) -> Opened | None:
    """The second model, if one is named. Raises Unsupported if it does not read the same tokens."""
    if not spec:
        return None
    other = opened(spec, screen)
    if other.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        raise Unsupported(f"{other.info.name} has another vocabulary than {model.info.name}; --beside needs two models that read the same tokens")
    return other
