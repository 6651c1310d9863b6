"""Claims of papers and what was measured of them, a table a family."""

from __future__ import annotations

from ..claim import Claim
from . import caches, dynamic, judges, maps, static, trained

CLAIMS: tuple[Claim, ...] = tuple(one for table in (static, dynamic, trained, caches, maps, judges) for one in table.CLAIMS)


def claims(name: str) -> tuple[Claim, ...]:
    """The claims of a card, in the order of their table; empty where none was put down."""
    return tuple(one for one in CLAIMS if one.card == name)
