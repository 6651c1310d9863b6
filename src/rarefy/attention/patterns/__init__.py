"""Static patterns as an algebra: `window(256) | sinks(4)`, `blocks(64, window(3) | shards(8))`, `same("row") | tokens(0)`.

Words are functions and, in text, what `parse` reads; they combine with |, & and ~, a head and a layer at a time. A
pattern compiles to a `BlockMask`; the papers' own patterns are in `zoo`, pictures in `draw`.
"""

from .lifts import blocks, boxes, by, chunks, cross_chunks, heads, layers, neighbourhood, on, on_heads, on_layers, parts
from .parse import parse
from .pattern import Pattern
from .relations import (
    ancestor,
    child,
    edges,
    expander,
    key_is,
    match,
    members,
    parent,
    permutation,
    query_is,
    random,
    relation,
    same,
    sibling,
)
from .words import (
    WORDS,
    around,
    band,
    block,
    causal,
    elastic,
    every,
    full,
    keys,
    lag,
    neighbours,
    none,
    own,
    queries,
    shards,
    sinks,
    strided,
    summaries,
    tokens,
    window,
)

__all__ = [
    "Pattern", "WORDS", "ancestor", "around", "band", "block", "blocks", "boxes", "by", "causal", "child", "chunks", "cross_chunks", "edges",
    "elastic", "every", "expander", "full", "heads", "key_is", "keys", "lag", "layers", "match", "members", "neighbourhood", "neighbours",
    "none", "on", "on_heads", "on_layers", "own", "parent", "parse", "parts", "permutation", "queries", "query_is", "random", "relation", "same",
    "shards", "sibling", "sinks", "strided", "summaries", "tokens", "window",
]
