"""What is peculiar to each trained attention method.

Shape letters: H, G = query and key heads; T, S = queries and keys; D = head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention_notes import D_HEAD, HEADS, KEYS, KV_HEADS, Notes, heads, moved_blocks
from .spec import Inputs

_SIZES = {"heads": HEADS, "key_heads": KV_HEADS, "d_head": D_HEAD}
_TRAINED_BAD = (({"heads": 0}, "heads"), ({"key_heads": 3}, "key_heads"), ({"d_head": 0}, "d_head"))


def with_hidden(batch: int, seed: int) -> Inputs:
    """`heads` and the 24-wide hidden state [B, 53, 24] that the layer was given."""
    generator = torch.Generator().manual_seed(seed + 1)
    return (*heads(batch, seed), torch.randn(batch, KEYS, 24, generator=generator))


def with_ids(batch: int, seed: int) -> Inputs:
    """`heads` and token ids [B, 53] of which thirteen kinds are markers."""
    return (*heads(batch, seed), torch.randint(20, (batch, KEYS), generator=torch.Generator().manual_seed(seed + 1)))


def selected_pairs(method: Any, inputs: Inputs) -> float:
    """Density of the selection branch alone: pairs of chosen blocks of pairs seen."""
    mask = method.select(*inputs).mask.repeat_interleave(method.block, 3)[..., :KEYS].tril()
    return float(mask.sum()) / (mask.shape[0] * mask.shape[1] * KEYS * (KEYS + 1) / 2)


def weighted(method: Any, inputs: Inputs) -> Tensor:
    """Dense causal attention with each key's own importance added to its logits."""
    q, k, v = inputs
    share = q.shape[1] // k.shape[1]
    score = q @ k.repeat_interleave(share, 1).mT / q.shape[-1] ** 0.5 + method.importance(v).repeat_interleave(share, 1)[:, :, None]
    later = ~torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return score.masked_fill(later, -torch.inf).softmax(-1) @ v.repeat_interleave(share, 1)


