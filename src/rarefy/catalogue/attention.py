"""Baselines of sparse attention."""

from __future__ import annotations

from .entry import Entry

ENTRIES: tuple[Entry, ...] = (
    Entry("attention/random", "attention.random:RandomBlocks", "key block", "baseline: key blocks kept at random", 2020, "none", "softmax attention", baseline=True),
    Entry("attention/window", "attention.window:WindowSinks", "key", "Efficient Streaming Language Models with Attention Sinks", 2023, "none", "softmax attention", "https://arxiv.org/abs/2309.17453", baseline=True),
)
