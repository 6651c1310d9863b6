"""Claims about trained attention."""

from __future__ import annotations

from ..claim import Claim

CLAIMS: tuple[Claim, ...] = (
)
