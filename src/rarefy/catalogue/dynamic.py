"""Attention that chooses keys by what queries and keys say, without training."""

from __future__ import annotations

from .entry import Entry

ENTRIES: tuple[Entry, ...] = (
    Entry("attention/quest", "attention.quest:Quest", "key block", "QUEST: Query-Aware Sparsity for Efficient Long-Context LLM Inference", 2024, "none", "softmax attention", "https://arxiv.org/abs/2406.10774"),
    Entry("attention/magicpig", "attention.dynamic.magicpig:MagicPIG", "key", "MagicPIG: LSH Sampling for Efficient LLM Generation", 2024, "none", "softmax attention", "https://arxiv.org/abs/2410.16179"),
    Entry("attention/blasst", "attention.dynamic.blasst:Blasst", "key block", "BLASST: Dynamic BLocked Attention Sparsity via Softmax Thresholding", 2025, "calibrated", "softmax attention", "https://arxiv.org/abs/2512.12087"),
    Entry("attention/double_sparsity", "attention.dynamic.double_sparsity:DoubleSparsity", "key", "Post-Training Sparse Attention with Double Sparsity", 2024, "calibrated", "softmax attention", "https://arxiv.org/abs/2408.07092"),
    Entry("attention/loki", "attention.dynamic.loki:Loki", "key", "Loki: Low-Rank Keys for Efficient Sparse Attention", 2024, "calibrated", "softmax attention", "https://arxiv.org/abs/2406.02542"),
    Entry("attention/vertical_slash", "attention.dynamic.vertical_slash:VerticalSlash", "column or diagonal", "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention", 2024, "none", "softmax attention", "https://arxiv.org/abs/2407.02490", note="one of MInference's three patterns; decoding steps are dense"),
    Entry("attention/sample", "attention.dynamic.sample:SampleAttention", "column", "SampleAttention: Near-Lossless Acceleration of Long Context LLM Inference with Adaptive Structured Sparse Attention", 2024, "calibrated", "softmax attention", "https://arxiv.org/abs/2406.15486", note="decoding steps are dense"),
    Entry("attention/sparge", "attention.dynamic.sparge:SpargeAttention", "key block", "SpargeAttn: Accurate Sparse Attention Accelerating Any Model Inference", 2025, "calibrated", "softmax attention", "https://arxiv.org/abs/2502.18137", note="without quantised products"),
    Entry("attention/twilight", "attention.dynamic.twilight:Twilight", "key", "Twilight: Adaptive Attention Sparsity with Hierarchical Top-$p$ Pruning", 2025, "calibrated", "softmax attention", "https://arxiv.org/abs/2502.02770"),
    Entry("attention/random_tiles", "attention.dynamic.random_tiles:RandomTiles", "key block", "TalkMosaic: Interactive PhotoMosaic with Multi-modal LLM Q&A Interactions", 2024, "none", "softmax attention", "https://arxiv.org/abs/2409.13941"),
    Entry("attention/hip", "attention.dynamic.hip:HiP", "key block", "HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning", 2024, "none", "softmax attention", "https://arxiv.org/abs/2406.09827"),
    Entry("attention/tidal", "attention.dynamic.tidal:Tidal", "key", "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention", 2024, "none", "softmax attention", "https://arxiv.org/abs/2410.05076", note="one method for all layers: later ones take over an earlier one's choice"),
    Entry("attention/squeezed", "attention.dynamic.squeezed:Squeezed", "key", "Squeezed Attention: Accelerating Long Context Length LLM Inference", 2024, "calibrated", "softmax attention", "https://arxiv.org/abs/2411.09688"),
    Entry("attention/lsh", "attention.dynamic.lsh:LSH", "key", "Hybrid Transformers for Music Source Separation", 2022, "calibrated", "softmax attention", "https://arxiv.org/abs/2211.08553"),
    Entry("attention/scatterbrain", "attention.dynamic.scatterbrain:Scatterbrain", "key", "Scatterbrain: Unifying Sparse and Low-rank Attention Approximation", 2021, "none", "softmax attention", "https://arxiv.org/abs/2110.15343"),
    Entry("attention/retrieval", "attention.dynamic.retrieval:RetrievalAttention", "key", "RetrievalAttention: Accelerating Long-Context LLM Inference via Vector Retrieval", 2024, "none", "softmax attention", "https://arxiv.org/abs/2409.10516"),
    Entry("attention/lserve", "attention.dynamic.lserve:LServe", "key block", "LServe: Efficient Long-sequence LLM Serving with Unified Sparse Attention", 2025, "calibrated", "softmax attention", "https://arxiv.org/abs/2502.14866"),
    Entry("attention/zipvl", "attention.dynamic.zipvl:ZipVL", "token", "ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification and KV Cache Compression", 2024, "calibrated", "softmax attention", "https://arxiv.org/abs/2410.08584"),
    Entry("attention/rettention", "attention.dynamic.rettention:Rettention", "key", "Re-ttention: Ultra Sparse Visual Generation via Attention Statistical Reshape", 2025, "none", "softmax attention", "https://arxiv.org/abs/2505.22918"),
    Entry("attention/sparse_d", "attention.dynamic.sparse_d:SparseD", "key block", "SparseD: Sparse Attention for Diffusion Language Models", 2025, "none", "softmax attention", "https://arxiv.org/abs/2509.24014"),
    Entry("attention/sparse_video", "attention.dynamic.svg:SparseVideo", "key", "Sparse VideoGen: Accelerating Video Diffusion Transformers with Spatial-Temporal Sparsity", 2025, "none", "softmax attention", "https://arxiv.org/abs/2502.01776"),
    Entry("attention/permuted_blocks", "attention.dynamic.permuted:PermutedBlocks", "key block", "Sparser Block-Sparse Attention via Token Permutation", 2025, "calibrated", "softmax attention", "https://arxiv.org/abs/2510.21270"),
    Entry("attention/pooled", "attention.dynamic.pooled:Pooled", "key block", "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention", 2024, "none", "softmax attention", "https://arxiv.org/abs/2407.02490", note="its block-sparse pattern, for every head"),
    Entry("attention/minference", "attention.dynamic.minference:MInference", "key", "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention", 2024, "calibrated", "softmax attention", "https://arxiv.org/abs/2407.02490", note="a pattern a head, found offline; decoding steps are dense"),
)
