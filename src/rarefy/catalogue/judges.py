"""Tasks with known answers and evaluations."""

from __future__ import annotations

from .entry import Entry

_RULER = "RULER: What's the Real Context Size of Your Long-Context Language Models?"

ENTRIES: tuple[Entry, ...] = (
    Entry("tasks/mqar", "tasks.recall:mqar", "key", "Zoology: Measuring and Improving Recall in Efficient Language Models", 2023, "none", "evaluation of attention", "https://arxiv.org/abs/2312.04927", kind="task", note="keys with values, asked for at gaps drawn from a power law"),
    Entry("tasks/needles", "tasks.needles:needles", "key", _RULER, 2024, "none", "evaluation of attention", "https://arxiv.org/abs/2404.06654", kind="task", note="several keys with values in filler, some asked for; one: tasks.recall.needle"),
    Entry("tasks/variables", "tasks.variables:variables", "key", _RULER, 2024, "none", "evaluation of attention", "https://arxiv.org/abs/2404.06654", kind="task", note="chains of definitions, one traced to its value"),
    Entry("tasks/averaging", "tasks.averaging:averaging", "key", "Representational Strengths and Limitations of Transformers", 2023, "none", "evaluation of attention", "https://arxiv.org/abs/2306.02896", kind="task", note="aggregation, solved in closed form; needs no model"),
    Entry("tasks/turns", "tasks.turns:turns", "key", "SCBench: A KV Cache-Centric Analysis of Long-Context Methods", 2024, "none", "evaluation of caches", "https://arxiv.org/abs/2412.10319", kind="task", note="one context, several questions, the cache kept between them"),
    Entry("tasks/retrieval_heads", "tasks.retrieval_heads:retrieval_scores", "head", "Retrieval Head Mechanistically Explains Long-Context Factuality", 2024, "none", "evaluation of heads", "https://arxiv.org/abs/2404.15574", kind="task", note="5 of the built-in model's 24 heads score 0.3 or more; without them copying falls from 46 % to 0, without 5 others it does not fall"),
    Entry("tasks/attention_suite", "jobs.attention_suite:attention_suite", "key", "The Sparse Frontier: Sparse Attention Trade-offs in Transformer LLMs", 2025, "none", "evaluation of attention", "https://arxiv.org/abs/2504.17768", kind="task", note="rarefy sweep METHODS MODEL --suite attention"),
)
