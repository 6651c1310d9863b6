"""Static attention patterns and the methods that need more than a mask."""

from __future__ import annotations

from .entry import Entry

ENTRIES: tuple[Entry, ...] = (
)
