"""Sparse coding beyond dictionaries of activations."""

from __future__ import annotations

from .entry import Entry

ENTRIES: tuple[Entry, ...] = (
)
