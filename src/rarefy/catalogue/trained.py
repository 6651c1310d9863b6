"""Attention whose choice or form is trained."""

from __future__ import annotations

from .entry import Entry

_NSA = "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention"

ENTRIES: tuple[Entry, ...] = (
    Entry("attention/moba", "attention.trained.moba:MoBA", "key block", "MoBA: Mixture of Block Attention for Long-Context LLMs", 2025, "none", "softmax attention", "https://arxiv.org/abs/2502.13189"),
    Entry("attention/nsa", "attention.trained.nsa:NSA", "key block", _NSA, 2025, "trained", "softmax attention", "https://arxiv.org/abs/2502.11089"),
    Entry("attention/fsa", "attention.trained.fsa:FSA", "key block", "Flash Sparse Attention: An Alternative Efficient Implementation of Native Sparse Attention Kernel", 2025, "trained", "softmax attention", "https://arxiv.org/abs/2508.18224"),
    Entry("attention/seer", "attention.trained.seer:Seer", "key block", "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs", 2024, "trained", "softmax attention", "https://arxiv.org/abs/2410.13276"),
    Entry("attention/diff", "attention.trained.diff:Diff", "key", "Differential Transformer", 2024, "trained", "softmax attention", "https://arxiv.org/abs/2410.05258"),
    Entry("attention/sparsek", "attention.trained.sparsek:SparseK", "key", "Sparser is Faster and Less is More: Efficient Sparse Attention for Long-Range Transformers", 2024, "trained", "softmax attention", "https://arxiv.org/abs/2406.16747"),
    Entry("attention/purbo", "attention.trained.purbo:Purbo", "key", "Full Attention Strikes Back: Transferring Full Attention into Sparse within Hundred Training Steps", 2026, "trained", "softmax attention", "https://arxiv.org/abs/2605.16928"),
    Entry("attention/routing", "attention.trained.routing:Routing", "key", "Efficient Content-Based Sparse Attention with Routing Transformers", 2020, "trained", "softmax attention", "https://arxiv.org/abs/2003.05997"),
    Entry("attention/sea", "attention.trained.sea:SEA", "key", "SEA: Sparse Linear Attention with Estimated Attention Mask", 2023, "trained", "softmax attention", "https://arxiv.org/abs/2310.01777"),
    Entry("attention/sma", "attention.trained.sma:SMA", "key", "Sparse Modular Activation for Efficient Sequence Modeling", 2023, "trained", "softmax attention", "https://arxiv.org/abs/2306.11197"),
    Entry("attention/shared_diff", "attention.trained.shared_diff:SharedDiff", "key", "Shared DIFF Transformer", 2025, "trained", "softmax attention", "https://arxiv.org/abs/2501.17900"),
    Entry("attention/llsa", "attention.trained.llsa:LLSA", "key block", "Trainable Log-linear Sparse Attention for Efficient Diffusion Transformers", 2025, "none", "softmax attention", "https://arxiv.org/abs/2512.16615"),
    Entry("attention/nosa", "attention.trained.nosa:NOSA", "key block", "NOSA: Native and Offloadable Sparse Attention", 2025, "trained", "softmax attention", "https://arxiv.org/abs/2510.13602"),
    Entry("attention/biformer", "attention.trained.biformer:BiFormer", "key block", "BiFormer: Vision Transformer with Bi-Level Routing Attention", 2023, "trained", "softmax attention", "https://arxiv.org/abs/2303.08810"),
    Entry("attention/sparsifiner", "attention.trained.sparsifiner:Sparsifiner", "key", "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers", 2023, "trained", "softmax attention", "https://arxiv.org/abs/2303.13755"),
    Entry("attention/spt", "attention.trained.spt:SPT", "key", "SPT: Fine-Tuning Transformer-based Language Models Efficiently with Sparsification", 2023, "trained", "softmax attention", "https://arxiv.org/abs/2312.10365"),
    Entry("attention/dsv", "attention.trained.dsv:DSV", "key", "DSV: Exploiting Dynamic Sparsity to Accelerate Large-Scale Video DiT Training", 2025, "trained", "softmax attention", "https://arxiv.org/abs/2502.07590"),
    Entry("attention/flux", "attention.trained.flux:Flux", "key", "Flux Attention: Context-Aware Hybrid Attention for Efficient LLMs Inference", 2026, "trained", "softmax attention", "https://arxiv.org/abs/2604.07394"),
    Entry("attention/sinkhorn", "attention.trained.sinkhorn:Sinkhorn", "key block", "DialogLM: Pre-trained Model for Long Dialogue Understanding and Summarization", 2021, "trained", "softmax attention", "https://arxiv.org/abs/2109.02492"),
    Entry("attention/span", "attention.trained.span:Span", "key", "Self-Selected Attention Span for Accelerating Large Language Model Inference", 2024, "trained", "softmax attention", "https://arxiv.org/abs/2404.09336"),
    Entry("attention/forcing", "attention.trained.forcing:Forcing", "key block", "Sparse Forcing: Native Trainable Sparse Attention for Real-time Autoregressive Diffusion Video Generation", 2026, "none", "softmax attention", "https://arxiv.org/abs/2604.21221"),
    Entry("attention/gin", "attention.trained.gin:GIN", "key", "Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers", 2025, "trained", "softmax attention", "https://arxiv.org/abs/2501.02393"),
)
