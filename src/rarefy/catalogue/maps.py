"""Maps from attention scores to probabilities, and the attention that uses them."""

from __future__ import annotations

from .entry import Entry

_SOFT = "softmax attention"
_MAP = "softmax"
_ENTMAX = "Adaptively Sparse Transformers"
ENTRIES: tuple[Entry, ...] = (
    Entry("attention/entmax", "attention.mapped.entmax:Entmax", "key", _ENTMAX, 2019, "none", _SOFT, "https://arxiv.org/abs/1909.00015"),
    Entry("attention/rela", "attention.mapped.rela:ReLA", "key", "Sparse Attention with Linear Units", 2021, "none", _SOFT, "https://arxiv.org/abs/2104.07012"),
    Entry("attention/pladis", "attention.mapped.pladis:Pladis", "key", "PLADIS: Pushing the Limits of Attention in Diffusion Models at Inference Time by Leveraging Sparsity", 2025, "none", _SOFT, "https://arxiv.org/abs/2503.07677"),
    Entry("attention/sigmoid", "attention.mapped.sigmoid:Sigmoid", "key", "Theory, Analysis, and Best Practices for Sigmoid Self-Attention", 2024, "none", _SOFT, "https://arxiv.org/abs/2409.04431"),
    Entry("attention/top_k", "attention.mapped.top_k:TopK", "key", "Memory-efficient Transformers via Top-k Attention", 2021, "none", _SOFT, "https://arxiv.org/abs/2106.06899"),
    Entry("attention/statistical_top_k", "attention.mapped.statistical_top_k:StatisticalTopK", "key", "Spark Transformer: Reactivating Sparsity in FFN and Attention", 2025, "none", _SOFT, "https://arxiv.org/abs/2506.06644"),
    Entry("maps/entmax", "maps:entmax", "key", _ENTMAX, 2019, "none", _MAP, "https://arxiv.org/abs/1909.00015", kind="map", note="any alpha >= 1, with its gradient"),
    Entry("maps/sparsemax", "maps:sparsemax", "key", "From Softmax to Sparsemax: A Sparse Model of Attention and Multi-Label Classification", 2016, "none", _MAP, "https://arxiv.org/abs/1602.02068", kind="map", note="and sparsemax_loss"),
    Entry("maps/entmax15", "maps:entmax15", "key", "Sparse Sequence-to-Sequence Models", 2019, "none", _MAP, "https://arxiv.org/abs/1905.05702", kind="map", note="and entmax_loss"),
    Entry("maps/relu", "maps:relu", "key", "Sparse Attention with Linear Units", 2021, "none", _MAP, "https://arxiv.org/abs/2104.07012", kind="map"),
    Entry("maps/soft_top_k", "maps:soft_top_k", "key", "Sparser is Faster and Less is More: Efficient Sparse Attention for Long-Range Transformers", 2024, "none", _MAP, "https://arxiv.org/abs/2406.16747", kind="map", note="SPARSEK's projection: a row sums to k"),
    Entry("maps/monotonic", "maps:expected_alignment", "key", "Adaptive Sparse and Monotonic Attention for Transformer-based Automatic Speech Recognition", 2022, "none", _MAP, "https://arxiv.org/abs/2209.15176", kind="map", note="heads that only move forward; with maps/entmax for the others"),
    Entry("maps/channel_attention", "maps.channel:channel_attention", "channel", "DLGSANet: Lightweight Dynamic Local and Global Self-Attention Networks for Image Super-Resolution", 2023, "none", _SOFT, "https://arxiv.org/abs/2301.02031", kind="map"),
    Entry("maps/cross_features", "maps.arm:CrossFeatures", "field", "ARM-Net: Adaptive Relation Modeling Network for Structured Data", 2021, "none", "products of all fields", "https://arxiv.org/abs/2107.01830", kind="map"),
    Entry("tasks/ngram", "tasks.ngram:NGram", "key", "Transformers Can Represent $n$-gram Language Models", 2024, "none", "a table of n-grams", "https://arxiv.org/abs/2404.14994", kind="task", note="the paper's proof as weights: what sparsemax can do exactly and softmax cannot"),
)
