"""Pruned weights."""

from __future__ import annotations

from .entry import Entry

ENTRIES: tuple[Entry, ...] = (
    Entry("weights/random", "weights.random:RandomWeights", "weight", "baseline: weights kept at random", 2015, "none", "linear layer", baseline=True),
    Entry("weights/magnitude", "weights.magnitude:Magnitude", "weight", "Learning both Weights and Connections for Efficient Neural Networks", 2015, "none", "linear layer", "https://arxiv.org/abs/1506.02626", baseline=True),
    Entry("weights/wanda", "weights.wanda:Wanda", "weight", "A Simple and Effective Pruning Approach for Large Language Models", 2023, "calibrated", "linear layer", "https://arxiv.org/abs/2306.11695"),
)
