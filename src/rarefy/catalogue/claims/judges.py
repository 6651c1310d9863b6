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
)
