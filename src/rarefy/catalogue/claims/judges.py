"""Claims about tasks, evaluations and kernels."""

from __future__ import annotations

from ..claim import Claim

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "tasks/attention_suite", "decoding tolerates more sparsity than prefill", "holds",
        "Quest at a quarter of the keys: MQAR 0.69 in prefill and 1.00 in decoding, text 0.88 and 0.97 of dense (512 tokens)", "docs/attention-suite.md"),
    Claim(
        "tasks/attention_suite", "even moderate sparsity badly hurts at least one task, which the mean hides", "holds",
        "Quest at a quarter in decoding loses 21 % on average and 100 % of averaging; top-k of exact scores loses none at 5 %", "docs/attention-suite.md"),
    Claim(
        "tasks/attention_suite", "longer sequences tolerate higher sparsity", "in part",
        "decoding, recall models, least density within 5 points of dense at 512 and 8,192 tokens: Quest 0.24 to 0.05 (needles, variables, turns), HiP, a "
        "window and random pages 1.00 at both", "docs/attention-suite.md"),
    Claim(
        "tasks/turns", "caches that drop entries fail from the second question on, caches that only choose what to read do not", "holds",
        "SnapKV at 5 %: first turn always right, second never, sixth in a quarter of the sequences; Quest at a quarter 1.00 in every turn",
        "docs/attention-suite.md"),
    Claim(
        "tasks/mqar", "attention recalls where a fixed local mixer cannot; loss on text hides it", "holds",
        "a window of a quarter keeps 0.91 of text in decoding, 0.55 of what stood 64 to 255 tokens back, and no pair of MQAR", "docs/attention-suite.md"),
    Claim(
        "tasks/retrieval_heads", "few heads retrieve, and without them the model cannot copy from context", "holds",
        "built-in model: 5 of 24 heads; copying 46 % before, 0 % without them, 57 to 68 % without five others. Recall model: all four heads of layer 1",
        "docs/attention-suite.md"),
    Claim(
        "tasks/averaging", "one attention unit whose width grows with q log n averages q named positions", "holds",
        "closed form over 8 of the positions is exact to rounding for dense attention; choosing by pages of 8 loses all of it at a quarter of the keys",
        "docs/attention-suite.md"),
    Claim(
        "kernels/paged", "reading a shared beginning once for all requests saves time", "holds",
        "16 requests, 4,096 shared and 256 own keys, one CPU thread: 33 ms a layer, 63 ms where each reads its own; 8,192 keys read in place of 69,632",
        "scripts/serve_pages.py"),
    Claim(
        "kernels/paged", "cutting long requests evens out the load", "holds",
        "one request of 32,768 keys among 15 of 256: each of 8 workers gets 4,576 keys; no worker has more than an even share and one piece",
        "tests/attention/test_schedule.py"),
    Claim(
        "kernels/irregular", "dropping or sorting queries and keys saves time on exact attention to what is left", "in part",
        "4,096 tokens, forward, plan counted: 1.4 times as fast with half kept, 2.8 times with a quarter; 16 buckets visit 12 % of the tiles but the plan costs "
        "more than dense attention unless several layers share it", "scripts/serve_pages.py"),
    Claim(
        "kernels/irregular", "language models train as well with dropped or hashed attention at 8k and 16k tokens", "not tested",
        "would take training language models at these lengths; gradients are those of dense attention under the same mask", "tests/attention/test_irregular.py"),
    Claim(
        "tasks/sources", "processing longer text helps", "in part",
        "one seed: all attention 0.69 [0.62, 0.76] at 128 tokens and 0.75 [0.68, 0.83] at 256, the bag 0.43 and 0.46: upwards, with intervals that overlap",
        "docs/attention-suite.md"),
    Claim(
        "tasks/sources", "a small local window with a few global tokens is enough; a global token matters where evidence is scattered", "holds",
        "files: window 32 0.67, all attention 0.69; scattered evidence: window 8 0.48, which is chance, and 1.00 with one global token", "docs/attention-suite.md"),
    Claim(
        "tasks/sources", "how segments overlap and are pooled matters to hierarchical readers", "does not hold",
        "segments of 32, four pools, with and without overlap: 0.64 to 0.71, all intervals overlapping; scattered evidence 1.00 with each tried",
        "docs/attention-suite.md"),
)
