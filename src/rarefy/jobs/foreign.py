"""`rarefy fit --resume-from` a dictionary that another library trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..errors import BadInput
from ..formats import layout_of, read_dictionary
from ..formats.units import settle
from ..latents.dictionary import Dictionary
from ..method import Sparse
from ..streams import LiveStream


def check_foreign(source: str) -> None:
    """Raise what is wrong with another library's files, where `source` names such, before a model is opened."""
    if source and layout_of(source):
        read_dictionary(source)


def take_up_foreign(plan: Mapping[str, Sparse], source: str) -> list[str]:
    """Give the one dictionary of a plan the tensors of another library's; its name.

    Raises:
        BadInput: several dictionaries to train, another method, or one of other widths. Arguments that shape no tensor (k,
            penalties) may differ.
    """
    trained = {name: method for name, method in plan.items() if method.fitted == "trained"}
    if len(trained) != 1:
        raise BadInput(f"--resume-from {source} holds one dictionary of another library; name one method, not {', '.join(trained) or 'none'}")
    ((name, method),) = trained.items()
    found = read_dictionary(source, transcodes=True if getattr(method, "transcodes", False) else None).method
    if found.name != method.name:
        raise BadInput(f"--resume-from {source} holds a {found.name}, not a {method.name}; name the method that is there")
    old, new = found.state_dict(), method.state_dict()
    for key in sorted(old.keys() | new.keys()):
        there, asked = (list(state[key].shape) if key in state else None for state in (old, new))
        if there != asked:
            raise BadInput(f"--resume-from {source} does not fit: {key} {there} there, {asked} asked for; give the same site, --target and --width")
    method.load_state_dict(old)
    return [name]


def settle_all(plan: Mapping[str, Sparse], begun: Collection[str], live: LiveStream) -> None:
    """Units of their site, by one context, for the dictionaries begun that have none (see rarefy.formats.units)."""
    for name in begun:
        if isinstance(method := plan[name], Dictionary):
            settle(method, *live.take(live.windows_NT[:1]))
