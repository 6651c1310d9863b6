"""Claims about attention that chooses by content, without training."""

from __future__ import annotations

from ..claim import Claim

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "attention/quest", "few pages read by their bounds are enough for a decoding step, where pages chosen without the query fail", "holds",
        "recall model, 228 tokens: 98 % of the answers at a quarter of the keys, window and sinks 1 %, random pages 26 %", "docs/dynamic-attention.md"),
)
