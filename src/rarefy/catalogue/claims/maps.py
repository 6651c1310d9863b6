"""Claims about maps to probabilities."""

from __future__ import annotations

from ..claim import Claim

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "attention/entmax", "heads learn how sparse to be", "holds",
        "four heads with targets made at alpha 1.1, 1.1, 1.9, 1.9 end within 0.05 of them", "tests/attention/test_mapped.py"),
    Claim(
        "attention/entmax", "attention can be sparse at little loss", "in part",
        "built-in model, 512 tokens, 1.5-entmax for softmax without training: 0.8 % of the pairs have weight, outputs differ by 0.22 of their "
        "size; sparsemax 0.5 % and 0.29", "scripts/dynamic_claims.py"),
    Claim(
        "attention/pladis", "going past sparse attention reads a noisy key better", "holds",
        "planted key among 400 with noise: strengths 1 and 2 have less error than softmax (strength 0)", "tests/maps/test_other_maps.py"),
    Claim(
        "attention/top_k", "few of the scores are enough", "holds",
        "5 % of the keys keep every task of the suite at 512 tokens, prefill and decoding; KL on text 0.015", "docs/benchmarks/static_frontier.md"),
    Claim(
        "attention/statistical_top_k", "two moments find the k highest without sorting", "in part",
        "asked for 2 / 10 / 25 %: normal scores 2.0 / 10.0 / 25.0, Laplace 2.7 / 8.2 / 19.3, the built-in model's 2.2 / 8.3 / 20.1",
        "scripts/dynamic_claims.py"),
    Claim(
        "attention/sigmoid", "sigmoid attention trains as well as softmax", "not tested",
        "takes models trained with both", "docs/maps.md"),
    Claim(
        "attention/rela", "rectified scores train as well as softmax and are sparser", "not tested",
        "takes models trained with both", "docs/maps.md"),
    Claim(
        "maps/entmax", "the exact map costs little beside softmax", "in part",
        "8 x 131,072, one thread: 5.9 ms at alpha 1.3, bisection of the entmax package 105.8, softmax 0.5", "docs/maps.md"),
    Claim(
        "maps/sparsemax", "sparse probabilities with exact zeros at the cost of a sort", "holds",
        "8 x 512 x 512, one thread: 4.0 ms, the entmax package 30.2, softmax 1.0", "docs/maps.md"),
    Claim(
        "maps/entmax15", "an exact algorithm for 1.5", "holds",
        "8 x 512 x 512, one thread: 7.3 ms and an error of 7e-8, the entmax package 32.2 ms and 6e-7", "docs/maps.md"),
    Claim(
        "tasks/ngram", "heads of sparsemax are n-gram models exactly, those of softmax are not", "holds",
        "n = 2, 3, 4: one-hot weights and the table's probabilities; softmax in the same layer is off by more than 1e-3", "docs/maps.md"),
)
