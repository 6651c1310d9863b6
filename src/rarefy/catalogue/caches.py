"""Policies of the key-value cache."""

from __future__ import annotations

from .entry import Entry

ENTRIES: tuple[Entry, ...] = (
)
