"""Claims about maps to probabilities."""

from __future__ import annotations

from ..claim import Claim

CLAIMS: tuple[Claim, ...] = (
)
