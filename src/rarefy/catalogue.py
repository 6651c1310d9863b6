"""One line a method. The CLI's list, the docs' table, the loader and the contract tests all read this."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from .errors import BadInput

if TYPE_CHECKING:
    from .method import Sparse


@dataclass(frozen=True)
class Entry:
    """A method's card."""

    name: str
    target: str
    """"module:Class" below rarefy."""
    unit: str
    title: str
    """Exact title of the paper, or what the baseline is."""
    year: int
    fitted: str
    """none | calibrated | trained"""
    replaces: str
    """What dense thing it stands in for."""
    link: str = ""
    baseline: bool = False

    def load(self) -> type[Sparse]:
        """The method's class; this is where torch is imported."""
        module, _, cls = self.target.partition(":")
        return getattr(import_module(f"rarefy.{module}"), cls)


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
    Entry("weights/random", "weights.random:RandomWeights", "weight", "baseline: weights kept at random", 2015, "none", "linear layer", baseline=True),
    Entry("weights/magnitude", "weights.magnitude:Magnitude", "weight", "Learning both Weights and Connections for Efficient Neural Networks", 2015, "none", "linear layer", "https://arxiv.org/abs/1506.02626", baseline=True),
    Entry("weights/wanda", "weights.wanda:Wanda", "weight", "A Simple and Effective Pruning Approach for Large Language Models", 2023, "calibrated", "linear layer", "https://arxiv.org/abs/2306.11695"),
    Entry("neurons/random", "neurons.random:RandomNeurons", "neuron", "baseline: inputs of a linear layer kept at random", 2024, "none", "linear layer", baseline=True),
    Entry("neurons/teal", "neurons.teal:Teal", "neuron", "Training-Free Activation Sparsity in Large Language Models", 2024, "calibrated", "linear layer", "https://arxiv.org/abs/2408.14690"),
    Entry("neurons/wina", "neurons.wina:Wina", "neuron", "WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference", 2025, "none", "linear layer", "https://arxiv.org/abs/2505.19427"),
    Entry("attention/random", "attention.random:RandomBlocks", "key block", "baseline: key blocks kept at random", 2020, "none", "softmax attention", baseline=True),
    Entry("attention/window", "attention.window:WindowSinks", "key", "Efficient Streaming Language Models with Attention Sinks", 2023, "none", "softmax attention", "https://arxiv.org/abs/2309.17453", baseline=True),
    Entry("attention/quest", "attention.quest:Quest", "key block", "QUEST: Query-Aware Sparsity for Efficient Long-Context LLM Inference", 2024, "none", "softmax attention", "https://arxiv.org/abs/2406.10774"),
)
_BY_NAME = {entry.name: entry for entry in ENTRIES}


def entry(name: str) -> Entry:
    """The card of a method, or BadInput listing the nearest names."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    near = difflib.get_close_matches(name, _BY_NAME, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(_BY_NAME)}"
    raise BadInput(f"unknown method {name!r}; {hint}")
