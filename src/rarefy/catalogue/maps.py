"""Maps from attention scores to probabilities."""

from __future__ import annotations

from .entry import Entry

ENTRIES: tuple[Entry, ...] = (
)
