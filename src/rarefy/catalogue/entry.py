"""A line of the catalogue."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..method import Sparse

FAMILY_OF_UNIT = {"latent": "latents", "weight": "weights", "neuron": "neurons"}
FAMILY_OF_UNIT |= dict.fromkeys(("key", "key block", "token", "column", "column or diagonal"), "attention")
"""What methods select -> the family that selects it."""
KINDS = ("method", "pattern", "layer", "kernel", "cache", "map", "coding", "task")


@dataclass(frozen=True)
class Entry:
    """A card: what something is called, where it is, whose idea it was."""

    name: str
    target: str
    """"module:Class" below rarefy; for patterns, maps and tasks a function."""
    unit: str
    title: str
    """Exact title of the paper, or what the baseline is."""
    year: int
    fitted: str
    """none | calibrated | trained"""
    replaces: str
    """What dense thing it stands in for."""
    link: str = ""
    baseline: bool = False
    kind: str = "method"
    """One of KINDS. A method is a `Sparse` that keeps the contract's laws; the others have tests of their own. A layer is a whole part of a model."""
    note: str = ""
    """For a pattern its expression; else what should be known before choosing it. May be empty."""

    def load(self) -> type[Sparse]:
        """The method's class; this is where torch is imported."""
        return self.object()

    def object(self) -> Any:
        """What the card is of, whatever its kind."""
        module, _, name = self.target.partition(":")
        return getattr(import_module(f"rarefy.{module}"), name)
