"""Claims about policies of the key-value cache."""

from __future__ import annotations

from ..claim import Claim

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "cache/window", "the first few entries and a window keep language modelling going", "in part",
        "built-in model, KL 0.030 at half and 0.421 at a tenth of the entries (random 0.367, 1.243); recall of other questions 0.53 and 0.02", "docs/kv-cache.md"),
    Claim(
        "cache/h2o", "the entries with most accumulated attention, with the newest, keep accuracy in a small part of the cache", "does not hold",
        "at a quarter KL 0.251 (random 0.769, window 0.154) and 0.41 of the other questions; at half 0.065 and 0.76; at the same bytes behind a window",
        "docs/kv-cache.md"),
    Claim(
        "cache/snapkv", "what the prompt's last queries read is what the answer needs", "in part",
        "at a tenth of the entries the question in the prompt 1.00, others about the same context 0.13; KL 0.215 (window 0.421)", "docs/kv-cache.md"),
    Claim(
        "cache/pages", "few pages chosen by their bounds at each step are enough, with nothing evicted", "holds",
        "reading a tenth: 0.96 of the questions asked again, 0.88 of others, KL 0.094; bytes 1.13 of a dense cache", "docs/kv-cache.md"),
    Claim(
        "cache/mustafar", "70 % of the channels can go, token by token, without loss", "in part",
        "half of the channels: recall 1.00, KL 0.021 at 0.57 of the bytes; a quarter: 0.99 of other questions, KL 0.188; at half the bytes 0.99 and 0.029",
        "docs/kv-cache.md"),
    Claim(
        "cache/csr", "about one bit a channel keeps the quality", "not tested",
        "needs quantised weights; with float32 weights recall 1.00 and KL 0.002 at 0.77 of the bytes, 1.00 and 0.018 at half, 0.99 and 0.187 at a quarter",
        "docs/kv-cache.md"),
    Claim(
        "cache/shadow", "low-rank keys and few chunks by landmark are enough", "in part",
        "rank and chunks a quarter: 0.92 of other questions, KL 0.030; a tenth: 0.80, 0.168; in fast memory 0.42 and 0.32 of the built-in model's cache",
        "docs/kv-cache.md"),
    Claim(
        "cache/shared", "similar layers can share attention weights at little loss", "does not hold",
        "without fine-tuning: built-in model KL 1.019 with three of six layers merged, recall model 0.00 of the questions", "docs/kv-cache.md"),
    Claim(
        "cache/alisa", "half newest, half lately attended entries make attention very sparse at negligible loss", "does not hold",
        "reading a quarter: question asked again 1.00, others 0.32, KL 0.208 (window 0.154)", "docs/kv-cache.md"),
    Claim(
        "cache/probe", "a probe weighted by activations retrieves the blocks that matter", "in part",
        "single steps reading a quarter of the blocks: KL 0.043, 0.64 of other questions; a tenth: 0.213 and 0.02 (bounds of pages: 0.88)", "docs/kv-cache.md"),
    Claim(
        "cache/adore", "a controller names the tokens that count and rebuilds them, near full attention", "in part",
        "at half: 0.94 of other questions, KL 0.118 (random 0.367, window 0.030); at a tenth 0.81, 0.322 (window 0.421); the model is not finetuned along as the paper does", "docs/kv-cache.md"),
    Claim(
        "cache/attamba", "chunk states cost 5 % of perplexity at a quarter of the cache", "not tested",
        "needs training with state-space models in place of the projections; fitted decays alone give KL 0.592 at a quarter, window 0.154", "docs/kv-cache.md"),
    Claim(
        "cache/sentinel", "trained sentinels hold what spans said", "not tested",
        "needs a model trained with sentinel_loss; none here has been", "docs/kv-cache.md"),
)
