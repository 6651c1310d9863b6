"""Claims about tasks, evaluations and kernels."""

from __future__ import annotations

from ..claim import Claim

CLAIMS: tuple[Claim, ...] = (
)
