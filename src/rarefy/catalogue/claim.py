"""What a paper says of its method, beside what was measured here."""

from __future__ import annotations

from dataclasses import dataclass

VERDICTS = ("holds", "in part", "does not hold", "not tested")


@dataclass(frozen=True)
class Claim:
    """One statement of a paper and its figures."""

    card: str
    """Name of the card it belongs to."""
    says: str
    """What the paper says, in our words."""
    verdict: str
    """One of VERDICTS, in direction: no model here has a paper's size."""
    measured: str
    """Figures with their setting; for "not tested" what it would take."""
    by: str
    """File that measures it or keeps the figures, from the repository's root."""
