"""Claims about trained attention."""

from __future__ import annotations

from ..claim import Claim

DOC = "docs/trained-attention.md"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "attention/routing", "attention within learned clusters does what full attention does", "does not hold",
        "recall from scratch, 20 % of the pairs: the lookup in 16 tokens at loss 1.20 after 700 steps (dense 0.09 after 168); after 300 of them and 150 "
        "of 256 tokens 0.04 of the answers", DOC),
    Claim(
        "attention/sma", "a model learns to attend only at tokens that need it, without loss", "in part",
        "2 layers, width 128, context 256, 150 steps of 1024 tokens, without the paper's state-space path: 9.6 % of the pairs are left, loss 6.066 "
        "[5.887, 6.245], a window of 32 6.067, dense 6.500 [6.351, 6.649]; so few tokens teach nothing that needs far keys", DOC),
    Claim(
        "attention/moba", "with its last layers dense nothing is lost", "holds",
        "recall from scratch, blocks in the first of 2 layers at 21 % of its pairs: 99 % of the answers in 256 tokens after 50 steps, dense after 75", DOC),
    Claim(
        "attention/sparsek", "trained from the start, keys kept without the query's word still hold what is asked for from far", "in part",
        "recall from scratch, 256 tokens, 29 % of the pairs: 0.92 of answers 128 and more away after 150 steps, 0.76 of all; dense 1.00 after 75", DOC),
    Claim(
        "attention/moba", "trained with its blocks from the start it retrieves from far as dense attention does", "in part",
        "recall from scratch, 256 tokens, 21 % of the pairs: 0.66 of answers 128 and more away after 300 steps, window 0.01, dense 1.00 after 75", DOC),
    Claim(
        "attention/nsa", "trained from the start it retrieves from far as dense attention does", "does not hold",
        "recall from scratch, 256 tokens, 39 % of the pairs: 0.32 of answers 128 and more away after 200 steps, moba 0.66 after 300, a window 0.01, "
        "dense 1.00 after 75; the lookup in 16 tokens after 251 steps (dense 168)", DOC),
    Claim(
        "attention/nosa", "trained from the start it is near lossless", "does not hold",
        "recall from scratch: the lookup in 16 tokens after 177 steps (dense 168), then 0.20 of answers 128 and more away after 150 steps of 256 tokens at 25 % "
        "of the pairs (moba 0.58 of all, dense 1.00 after 75)", DOC),
    Claim(
        "attention/diff", "it finds key information better than dense attention", "in part",
        "recall from scratch, embeddings drawn with 0.125: 0.995 of the answers after 234 steps, dense after 243; best head 0.36 of its absolute weight on "
        "the answer, dense 0.948; with transformers' 0.02 not in 600 steps (0.11 of the answers)", DOC),
    Claim(
        "attention/moba", "trained with its blocks from the start it reaches the loss of dense attention", "holds",
        "2 layers, width 128, context 256, 400 steps: 5.076 [4.903, 5.249] nats a token at 22 % of the pairs, dense 5.173 [5.002, 5.344]", DOC),
    Claim(
        "attention/moba", "working key block by key block makes a query's own choice of blocks fast", "in part",
        "4096 tokens, 19 % of the pairs: forward 132 ms, query by query 329, dense 108; with backward 396, 781, 375", DOC),
    Claim(
        "attention/nsa", "trained from the start it reaches or beats the loss of dense attention", "holds",
        "2 layers, width 128, context 256, 400 steps: 5.122 [4.952, 5.292] nats a token, dense 5.173; its three branches hold 60 % of the pairs", DOC),
    Claim(
        "attention/fsa", "with key blocks outside, the same result is faster where few query heads share a key head", "holds",
        "2 query heads a key head, 1024 tokens: forward 10 ms against 38, with backward 30 against 68; 4096 tokens: 132 against 329", DOC),
    Claim(
        "attention/seer", "a gate distilled from the pooled map chooses better blocks than pooled scores do", "in part",
        "built-in model, 8.2 % kept: KL 0.635 against 0.662 of mean keys, attention mass 0.685 against 0.686; 23.2 %: 0.243 against 0.276", DOC),
    Claim(
        "attention/diff", "at equal steps its loss is below that of dense attention", "does not hold",
        "2 layers, width 128, 400 steps: 5.378 [5.213, 5.543] nats a token, dense 5.173 [5.002, 5.344]; of 4 heads it makes 2; embeddings drawn with 0.088, "
        "150 short steps: 6.087 and 5.947", DOC),
    Claim(
        "attention/diff", "what both maps see cancels, so that less weight lies on what does not matter", "does not hold",
        "weight below 1 / keys in layers 0 and 1: 12.6 % and 22.3 %, dense 15.9 % and 12.3 %; lambda ended at 0.45 and -0.22", DOC),
    Claim(
        "attention/sparsek", "time and memory are linear in the context", "holds",
        "k = 128, window 128: prefill 0.09, 0.18, 0.31, 0.65 s at 1024 to 8192 tokens (dense 0.02 to 0.82), 150 to 175 MB", DOC),
    Claim(
        "attention/sea", "the estimated map keeps what exact attention needs at a share of the keys", "holds",
        "built-in model, context 256, a quarter of the keys: 0.775 of the attention mass, KL 0.226; window and sinks 0.730 and 0.456", DOC),
    Claim(
        "attention/sea", "perplexity below that of the dense model", "does not hold", "built-in model, a quarter of the keys: loss 0.161 nats above dense", DOC),
    Claim(
        "attention/purbo", "about a hundred steps of training the indexer are enough", "holds",
        "recall model, gap 128, 100 steps of 8 windows: accuracy 1.000 at 19.5 and 22.5 % of the pairs; untrained 0.107", DOC),
    Claim(
        "attention/purbo", "few heads are retrieval heads", "does not hold", "recall model: 6 of 8 heads score 0.1 or more", DOC),
    Claim(
        "attention/shared_diff", "better than DIFF with fewer parameters", "does not hold",
        "context 256, 150 steps of 1024 tokens: 6.543 [6.399, 6.688] nats a token, DIFF 6.611 [6.472, 6.751]: no difference that shows; recall from scratch: "
        "0.97 of the answers after 298 steps (embeddings drawn with 0.3; with 0.125 not learned), DIFF 0.995 after 234 (0.125)", DOC),
    Claim(
        "attention/llsa", "trained with its blocks from the start it reaches the loss of dense attention", "holds",
        "2 layers, width 128, context 256, 150 steps of 1024 tokens: 6.236 [6.069, 6.404] nats a token at 31 % of the pairs, dense 6.500 [6.351, 6.649], a "
        "window of 32 6.067", DOC),
    Claim(
        "attention/sinklora", "sinks and fewer shifted heads lengthen a context better than LongLoRA's shifts", "in part",
        "recall model, 512 to 2,048 tokens, 30 steps of recall within 512: needles at 2,048 0.54 of answers, LongLoRA 0.48, dense 0.48, untrained 0.38; the other "
        "tasks level", "docs/structured-attention.md"),
    Claim(
        "attention/scca", "shifted cross chunks lengthen a context in training and keep the short one", "does not hold",
        "recall model, 512 to 2,048 tokens, 30 steps of recall within 512: needles at 2,048 0.18 of answers, untrained 0.38; at 512 0.92, untrained 1.00",
        "docs/structured-attention.md"),
    Claim(
        "attention/llsa", "with levels that grow as the logarithm of the context a query attends to O(k B log T) keys", "holds",
        "blocks of 16, top 8: 270, 321, 397 keys and means at 4096, 16384, 65536 tokens; one level 383, 1151, 4223", DOC),
    Claim(
        "attention/llsa", "means of what is passed over keep the output near dense attention", "in part",
        "1024 drifting keys, one level: error 0.306 with the paper's overlapping means, 1.516 without; 0.040 where each key counts once", DOC),
    Claim(
        "attention/nosa", "blocks chosen by importance alone keep most of the choice from one step to the next", "holds",
        "half of a budget of 0.25 steady: 0.930 of the blocks stay (least 0.500), 0.47 fetched a step; none steady: 0.779, 0.125, 1.41", DOC),
    Claim(
        "attention/biformer", "regions found by mean queries and keys hold what their tokens look for", "in part",
        "planted maps, 1 of 16 regions: always the wanted one where heads agree (0.52 to 0.56 of the mass); 0.31 of them where each has its own", DOC),
    Claim(
        "attention/sparsifiner", "a low-rank map spread by a learned basis finds the keys that matter", "in part",
        "recall model, a tenth of the keys: accuracy 0.92, 0.488 of the attention mass; low-rank scores alone (dsv) 1.00 and 0.715", DOC),
    Claim(
        "attention/spt", "the number of shared codes ranks keys as their scores do", "in part",
        "recall model, a tenth of the keys: accuracy 0.57, untrained codes 0.50, random blocks 0.09; 0.322 of the mass, dsv 0.715", DOC),
    Claim(
        "attention/dsv", "low-rank scores learned beside the model find the keys that matter", "holds",
        "recall model, rank 8 of 32, a tenth of the keys, 100 steps: accuracy 1.00, 0.715 of the attention mass", DOC),
    Claim(
        "attention/flux", "routers alone, trained on a frozen model, find the layers and requests that need full attention", "holds",
        "recall model, price 2: full layers 0, 1 for far requests and 0, 0 for near ones, accuracy 0.998 and 1.000; a window everywhere 0.006 far", DOC),
    Claim(
        "attention/sinkhorn", "balancing finds each block's partner through the output alone", "in part",
        "planted partners of 8 blocks, 150 steps: all found (0.13 before); causal balancing of one round 0.33, two 0.26, rows alone 1.00", DOC),
    Claim(
        "attention/span", "a model can name what it needs and read nothing else without losing answers", "holds",
        "arithmetic of four groups: 0.960 right with its masks, 0.945 without, 69 % of entries read; of eight groups 0.255 and 0.235 (not learned)", DOC),
    Claim(
        "attention/forcing", "a small persistent memory keeps the blocks that a stream comes back to", "holds",
        "three kinds that recur once in 24 blocks: held 91 % of the time by a memory of six, 41 % by the six newest", DOC),
    Claim(
        "attention/gin", "the adapter generalises better than LoRA at equal parameters", "does not hold",
        "120 steps on new source, held-out loss gained: GIN -0.010 [-0.019, 0.000], LoRA 0.003 [-0.003, 0.010] nats a token", DOC),
)
