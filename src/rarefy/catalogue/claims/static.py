"""Claims about patterns and structured attention."""

from __future__ import annotations

from ..claim import Claim

CLAIMS: tuple[Claim, ...] = (
)
