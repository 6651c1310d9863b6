"""Activation sparsity of linear inputs."""

from __future__ import annotations

from .entry import Entry

ENTRIES: tuple[Entry, ...] = (
    Entry("neurons/random", "neurons.random:RandomNeurons", "neuron", "baseline: inputs of a linear layer kept at random", 2024, "none", "linear layer", baseline=True),
    Entry("neurons/teal", "neurons.teal:Teal", "neuron", "Training-Free Activation Sparsity in Large Language Models", 2024, "calibrated", "linear layer", "https://arxiv.org/abs/2408.14690"),
    Entry("neurons/wina", "neurons.wina:Wina", "neuron", "WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference", 2025, "none", "linear layer", "https://arxiv.org/abs/2505.19427"),
)
