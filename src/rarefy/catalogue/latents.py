"""Dictionaries."""

from __future__ import annotations

from .entry import Entry

_AE = "autoencoder of activations"
_SCALING = "Scaling and evaluating sparse autoencoders"
_BOARDS = "Measuring Progress in Dictionary Learning for Language Model Interpretability with Board Game Models"
_CHOICE = "Adaptive Sparse Allocation with Mutual Choice & Feature Choice Sparse Autoencoders"
ENTRIES: tuple[Entry, ...] = (
    Entry("latents/random", "latents.random:RandomDictionary", "latent", "baseline: random unit directions, top k by inner product", 2024, "none", _AE, baseline=True),
    Entry("latents/relu", "latents.relu:ReLU", "latent", "Towards Monosemanticity: Decomposing Language Models With Dictionary Learning", 2023, "trained", _AE, "https://transformer-circuits.pub/2023/monosemantic-features"),
    Entry("latents/gated", "latents.gated:Gated", "latent", "Improving Dictionary Learning with Gated Sparse Autoencoders", 2024, "trained", _AE, "https://arxiv.org/abs/2404.16014"),
    Entry("latents/topk", "latents.topk:TopK", "latent", _SCALING, 2024, "trained", _AE, "https://arxiv.org/abs/2406.04093"),
    Entry("latents/abs_topk", "latents.abs_topk:AbsTopK", "latent", "AbsTopK: Rethinking Sparse Autoencoders For Bidirectional Features", 2025, "trained", _AE, "https://arxiv.org/abs/2510.00404"),
    Entry("latents/group_max", "latents.group_max:GroupMax", "latent", "sparsify: group-max activation of TopK autoencoders", 2025, "trained", _AE, "https://github.com/EleutherAI/sparsify"),
    Entry("latents/annealed_topk", "latents.annealed_topk:AnnealedTopK", "latent", "Llama Scope: Extracting Millions of Features from Llama-3.1-8B with Sparse Autoencoders", 2024, "trained", _AE, "https://arxiv.org/abs/2410.20526"),
    Entry("latents/top_afa", "latents.top_afa:TopAFA", "latent", "Evaluating and Designing Sparse Autoencoders by Approximating Quasi-Orthogonality", 2025, "trained", _AE, "https://arxiv.org/abs/2503.24277"),
    Entry("latents/gradient_topk", "latents.gradient_topk:GradientTopK", "latent", "Features that Make a Difference: Leveraging Gradients for Improved Dictionary Learning", 2024, "trained", _AE, "https://arxiv.org/abs/2411.10397"),
    Entry("latents/k_sparse", "latents.k_sparse:KSparse", "latent", "k-Sparse Autoencoders", 2013, "trained", _AE, "https://arxiv.org/abs/1312.5663"),
    Entry("latents/batch_topk", "latents.batch_topk:BatchTopK", "latent", "BatchTopK Sparse Autoencoders", 2024, "trained", _AE, "https://arxiv.org/abs/2412.06410"),
    Entry("latents/cross_layer", "latents.cross_layer:CrossLayer", "latent", "Circuit Tracing: Revealing Computational Graphs in Language Models", 2025, "trained", "MLPs of several layers", "https://transformer-circuits.pub/2025/attribution-graphs/methods.html"),
    Entry("latents/jumprelu", "latents.jumprelu:JumpReLU", "latent", "Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders", 2024, "trained", _AE, "https://arxiv.org/abs/2407.14435"),
    Entry("latents/matryoshka", "latents.matryoshka:Matryoshka", "latent", "Learning Multi-Level Features with Matryoshka Sparse Autoencoders", 2025, "trained", _AE, "https://arxiv.org/abs/2503.17547"),
    Entry("latents/nested_topk", "latents.nested_topk:NestedTopK", "latent", "Interpreting CLIP with Hierarchical Sparse Autoencoders", 2025, "trained", _AE, "https://arxiv.org/abs/2502.20578"),
    Entry("latents/mutual_choice", "latents.mutual_choice:MutualChoice", "latent", _CHOICE, 2024, "trained", _AE, "https://arxiv.org/abs/2411.02124"),
    Entry("latents/feature_choice", "latents.feature_choice:FeatureChoice", "latent", _CHOICE, 2024, "trained", _AE, "https://arxiv.org/abs/2411.02124"),
    Entry("latents/matching_pursuit", "latents.matching_pursuit:MatchingPursuit", "latent", "From Flat to Hierarchical: Extracting Sparse Representations with Matching Pursuit", 2025, "trained", _AE, "https://arxiv.org/abs/2506.03093"),
    Entry("latents/archetypal", "latents.archetypal:Archetypal", "latent", "Archetypal SAE: Adaptive and Stable Dictionary Learning for Concept Extraction in Large Vision Models", 2025, "trained", _AE, "https://arxiv.org/abs/2502.12892"),
    Entry("latents/mutual_feature", "latents.mutual_feature:MutualFeature", "latent", "Enhancing Neural Network Interpretability with Feature-Aligned Sparse Autoencoders", 2024, "trained", _AE, "https://arxiv.org/abs/2411.01220"),
    Entry("latents/p_annealed", "latents.p_annealed:PAnnealed", "latent", _BOARDS, 2024, "trained", _AE, "https://arxiv.org/abs/2408.00113"),
    Entry("latents/gated_p_annealed", "latents.gated_p_annealed:GatedPAnnealed", "latent", _BOARDS, 2024, "trained", _AE, "https://arxiv.org/abs/2408.00113"),
    Entry("latents/sparse_coding", "latents.coding.sparse_coding:SparseCoding", "latent", "Emergence of simple-cell receptive field properties by learning a sparse code for natural images", 1996, "trained", _AE, "https://doi.org/10.1038/381607a0"),
    Entry("latents/omp", "latents.coding.omp:OMP", "latent", "Orthogonal Matching Pursuit: Recursive Function Approximation with Applications to Wavelet Decomposition", 1993, "trained", _AE, "https://doi.org/10.1109/ACSSC.1993.342465"),
)
