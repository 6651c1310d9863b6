"""Sparse coding beyond dictionaries of activations."""

from __future__ import annotations

from .entry import Entry

_LASSO = "one product with an encoder"
_KERNELS = "Kernel Heterogeneity Improves Sparseness of Natural Images Representations"
ENTRIES: tuple[Entry, ...] = (
    Entry("coding/fista", "latents.coding.ista:fista", "code", "A Fast Iterative Shrinkage-Thresholding Algorithm for Linear Inverse Problems", 2009, "none", _LASSO, "https://doi.org/10.1137/080716542", kind="coding", note="ISTA with accelerate=False"),
    Entry("coding/coordinate_descent", "latents.coding.coordinate:coordinate_descent", "code", "Regularization Paths for Generalized Linear Models via Coordinate Descent", 2010, "none", _LASSO, "https://doi.org/10.18637/jss.v033.i01", kind="coding", note="the lasso's part; F^2 numbers of memory"),
    Entry("coding/pursuit", "latents.coding.pursuit:pursuit", "code", "Gradient Pursuits", 2008, "none", _LASSO, "https://doi.org/10.1109/TSP.2007.916124", kind="coding", note="also orthogonal matching pursuit, and both over codes >= 0"),
    Entry("coding/penalties", "latents.coding.penalty:proximal", "code", "Beyond ell_1 sparse coding in V1", 2023, "none", "soft threshold", "https://arxiv.org/abs/2301.10002", kind="coding", note="soft, hard, half, two_thirds, cel0"),
    Entry("coding/resolved", "latents.coding.resolve:resolved", "latent", "Decomposing The Dark Matter of Sparse Autoencoders", 2024, "none", "encoder of a trained dictionary", "https://arxiv.org/abs/2410.14670", kind="coding", note="its mitigation: codes solved for on the decoder"),
    Entry("coding/convolutional", "latents.coding.convolutional:convolutional_codes", "code", _KERNELS, 2023, "none", "convolution", "https://arxiv.org/abs/2312.14685", kind="coding", note="on banks of log-Gabors or any other kernels"),
    Entry("coding/learned_bank", "latents.coding.learned_bank:learn_bank", "code", _KERNELS, 2023, "trained", "fixed bank of kernels", "https://arxiv.org/abs/2312.14685", kind="coding", note="learns orientations, bandwidths and frequencies, not free pixels"),
    Entry("coding/crate", "latents.coding.crate:Crate", "token", "White-Box Transformers via Sparse Rate Reduction", 2023, "trained", "transformer", "https://arxiv.org/abs/2306.01129", kind="coding", note="a classifier of MSSA and ISTA layers"),
    Entry("coding/coding_rate", "latents.coding.crate:coding_rate", "token", "White-Box Transformers via Sparse Rate Reduction: Compression Is All There Is?", 2023, "none", "loss by layer", "https://arxiv.org/abs/2311.13110", kind="coding", note="the measure; subspace_rate for R^c"),
    Entry("coding/nmf", "latents.coding.nmf:structured_nmf", "code", "Structured Sparse Method for Hyperspectral Unmixing", 2014, "trained", "NMF", "https://arxiv.org/abs/1403.4682", kind="coding", note="sparse and graph-regularised; plain NMF at 0 and 0"),
    Entry("coding/cca", "latents.coding.cca:sparse_cca", "feature", "Sparse Canonical Correlation Analysis", 2011, "trained", "kernel CCA", "https://arxiv.org/abs/0908.2724", kind="coding", note="features of one view, samples of the other"),
    Entry("coding/source_selection", "latents.coding.source_selection:select_sources", "task", "Improved Active Multi-Task Representation Learning via Lasso", 2023, "trained", "an even share of samples a task", "https://arxiv.org/abs/2306.02556", kind="coding", note="the older L2 rule too"),
    Entry("coding/gabor", "latents.coding.gabor:fit_gabors", "atom", "An evaluation of the two-dimensional Gabor filter model of simple receptive fields in cat striate cortex", 1987, "none", "looking at atoms", "https://doi.org/10.1152/jn.1987.58.6.1233", kind="coding", note="a measure of atoms: how well a Gabor fits, and which"),
    Entry("coding/whitened", "latents.coding.patches:whitened", "pixel", "Sparse coding with an overcomplete basis set: A strategy employed by V1?", 1997, "none", "raw pixels", "https://doi.org/10.1016/S0042-6989(97)00169-7", kind="coding", note="its filter; patches cuts the rows"),
)
