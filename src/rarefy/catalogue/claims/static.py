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
        "which library is this file from, 256 tokens, 300 steps, one seed: 0.63 [0.55, 0.71] at 0.115 of the pairs, all attention 0.71, a window of 32 0.72 at 0.125",
        "docs/structured-attention.md"),
    Claim(
        "attention/window", "the first keys beside a window keep a model's text", "in part",
        "built-in model, 512 tokens: KL 0.330 at a quarter of the pairs, but sinks add little (0.233 with them at 25 %, 0.239 without at 23 %, "
        "window 64 of the frontier); of needles 12 %", "docs/benchmarks/static_frontier.md"),
    Claim(
        "attention/pattern", "patterns fixed beforehand lose needles", "holds",
        "16 needles in 512 tokens: windows 12 % at a quarter of the pairs, BigBird 17 % at a third, shards 24 % at a third; chosen by the "
        "query 99.5 % at a quarter", "docs/benchmarks/static_frontier.md"),
    Claim(
        "attention/star", "blocks that see an anchor, then a question that sees all, answer as dense attention does", "holds",
        "recall model, 512 tokens, blocks of 16 to 128: 0.96 to 0.98 of the needles, blocks alone 0.00 to 0.21", "docs/structured-attention.md"),
    Claim(
        "attention/star", "the anchor is what makes it work", "in part",
        "needles are found without it as well (0.96 to 1.00); built-in model, blocks of 64: KL 0.027 without and 0.019 with it",
        "docs/structured-attention.md"),
    Claim(
        "attention/combiner", "every key is seen, directly or by its region", "in part",
        "untrained, 512 tokens: needles 0.52 (mean, block 32), the direct set alone 0.02, a window of as many keys 0.13; KL 0.47 and more",
        "docs/structured-attention.md"),
    Claim(
        "attention/moa", "a window a head, chosen by what it does to the loss, beats one window", "holds",
        "built-in model, 512 tokens: KL 0.068 at a quarter of the pairs, one window with sinks 0.189; at half 0.038 and 0.065, by outputs "
        "0.002", "docs/structured-attention.md"),
    Claim(
        "attention/moa", "rules profiled at some lengths serve others", "in part",
        "profiled at 512 and used at 256: KL 0.364 / 0.090 / 0.040 at 0.1 / 0.25 / 0.5, one window 0.434 / 0.124 / 0.040",
        "docs/structured-attention.md"),
    Claim(
        "attention/lsg", "keys picked by norm extend local attention without training", "in part",
        "density 0.29: KL 0.121 by norm, 0.143 a window of the same density; the other selections 0.149 to 0.231", "docs/structured-attention.md"),
    Claim(
        "attention/swat", "sigmoid weights with balanced slopes train better under a window than softmax", "does not hold",
        "2 layers, width 128, context 256, 150 steps of 1024 tokens, window 32: 6.313 [6.150, 6.477] nats a token, softmax 6.067 [5.900, 6.234], dense "
        "6.500 [6.351, 6.649]", "docs/trained-attention.md"),
    Claim(
        "patterns/bigbird", "near, first and random keys approximate full attention", "does not hold",
        "built-in model, 512 tokens, untrained for it: KL 0.485 at 20 % of the pairs, a window 0.239 at 23 %; needles 10 and 12 %",
        "docs/benchmarks/static_frontier.md"),
    Claim(
        "patterns/sparse_transformer", "strided heads reach everything in two steps", "does not hold",
        "built-in model, 512 tokens, untrained for it: KL 2.80 at 19 % of the pairs, a window 0.239 at 23 %; needles 1 %",
        "docs/benchmarks/static_frontier.md"),
    Claim(
        "patterns/sparse_transformer_fixed", "fixed summaries reach everything in two steps", "does not hold",
        "built-in model, 512 tokens, untrained for it: KL 2.62 at 17 % of the pairs; needles 7 %", "docs/benchmarks/static_frontier.md"),
    Claim(
        "patterns/s2", "heads with different shards see all between them and beat one window", "in part",
        "built-in model, 512 tokens: needles 24 % at 34 % of the pairs and 52 % at 59 %, a window 28 % at 44 %; KL 0.164 at 34 % and 0.384 at "
        "19 %, a window 0.239 at 23 %", "docs/benchmarks/static_frontier.md"),
    Claim(
        "patterns/sda", "dilated heads widen the view at the cost of a window", "does not hold",
        "built-in model, 512 tokens, untrained for it: KL 2.94 at 21 % of the pairs; needles 2 %", "docs/benchmarks/static_frontier.md"),
    Claim(
        "patterns/longlora", "shifted chunks come near full attention", "in part",
        "built-in model, 512 tokens, as a mask, untrained for it: KL 0.316 at 25 % of the pairs, a window 0.239 at 23 %; needles 14 %",
        "docs/benchmarks/static_frontier.md"),
    Claim(
        "patterns/longgen", "few full layers keep what windows lose", "in part",
        "recall model: with its second layer full 1.00 of the needles at 55 % of the pairs, a window everywhere 0.33; with its first full "
        "0.06: it matters which", "docs/patterns.md"),
    Claim(
        "patterns/masformer", "not every layer needs long range", "holds",
        "recall model: full in one of two layers keeps 1.00 of key-value recall at 55 % of the pairs, windows of that density 0.08",
        "docs/patterns.md"),
)
