"""Claims about attention that chooses by content, without training."""

from __future__ import annotations

from ..claim import Claim

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "attention/quest", "few pages read by their bounds are enough for a decoding step, where pages chosen without the query fail", "holds",
        "recall model, 228 tokens: 98 % of the answers at a quarter of the keys, window and sinks 1 %, random pages 26 %", "docs/dynamic-attention.md"),
    Claim(
        "attention/adaspa", "the log-sum-exp of an earlier step finds later steps' blocks as well as an exact search", "holds",
        "built-in model, 512 tokens, 20 % of the blocks of 16; attention kept at a drift of 0.1 / 0.5 / 1 of the inputs' spread: 0.832 / 0.804 / 0.676, "
        "exact search 0.832 / 0.809 / 0.682, old mask 0.831 / 0.790 / 0.616; drift is noise here, not denoising", "scripts/dynamic_masses.py"),
    Claim(
        "attention/adaspa", "budgets by head lose less than even ones at the same mean", "in part",
        "built-in model, a quarter of the blocks: the worst head of 24 keeps 0.69 of its attention, 0.54 with even budgets (0.29 and 0.28 at a tenth); but "
        "KL is 0.205 and 0.195 (0.592 and 0.582)", "scripts/dynamic_masses.py"),
    Claim(
        "attention/chunked", "budgets refined by recall on calibration text hold that recall on other text", "holds",
        "built-in model, targets 0.8 / 0.9 / 0.95: the mean head keeps 0.84 / 0.92 / 0.96 of unseen text, the worst 0.79 / 0.88 / 0.94",
        "scripts/dynamic_masses.py"),
    Claim(
        "attention/chunked", "budgets by recall lose less than equal ones", "holds",
        "built-in model, 18 / 28 / 38 % of the pairs: KL 0.206 / 0.091 / 0.048, vertical-slash with equal shares over the whole context "
        "0.316 / 0.202 / 0.134", "scripts/dynamic_masses.py"),
    Claim(
        "attention/antidiagonal", "antidiagonals of tiles meet every vertical and slash line", "in part",
        "planted lines, tiles of 8: a column and diagonals 47 and 49 keys back are found in all 8 blocks, one 48 back is missed in 4 or more, for on an "
        "antidiagonal of an even tile distances are odd", "tests/attention/test_dynamic_more.py"),
    Claim(
        "attention/antidiagonal", "antidiagonals tell heavy blocks better than block means", "does not hold",
        "built-in model, 24 % of the blocks of 16: 0.806 of the attention kept with tiles of 4, 0.801 of 8, block means 0.828; the first block, always "
        "kept, is most of the difference", "scripts/dynamic_masses.py"),
    Claim(
        "attention/flex_prefill", "heads differ in whether block means can be trusted", "holds",
        "built-in model, blocks of 16: a divergence below 0.1 / 0.2 / 0.3 in 4 / 32 / 60 % of the heads", "scripts/dynamic_masses.py"),
    Claim(
        "attention/quest_top_p", "top-p of page bounds adapts where a count cannot", "in part",
        "built-in model: KL 0.298 at 9 % of the pairs and 0.068 at 21 %, a count 0.626 at 8 % and 0.220 at 23 %; recall model at a quarter: 44 % of the "
        "answers, a count 98 %", "docs/dynamic-attention.md"),
)
