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
    Claim(
        "attention/quest", "pages chosen by the query find needles where patterns fixed beforehand lose them", "holds",
        "16 needles in 512 tokens, recall model: 92 % at a budget of 0.1 and 99.5 % at 0.25; windows of 64 and 128 with sinks 12 and 28 %, "
        "S2's shards 24 and 52 %", "docs/benchmarks/static_frontier.md"),
    Claim(
        "attention/twilight", "top-p adapts to how far a head's attention spreads, where a fixed number fails on diffuse heads", "in part",
        "two peaked heads and two diffuse ones at 15 % of the pairs: errors of the diffuse fall from 1.61 and 1.51 to 0.92 and 0.87, of all "
        "heads together they rise from 0.345 to 0.457; built-in model: 0.983 of the attention at 8.4 % of the pairs, a fixed number 0.969 at "
        "10 %", "scripts/dynamic_claims.py"),
    Claim(
        "attention/magicpig", "sampled keys with importance weights beat the largest ones where attention is diffuse", "in part",
        "7.1 % of 4,096 keys, spread of the logits 0.25 / 1 / 6: values that follow keys, errors 3.30 / 0.66 / 0.64, top-k 6.41 / 1.18 / 0.00; "
        "values free of keys 5.35 / 2.31 / 0.75, top-k 3.07 / 1.77 / 0.00", "scripts/dynamic_claims.py"),
    Claim(
        "attention/double_sparsity", "a sixteenth of the channels ranks the keys", "does not hold",
        "built-in model, 512 tokens, a tenth of the keys: 0.72 of the attention with 1/16 of the channels (4 of 64), 0.91 with a quarter, 0.97 "
        "with every product", "scripts/dynamic_claims.py"),
    Claim(
        "attention/double_sparsity", "chosen channels keep what the dense model knows at a tenth of the keys", "in part",
        "recall model, 228 tokens, a quarter of the channels: 78 % of the answers at a tenth of the keys, 94 % at a quarter; KL on text 0.123 "
        "and 0.039", "docs/dynamic-attention.md"),
    Claim(
        "attention/loki", "keys lie near few directions, which rank them", "in part",
        "built-in model, 512 tokens: 22 to 46 of 64 components hold nine tenths of a head's variance; a tenth of the keys by a quarter of the "
        "components keeps 0.93 of the attention, 0.97 by all", "scripts/dynamic_claims.py"),
    Claim(
        "attention/vertical_slash", "columns and diagonals that the last queries show serve the whole prompt", "in part",
        "planted lines are all kept at 8 % of the pairs; built-in model, 512 tokens: KL 0.200 at a quarter of the pairs, a window with sinks "
        "0.330, twilight 0.004", "docs/dynamic-attention.md"),
    Claim(
        "attention/minference", "heads differ in the pattern that serves them best, and each having its own loses less", "in part",
        "built-in model, 512 tokens: of 24 heads 17 take the window with sinks, 7 columns and diagonals, none blocks; attention kept 0.868 at "
        "22 % of the pairs, columns and diagonals alone 0.863 at 23 %, the window 0.857 at 21 %", "scripts/dynamic_claims.py"),
    Claim(
        "attention/pooled", "products of block means tell which blocks matter", "in part",
        "recall model: 62 % of the answers at a quarter of the keys, Quest 98 %; built-in model: 0.868 of the attention at 23 % of the pairs",
        "docs/dynamic-attention.md"),
    Claim(
        "attention/sample", "a twentieth of the rows tells the columns that matter", "holds",
        "built-in model, 512 tokens, a quarter of the pairs: 0.887 of the attention by one row in 20, 0.913 by all rows",
        "scripts/dynamic_claims.py"),
    Claim(
        "attention/sample", "near-lossless with columns and a window", "does not hold",
        "recall model: 46 % of the answers at a quarter of the keys, for a column that one query needs is no column of all; KL on text 0.207",
        "docs/dynamic-attention.md"),
    Claim(
        "attention/sparge", "block means may be trusted where a block's tokens are alike, and only there", "in part",
        "planted, tau 0.9: alike, 0.997 of the attention at 8 % of the pairs; unlike, 0.876 at 87 % and with the guard everything; the guard "
        "keeps every block of the recall model, which without it answers 17 % at a quarter", "scripts/dynamic_claims.py"),
    Claim(
        "attention/random_tiles", "tiles left out at random cost little", "does not hold",
        "recall model: 36 % of the answers at 28 % of the pairs; KL on text 0.665", "docs/dynamic-attention.md"),
    Claim(
        "attention/hip", "a tournament finds the top keys in logarithmically many rounds, as neighbours score alike", "holds",
        "1 + log2(n / 2k) rounds; share of the top keys found 0.99 with keys smoothed over 32 places, 0.89 over 8, 0.23 where neighbours are "
        "unrelated", "docs/dynamic-attention.md"),
    Claim(
        "attention/tidal", "layers share the positions that matter, so that one layer's choice serves those behind it", "does not hold",
        "built-in model, 512 tokens, a tenth of the keys: layers 2 to 5 keep 0.34 / 0.51 / 0.52 / 0.22 of their attention by layer 1's "
        "positions, 0.97 to 0.99 by their own, 0.65 to 0.93 by a window; the two-layer recall model is no test, its selecting layer is the "
        "only one", "scripts/dynamic_claims.py"),
    Claim(
        "attention/squeezed", "centroids of alike keys find what matters better than pages in the order of the text", "holds",
        "built-in model, 512 tokens: clusters of 4 in segments of 64 keep 0.977 of the attention at 25 % of the pairs, pages of 4 by their "
        "bounds 0.957 at 30 %", "scripts/dynamic_claims.py"),
    Claim(
        "attention/lsh", "pairs that hash alike often enough are those that matter", "holds",
        "recall model: 75 % of the answers at 5 % of the pairs and 99 % at a quarter, random keys 26 %; KL on text 0.128 at 24 %",
        "docs/dynamic-attention.md"),
    Claim(
        "attention/scatterbrain", "sparse and low-rank together are better than either at every temperature", "in part",
        "error 0.49 against 1.01 sparse and 0.72 low-rank at a spread of 0.5; from 1.5 on the sparse part alone is better",
        "docs/dynamic-attention.md"),
    Claim(
        "attention/retrieval", "a graph that knows queries finds the top keys by looking at few, one of keys alone does not", "holds",
        "96 % of the top 32 of 4,096 keys by looking at 3.3 %, a graph of keys at 35 %", "docs/dynamic-attention.md"),
    Claim(
        "attention/lserve", "pages judged in parts keep more of what matters", "holds",
        "needles kept at 10 % of the pages: 50 / 53 / 61 / 69 / 75 % with parts of 64 / 32 / 16 / 8 / 4 keys", "docs/dynamic-attention.md"),
    Claim(
        "attention/lserve", "half of the heads may stream", "in part",
        "recall model: 35 % of the answers at 39 % of the pairs, for its few heads all retrieve (scripts/dynamic_recall.py lserve); built-in "
        "model: KL 0.153 at 25 % of the pairs, Quest 0.220 at 23 %", "docs/dynamic-attention.md"),
    Claim(
        "attention/zipvl", "the number of tokens adapts to the layer at an even error", "holds",
        "95 to 8 % of the tokens from spread to sharp attention, errors 0.08 to 0.10", "docs/dynamic-attention.md"),
    Claim(
        "attention/zipvl", "one set of tokens for all heads and queries keeps what the layer knows", "does not hold",
        "text instead of pictures: KL 1.851 at 24 % of the pairs, random blocks 0.762; recall 42 % at a quarter", "docs/dynamic-attention.md"),
    Claim(
        "attention/rettention", "the kept ratio of the normaliser repairs a very sparse pattern between dense steps", "holds",
        "planted local heads, 3.3 % of the keys: error 0.124 to 0.028 at a drift of 0.1 between steps; at a drift of 1 nothing is gained "
        "(0.137 and 0.141)", "docs/dynamic-attention.md"),
    Claim(
        "attention/sparse_d", "patterns of heads hardly change between denoising steps, so one choice serves a run", "not tested",
        "takes a diffusion language model; the rule is held against a loop in the tests", "docs/dynamic-attention.md"),
    Claim(
        "attention/sparse_video", "few sampled queries tell whether a head is spatial or temporal", "holds",
        "planted, 8 heads of 256 tokens: all right from 2 queries on, error 0.014 at 23 % of the pairs; all spatial 1.03, all temporal 1.11",
        "scripts/dynamic_claims.py"),
    Claim(
        "attention/permuted_blocks", "sorted keys fill fewer blocks at the same error", "in part",
        "planted, 96 heavy keys of 1,024: error 0.30 at 16 % of the pairs, unsorted 0.84 at 16 %; built-in model at 512 tokens it costs: 0.174 "
        "at 34 %, unsorted 0.140 at 33 %", "scripts/dynamic_claims.py"),
)
