"""Attention whose choice or form is trained."""

from __future__ import annotations

from .entry import Entry

ENTRIES: tuple[Entry, ...] = (
)
