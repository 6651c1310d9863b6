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
    Entry("tasks/sources", "tasks.sources:documents_of", "key", "Revisiting Transformer-based Models for Long Document Classification", 2022, "none", "evaluation of attention", "https://arxiv.org/abs/2204.06683", kind="task", note="which library is this file from; windows, global tokens, segments with overlap and pooling; scattered evidence"),
    Entry("kernels/block_attention", "kernels.block_attention:block_attention", "key block", "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", 2022, "none", "softmax attention", "https://arxiv.org/abs/2205.14135", kind="kernel", note="its block-sparse form: tiles, running maximum and sum, recomputation in the backward pass; CPU, Triton and plain torch"),
    Entry("kernels/paged", "kernels.block_attention.paged:Paged", "key block", "FlashInfer: Efficient and Customizable Attention Engine for LLM Inference Serving", 2025, "none", "decoding of a batch", "https://arxiv.org/abs/2501.01005", kind="kernel", note="page tables, even pieces, shared beginnings read once; its code generation from templates is not here"),
    Entry("kernels/irregular", "kernels.block_attention.irregular:Irregular", "key block", "Faster Causal Attention Over Large Sequences Through Sparse Flash Attention", 2023, "none", "causal attention", "https://arxiv.org/abs/2306.01160", kind="kernel", note="queries and keys dropped a head, or sorted by the buckets of a hash"),
)
