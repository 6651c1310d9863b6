"""Claims about patterns and structured attention."""

from __future__ import annotations

from ..claim import Claim

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "layers/fdgatii", "with the initial residual and the identity mapping graph attention stays deep without washing nodes out", "holds",
        "planted heterophilic graph: 0.99 of held-out nodes right at 2 to 16 layers; a GAT 0.99 at 2, 0.38 at 4 and chance from 8 on. The residual does it: "
        "without it 0.23 at 8 layers, without the identity mapping 0.99", "scripts/graph_depth.py"),
    Claim(
        "layers/fdgatii", "dynamic attention does better than static attention", "does not hold",
        "the same at every depth (0.99 to 1.00) on a planted graph on which any mean over neighbours tells the class; what static scores cannot rank at all is "
        "in tests/attention/test_structured_layers.py", "docs/structured-attention.md"),
    Claim(
        "layers/hdt", "a kernel that sorts keys by level skips most of the work", "holds",
        "eight modules of the standard library, tiles of 32: 5.3 % of the tiles at 4,096 positions, 21 % in the order of the text; at 1,024 24 % and 32 %",
        "docs/structured-attention.md"),
    Claim(
        "layers/hat", "interleaving segment-wise and cross-segment layers throughout works best", "does not hold",
        "which library is this file from, 256 tokens, two seeds: interleaved 0.66 [0.58, 0.73], early 0.70, late 0.72, ad hoc 0.68, segments that never meet 0.70",
        "docs/structured-attention.md"),
    Claim(
        "layers/hat", "as good as a window of equal size at less memory and time", "in part",
        "256 tokens: late 0.72 [0.66, 0.79] and a window of 64 0.73 [0.66, 0.80], with 0.133 and 0.238 of the pairs; 0.5 % of the pairs at 4,096 tokens",
        "docs/structured-attention.md"),
    Claim(
        "layers/deformable", "few sampled points a query do what attention to all cells does", "does not hold",
        "digits in 16 x 16 pictures, 1,000 steps: 256 cells 0.94, 16 cells 0.51, 0.57 if the points may not move, 0.23 with adaptive mixing; the papers train far longer",
        "scripts/sample_pictures.py"),
    Claim(
        "attention/longlora", "training on under shifted groups and serving dense lengthens a context nearly as well as dense training", "in part",
        "recall model, 512 to 2,048 tokens, 30 steps, needles at 2,048 (untrained 0.38): recall within 512 tokens 0.48 by either; recall at any distance 0.84 by "
        "dense steps and 0.23 by shifted groups, which hide most answers from two layers", "docs/structured-attention.md"),
    Claim(
        "layers/hdt", "converges faster and learns from fewer samples than attention without structure", "does not hold",
        "which library is this file from, 256 tokens, 300 steps, one seed: 0.28 [0.20, 0.36], all attention 0.71, a window of 32 0.72; at 0.115 of the pairs",
        "docs/structured-attention.md"),
)
