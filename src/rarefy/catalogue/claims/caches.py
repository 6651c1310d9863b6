"""Claims about policies of the key-value cache."""

from __future__ import annotations

from ..claim import Claim

CLAIMS: tuple[Claim, ...] = (
)
