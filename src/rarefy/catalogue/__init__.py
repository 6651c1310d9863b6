"""One line a method. The CLI's list, the docs' table, the loader and the contract tests all read this.

A table a family, each in its own file; imports no torch.
"""

from __future__ import annotations

import difflib

from ..errors import BadInput
from . import attention, caches, coding, dynamic, judges, latents, maps, neurons, patterns, trained, weights
from .claim import VERDICTS, Claim
from .claims import CLAIMS, claims
from .entry import FAMILY_OF_UNIT, KINDS, Entry

__all__ = ["CARDS", "CLAIMS", "ENTRIES", "FAMILY_OF_UNIT", "KINDS", "VERDICTS", "Claim", "Entry", "card", "claims", "entry", "in_full"]

CARDS: tuple[Entry, ...] = tuple(
    one for table in (latents, coding, weights, neurons, attention, patterns, dynamic, trained, caches, maps, judges) for one in table.ENTRIES
)
"""Everything that has a card, of every kind."""
ENTRIES: tuple[Entry, ...] = tuple(one for one in CARDS if one.kind == "method")
"""The methods: what the contract's laws run for, and what a budget can be asked of."""
_BY_NAME = {one.name: one for one in CARDS}


def card(name: str) -> Entry:
    """The card of a name of any kind, or BadInput listing the nearest names."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    near = difflib.get_close_matches(name, _BY_NAME, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(_BY_NAME)}"
    raise BadInput(f"unknown method {name!r}; {hint}")


def entry(name: str) -> Entry:
    """The card of a method, or BadInput listing the nearest names."""
    found = card(name)
    if found.kind != "method":
        raise BadInput(f"{name} is a {found.kind}, which this does not take; `rarefy methods` shows what each name is")
    return found


def in_full(e: Entry) -> str:
    """A card and its claims as text."""
    lines = [e.name, f"  {e.title} ({e.year})"]
    lines += [f"  {e.link}"] if e.link else []
    lines += [f"  {e.kind}; selects {e.unit}s; fitted: {e.fitted}; in place of {e.replaces}; rarefy.{e.target.replace(':', '.')}"]
    lines += [f"  {e.note}"] if e.note else []
    for c in claims(e.name):
        lines += ["", f"  claim: {c.says}", f"  {c.verdict}: {c.measured} ({c.by})"]
    return "\n".join(lines)