def image(batch: int, seed: int) -> Inputs:
    """q [B, 4, 64, 20], k and v [B, 2, 64, 20]: a map of 8 x 8."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, n, 64, D_HEAD, generator=generator) for n in (HEADS, KV_HEADS, KV_HEADS))


_NSA = Notes(
    arguments={**_SIZES, "hidden": 24, "block": 8, "compress": 8, "stride": 4, "window": 12, "local": 1}, inputs=with_hidden, dense=None,
    not_dense="three branches are mixed by gates", density=selected_pairs, slack=0.3, variants=({"phi": "mean"},),
    bad=(
        *_TRAINED_BAD, ({"stride": 3}, "stride"), ({"window": 0}, "window"), ({"top": -1}, "top"), ({"hidden": 0}, "hidden"), ({"phi": "max"}, "phi"),
    ),
)

TRAINED: dict[str, Notes] = {
    "attention/moba": Notes(
        variants=({"query_block": 8}, {"order": "queries"}), permuted=moved_blocks, not_permuted="",
        bad=(({"top": -1}, "top"), ({"order": "rows"}, "order")),
    ),
    "attention/seer": Notes(
        arguments={**_SIZES, "block": 8, "query_block": 1}, variants=({"query_block": 8},), bad=(*_TRAINED_BAD, ({"d_gate": 3}, "d_gate")),
    ),
    "attention/nsa": _NSA,
    "attention/fsa": _NSA,
    "attention/purbo": Notes(
        arguments={**_SIZES, "window": 5, "sinks": 2, "d_index": 2}, variants=({"retrieval": "1, 2", "p": 0.45},), takes_budget=False,
        budgets=(1.0,), dense=None, not_dense="how much is kept follows from p and the indexer; p = 1 has a test of its own", slack=1.0,
        bad=(*_TRAINED_BAD, ({"p": 0.0}, "p"), ({"d_index": 0}, "d_index"), ({"retrieval": "9"}, "retrieval"), ({"sinks": 0}, "sinks")),
    ),
    "attention/routing": Notes(
        arguments={**_SIZES, "clusters": 3}, variants=({"w": 9, "local_heads": 1, "window": 5},), takes_budget=False, budgets=(1.0,), dense=None,
        not_dense="how much is kept follows from the clusters; one cluster has a test of its own", slack=1.0,
        bad=(*_TRAINED_BAD, ({"clusters": 0}, "clusters"), ({"w": -1}, "w"), ({"local_heads": 5}, "local_heads"), ({"decay": 0.0}, "decay")),
    ),
    "attention/sea": Notes(
        arguments={**_SIZES, "cells": 8, "features": 6}, slack=0.03,
        bad=(*_TRAINED_BAD, ({"cells": 0}, "cells"), ({"features": 0}, "features")),
        expected_failures={"M9": "the decoder's work a query is fixed, and at 53 keys more than that of dense attention"},
    ),
    "attention/sma": Notes(
        arguments={**_SIZES, "window": 5}, takes_budget=False, budgets=(1.0,), dense=None, not_dense="each token says whether it attends", slack=1.0,
        bad=(*_TRAINED_BAD, ({"window": 0}, "window"), ({"lean": float("inf")}, "lean")),
    ),
    "attention/shared_diff": Notes(
        arguments={**_SIZES, "rank": 2}, takes_budget=False, budgets=(1.0,), dense=None, not_dense="it is the difference of two maps", slack=0.0,
        bad=(*_TRAINED_BAD, ({"layer": -1}, "layer"), ({"eps": -1.0}, "eps"), ({"rank": 0}, "rank"), ({"rank": 21}, "rank")),
    ),
    "attention/llsa": Notes(
        arguments={"top": 2, "block": 3, "levels": 2}, variants=({"shared": False, "coarse": "rest"}, {"coarse": "none", "levels": 1}),
        takes_budget=False, budgets=(1.0,), dense=None, not_dense="`top` blocks a level; taking all has a test of its own", slack=1.0,
        bad=(({"top": 0}, "top"), ({"levels": 0}, "levels"), ({"coarse": "some"}, "coarse"), ({"shared": 1}, "shared")),
    ),
    "attention/sinkhorn": Notes(
        arguments={**_SIZES, "block": 8, "width": 5}, variants=({"match": "soft", "causal_rounds": 2},), takes_budget=False, budgets=(1.0,),
        dense=None,
        not_dense="a block and one match are kept; a sequence of two blocks has a test of its own", slack=1.0,
        bad=(*_TRAINED_BAD, ({"rounds": 0}, "rounds"), ({"temperature": 0.0}, "temperature"), ({"width": 0}, "width"), ({"match": "firm"}, "match"),
             ({"causal_rounds": -1}, "causal_rounds")),
    ),
    "attention/span": Notes(
        arguments={"names": 0, "heads": 4, "reads": 8, "count": 4, "go": 12}, variants=({"sinks": 3},), inputs=with_ids, takes_budget=False,
        budgets=(1.0,), dense=None, not_dense="the text says what is read; text without markers has a test of its own", slack=1.0,
        bad=(({"count": 0}, "count"), ({"sinks": -1}, "sinks"), ({"go": 5}, "go")),
        expected_failures={"L8": "it parses token ids and refuses a model that it does not read (`reading`)"},
    ),
    "attention/forcing": Notes(
        arguments={"memory": 1, "window": 2, "top": 1, "block": 8}, variants=({"query_block": 4, "memory": 0},), takes_budget=False, budgets=(1.0,),
        dense=None, not_dense="how much is kept follows from memory and window; unlimited ones have a test of their own", slack=1.0,
        bad=(({"memory": -1}, "memory"), ({"window": 0}, "window"), ({"top": -1}, "top"), ({"decay": 0.0}, "decay")),
    ),
    "attention/gin": Notes(
        arguments={**_SIZES, "width": 3, "threshold": 0.05}, variants=({"rule": "shift"}, {"rule": "binary"}), takes_budget=False,
        budgets=(1.0,), slack=0.0,
        bad=(*_TRAINED_BAD, ({"width": 0}, "width"), ({"threshold": 1.0}, "threshold"), ({"rule": "most"}, "rule"), ({"sharp": 0.0}, "sharp")),
    ),
    "attention/nosa": Notes(
        arguments={**_SIZES, "block": 8, "pool": 4, "local": 1}, variants=({"steady": 0.0},), dense=weighted, slack=0.3,
        bad=(*_TRAINED_BAD, ({"pool": 3}, "pool"), ({"local": 0}, "local"), ({"steady": 1.0}, "steady"), ({"steady": -0.1}, "steady")),
    ),
    "attention/biformer": Notes(
        arguments={**_SIZES, "regions": 4, "local": 3}, inputs=image, dense=None,
        not_dense="a convolution of the values is added; without it all regions have a test of their own", slack=0.03,
        bad=(*_TRAINED_BAD, ({"regions": 0}, "regions"), ({"local": 2}, "local"), ({"top": -1}, "top"), ({"width": -1}, "width")),
        expected_failures={"L8": "a Llama is causal, and the regions of a map attend both ways: it is refused by name"},
    ),
    "attention/sparsifiner": Notes(
        arguments={**_SIZES, "tokens": 53, "down": 5, "d_low": 2, "floor": 0.15}, slack=0.03,
        bad=(*_TRAINED_BAD, ({"tokens": 0}, "tokens"), ({"down": 0}, "down"), ({"d_low": 0}, "d_low"), ({"floor": -1.0}, "floor")),
    ),
    "attention/spt": Notes(
        arguments={**_SIZES, "parts": 4, "words": 3}, slack=0.03, bad=(*_TRAINED_BAD, ({"parts": 3}, "parts"), ({"words": 0}, "words")),
    ),
    "attention/dsv": Notes(
        arguments={**_SIZES, "rank": 3}, slack=0.03,
        bad=(*_TRAINED_BAD, ({"rank": 0}, "rank"), ({"rank": 21}, "rank"), ({"dense_heads": "9"}, "dense_heads")),
    ),
    "attention/flux": Notes(
        arguments={**_SIZES, "hidden": 24, "window": 5, "sinks": 2}, inputs=with_hidden, takes_budget=False, budgets=(1.0,), dense=None,
        not_dense="the router decides; both ways have tests of their own", slack=1.0,
        bad=(*_TRAINED_BAD, ({"window": 0}, "window"), ({"tail": 0}, "tail"), ({"target": 0.0}, "target"), ({"price": -1.0}, "price")),
    ),
    "attention/diff": Notes(
        arguments=_SIZES, takes_budget=False, budgets=(1.0,), dense=None, not_dense="it is the difference of two maps", slack=0.0,
        bad=(*_TRAINED_BAD, ({"layer": -1}, "layer"), ({"eps": -1.0}, "eps")),
    ),
    "attention/sparsek": Notes(
        arguments={**_SIZES, "window": 4}, slack=0.25, bad=(*_TRAINED_BAD, ({"window": 0}, "window"), ({"k": -1}, "k")),
    ),
}
