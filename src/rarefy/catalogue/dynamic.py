"""Attention that chooses keys by what queries and keys say, without training."""

from __future__ import annotations

from .entry import Entry

ENTRIES: tuple[Entry, ...] = (
    Entry("attention/quest", "attention.quest:Quest", "key block", "QUEST: Query-Aware Sparsity for Efficient Long-Context LLM Inference", 2024, "none", "softmax attention", "https://arxiv.org/abs/2406.10774"),
)
