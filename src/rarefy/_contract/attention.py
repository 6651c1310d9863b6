"""Specs of attention methods: what all of them share, and one Notes for what is peculiar to each.

Shape letters: H, G = query and key heads; T, S = queries and keys; D = head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..method import Sparse
from .attention_notes import D_HEAD, HEADS, Notes, fitted, moved_blocks
from .attention_trained import TRAINED
from .spec import Inputs, Spec

_MAP = "another map than softmax: with every key kept it is still not dense attention"
_LOOSE = "how many weights are above zero follows from the scores"


PATTERNS: Mapping[str, Callable[[int, int, int], bool]] = {
    "window(9) | sinks(2)": lambda q, k, head: 0 <= q - k < 9 or k <= q and k < 2,
    "blocks(8, window(1) | shards(4)) | tokens(0)": lambda q, k, head: k <= q and (q // 8 == k // 8 or k // 8 % 4 == head or k == 0),
}
"""An expression and the same said in Python, of (query position, key position, head)."""


def of_pattern(method: Any, inputs: Inputs) -> Tensor:
    """Dense attention under a pattern written out pair by pair."""
    q, k, v = inputs
    rule, T, S = PATTERNS[method.arguments["pattern"]], q.shape[2], k.shape[2]
    keep = torch.tensor([[[rule(S - T + t, s, h) for s in range(S)] for t in range(T)] for h in range(q.shape[1])])
    share = q.shape[1] // k.shape[1]
    score = q @ k.repeat_interleave(share, 1).mT / q.shape[-1] ** 0.5
    return score.masked_fill(~keep, -torch.inf).softmax(-1) @ v.repeat_interleave(share, 1)


_SERVED_DENSE = {"L8": "outside training it is the dense attention that it stands in for: it changes nothing"}


NOTES: dict[str, Notes] = TRAINED | {
    "attention/pattern": Notes(
        arguments={"block": 8, "query_block": 8, "pattern": "window(9) | sinks(2)"}, takes_budget=False, budgets=(1.0,), dense=of_pattern, slack=1.0,
        variants=({"pattern": "blocks(8, window(1) | shards(4)) | tokens(0)", "query_block": 1},), bad=(({"pattern": "windw(3)"}, "pattern"),),
    ),
    "attention/star": Notes(
        arguments={"block": 8}, variants=({"question": 11}, {"anchor": False},), takes_budget=False, budgets=(1.0,), dense=None,
        not_dense="the context is encoded in blocks; one block has a test of its own", slack=1.0,
        bad=(({"question": -1}, "question"), ({"anchor": 1}, "anchor")),
    ),
    "attention/combiner": Notes(
        arguments={"block": 8, "region": 1}, variants=({"region": 4, "pool": "mean"}, {"region": 4, "summary": "queries"}), takes_budget=False,
        budgets=(1.0,), dense=None, not_dense="regions of several keys share a weight; regions of one have a test of their own", slack=1.0,
        bad=(({"region": 3}, "region"), ({"pool": "sum"}, "pool"), ({"summary": "values"}, "summary")),
    ),
    "attention/swat": Notes(
        arguments={"window": 9}, takes_budget=False, budgets=(1.0,), dense=None, not_dense=_MAP, slack=1.0, bad=(({"window": 0}, "window"),),
    ),
    "attention/moa": Notes(
        arguments={"block": 8, "query_block": 8, "sinks": 1, "options": "elastic(4, 0); elastic(4, 0.1); elastic(4, 0.3); elastic(8, 0.5); full()"},
        fit=fitted, slack=0.2, bad=(({"sinks": -1}, "sinks"), ({"options": "full()"}, "options")),
    ),
    "attention/sparse_vdit": Notes(
        arguments={"block": 8, "query_block": 8, "options": "full(); window(16); window(4); every(4) | own(); none()"}, fit=fitted, slack=0.2,
        expected_failures={"L3": "another budget is another pattern for a head, which need not hold the smaller one's keys"},
        bad=(({"options": 3}, "options"),),
    ),
    "attention/efficient_vdit": Notes(
        arguments={"block": 8, "query_block": 8, "tolerance": 2.0, "options": "full(); window(16); window(4)"}, fit=fitted, slack=1.0,
        takes_budget=False, budgets=(1.0,), dense=None, not_dense="how much is kept follows from the tolerance; none has a test of its own",
        bad=(({"tolerance": -1.0}, "tolerance"), ({"options": ""}, "options")),
    ),
    "attention/lsg": Notes(
        arguments={"block": 8, "factor": 2}, variants=tuple({"pick": pick} for pick in ("pool", "lsh", "stride", "block_stride")),
        takes_budget=False, budgets=(1.0,), dense=None, not_dense="far blocks are brought down; short inputs have a test of their own", slack=1.0,
        bad=(({"factor": 3}, "factor"), ({"globals": -1}, "globals"), ({"pick": "best"}, "pick")),
    ),
    "attention/longlora": Notes(
        arguments={"group": 16, "block": 8, "query_block": 8}, takes_budget=False, budgets=(1.0,), slack=0.0, expected_failures=_SERVED_DENSE,
        bad=(({"group": 0}, "group"),),
    ),
    "attention/sinklora": Notes(
        arguments={"group": 16, "block": 8, "query_block": 8}, takes_budget=False, budgets=(1.0,), slack=0.0, expected_failures=_SERVED_DENSE,
        bad=(({"shifted": 0.7}, "shifted"),),
    ),
    "attention/scca": Notes(
        arguments={"chunk": 16, "block": 8, "query_block": 8}, takes_budget=False, budgets=(1.0,), slack=0.0,
        expected_failures=_SERVED_DENSE, bad=(({"chunk": 0}, "chunk"), ({"shifts": 0}, "shifts")),
    ),
    "attention/swinbert": Notes(
        arguments={"size": 64, "block": 8}, takes_budget=False, budgets=(1.0,), dense=None,
        not_dense="how much is kept is learned; an open mask has a test of its own", slack=1.0,
        bad=(({"size": 0}, "size"), ({"weight": -1.0}, "weight"), ({"block": 0}, "block")),
    ),
    "attention/scatterformer": Notes(
        arguments={"window": 9}, takes_budget=False, budgets=(1.0,), dense=None, not_dense=_MAP, slack=1.0, bad=(({"window": 0}, "window"),),
    ),
    "attention/sparse_bev": Notes(
        arguments={"heads": HEADS, "d_head": D_HEAD}, variants=({"rows": 9.0},), takes_budget=False, budgets=(1.0,), dense=None,
        not_dense="distance is held against keys; a slope of nothing has a test of its own", slack=1.0,
        bad=(({"heads": 0}, "heads"), ({"d_head": 0}, "d_head"), ({"rows": -1.0}, "rows")),
    ),
    "attention/entmax": Notes(
        arguments={}, variants=({"alpha": 2.0}, {"alpha": 1.3, "heads": 4}), takes_budget=False, budgets=(1.0,), dense=None, not_dense=_MAP,
        density=None, slack=1.0, bad=(({"alpha": 0.5}, "alpha"), ({"heads": -1}, "heads")),
    ),
    "attention/rela": Notes(
        arguments={}, takes_budget=False, budgets=(1.0,), dense=None, not_dense=_MAP, density=None, slack=1.0,
        bad=(({"heads": -1}, "heads"), ({"heads": 2, "width": 0}, "width")),
    ),
    "attention/pladis": Notes(
        arguments={}, takes_budget=False, budgets=(1.0,), dense=None, not_dense=_MAP, density=None, slack=1.0,
        bad=(({"strength": -1.0}, "strength"), ({"alpha": 0.0}, "alpha")),
    ),
    "attention/sigmoid": Notes(arguments={}, takes_budget=False, budgets=(1.0,), dense=None, not_dense=_MAP, density=None, slack=1.0),
    "attention/top_k": Notes(arguments={}, slack=0.03),
    "attention/statistical_top_k": Notes(arguments={}, slack=0.1),
    "attention/quest": Notes(variants=({"query_block": 8},), permuted=moved_blocks, not_permuted=""),
    "attention/blasst": Notes(
        fit=fitted, variants=({"query_block": 8},), slack=0.3, bad=(({"dial": -1.0}, "dial"),)),
    "attention/quest_top_p": Notes(fit=fitted, variants=({"block": 4, "query_block": 4},), slack=0.3, bad=(({"dial": 1.0}, "dial"),)),
    "attention/adaspa": Notes(
        arguments={"block": 8, "query_block": 8}, variants=({"query_block": 1},), slack=0.3, bad=(({"dense": 1.5}, "dense"), ({"every": 0}, "every")),
    ),
    "attention/chunked": Notes(
        arguments={"chunk": 24, "last": 6}, fit=fitted, slack=0.1,
        bad=(({"target": 1.0}, "target"), ({"chunk": 0}, "chunk"), ({"share": 0.0}, "share"), ({"last": 0}, "last")),
    ),
    "attention/antidiagonal": Notes(
        arguments={"block": 8, "query_block": 8, "stride": 4}, slack=0.3, bad=(({"stride": 0}, "stride"), ({"stride": 3}, "stride")),
    ),
    "attention/antidiagonal_top_p": Notes(
        arguments={"block": 4, "query_block": 4, "stride": 2}, fit=fitted, slack=0.3,
        bad=(({"stride": 3}, "stride"), ({"dial": 1.0}, "dial")),
    ),
    "attention/flex_prefill": Notes(
        arguments={"block": 4}, variants=({"tau": 1.0},), fit=fitted, slack=0.3, bad=(({"tau": -1.0}, "tau"), ({"dial": 1.0}, "dial")),
    ),
    "attention/double_sparsity": Notes(arguments={}, fit=fitted, slack=0.06, bad=(({"channels": 0.0}, "channels"),)),
    "attention/loki": Notes(arguments={}, fit=fitted, slack=0.06, bad=(({"rank": 0.0}, "rank"),)),
    "attention/vertical_slash": Notes(arguments={"last": 8}, slack=0.03, bad=(({"share": 0.0}, "share"), ({"last": 0}, "last"))),
    "attention/sample": Notes(arguments={}, fit=fitted, slack=0.06, bad=(({"every": 0}, "every"), ({"dial": 1.5}, "dial"))),
    "attention/sparge": Notes(
        arguments={"block": 4, "query_block": 4, "theta": -1.0}, variants=({"query_block": 1},), budgets=(0.25, 0.5, 1.0), fit=fitted,
        bad=(({"theta": 2.0}, "theta"),)),
    "attention/twilight": Notes(
        arguments={"page": 8}, fit=fitted, slack=0.06, bad=(({"generous": 0.5}, "generous"), ({"bits": 0}, "bits")),
        expected_failures={"M3": "keys of 4 bits jump where a channel crosses a step, and the choice with them"}),
    "attention/pooled": Notes(variants=({"query_block": 8},), permuted=moved_blocks, not_permuted=""),
    "attention/minference": Notes(
        arguments={"last": 8, "side": 8}, fit=fitted, slack=0.25, bad=(({"last": 0}, "last"), ({"side": 0}, "side")),
    ),
    "attention/tidal": Notes(arguments={"dense": 0}, slack=0.06, bad=(({"every": 0}, "every"), ({"dense": -1}, "dense"))),
    "attention/squeezed": Notes(
        arguments={"segment": 16, "size": 4}, fit=fitted, budgets=(0.5, 0.75, 1.0), slack=0.1,
        bad=(({"segment": 0}, "segment"), ({"size": 32}, "size")),
    ),
    "attention/random_tiles": Notes(slack=0.3),
    "attention/random": Notes(variants=({"query_block": 8},)),
    "attention/magicpig": Notes(
        arguments={"bits": 2, "tables": 4, "sinks": 2, "window": 4, "centre": 9}, takes_budget=False, budgets=(1.0,), dense=None,
        not_dense="the sample follows from hashes; that it nears dense attention has a test of its own", slack=1.0,
        bad=(({"bits": 0}, "bits"), ({"tables": 1}, "tables"), ({"window": 0}, "window"), ({"sinks": -1}, "sinks"), ({"centre": 0}, "centre")),
    ),
    "attention/hip": Notes(
        variants=({"query_block": 8},), not_permuted="chunks are cut by position",
        expected_failures={"L3": "another number of chunks is another tournament: a larger one may lose a block that a smaller one found"},
    ),
    "attention/lsh": Notes(
        arguments={"rounds": 16, "bits": 1}, fit=fitted, slack=0.1,
        bad=(({"rounds": 0}, "rounds"), ({"bits": 0}, "bits"), ({"dial": -1}, "dial"), ({"dial": 99}, "dial")),
    ),
    "attention/scatterbrain": Notes(
        arguments={"features": 4, "rounds": 3, "bits": 2}, slack=0.03,
        bad=(({"features": 0}, "features"), ({"rounds": 0}, "rounds"), ({"bits": 0}, "bits")),
    ),
    "attention/retrieval": Notes(
        arguments={"near": 4, "degree": 4, "breadth": 6, "sinks": 1, "window": 2, "stride": 8},
        bad=(({"near": 1}, "near"), ({"degree": 0}, "degree"), ({"breadth": 0}, "breadth"), ({"stride": 0}, "stride"), ({"sinks": -1}, "sinks")),
    ),
    "attention/lserve": Notes(
        arguments={"block": 8, "part": 4, "streaming": 0.01}, variants=({"query_block": 8},), fit=fitted,
        bad=(({"part": 3}, "part"), ({"reuse": 0}, "reuse"), ({"streaming": 0.0}, "streaming"), ({"sinks": 0}, "sinks"), ({"window": 0}, "window")),
    ),
    "attention/zipvl": Notes(
        arguments={"probes": 6}, fit=fitted, slack=0.06, not_permuted="every query sees its own key, wherever that is",
        bad=(({"probes": 0}, "probes"), ({"dial": 1.5}, "dial")),
    ),
    "attention/rettention": Notes(
        arguments={"block": 8, "query_block": 8, "pattern": "window(9) | sinks(2)"}, takes_budget=False, budgets=(1.0,), dense=of_pattern, slack=1.0,
        bad=(({"pattern": "windw(3)"}, "pattern"), ({"refresh": 0}, "refresh")),
    ),
    "attention/sparse_d": Notes(
        arguments={"block": 8, "query_block": 1}, variants=({"query_block": 8},), bad=(({"dense": -0.5}, "dense"), ({"dense": 1.5}, "dense")),
    ),
    "attention/sparse_video": Notes(
        arguments={"frame": 6, "samples": 5}, takes_budget=False, budgets=(1.0,), dense=None, slack=1.0,
        not_dense="what is kept follows from the patterns",
        bad=(({"frame": 0}, "frame"), ({"samples": 0}, "samples"), ({"frames": -1}, "frames"), ({"places": -1}, "places")),
    ),
    "attention/permuted_blocks": Notes(
        arguments={"block": 4, "query_block": 4, "segment": 8}, budgets=(0.5, 0.75, 1.0), fit=fitted, slack=0.1, variants=({"permute": False},),
        not_permuted="the order of keys within a segment is the method's own", bad=(({"segment": 6}, "segment"), ({"dial": 1.5}, "dial")),
    ),
    "attention/window": Notes(slack=0.03, bad=(({"sinks": 0}, "sinks"), ({"window": -1}, "window"))),
}


def _one_unit(method: Sparse, notes: Notes) -> tuple[Sparse, Inputs]:
    inputs = tuple(x[:2, :, :1] if x.ndim == 4 else x[:2, :1] for x in notes.inputs(2, 0))
    if notes.fit is not None:
        notes.fit(method, inputs)
    return method, inputs


def attention(cls: type[Sparse], **arguments: Any) -> Spec:
    """Of attention; small blocks, so that the budget can be met to within a block a query."""
    notes = NOTES.get(cls.name, Notes())
    given = {**notes.arguments, **arguments}

    def make(budget: float) -> Sparse:
        return cls(**({"budget": budget} if notes.takes_budget else {}), **given)

    bad: list[tuple[Mapping[str, Any], str]] = list(notes.bad)
    if notes.takes_budget:
        bad += [({"budget": 0.0}, "budget"), ({"budget": 1.01}, "budget"), ({"budget": float("nan")}, "budget")]
    for name in {"block", "query_block"} & make(notes.budgets[0]).arguments.keys():
        bad += [({name: 0}, name), ({name: 2.5}, name)]
    return Spec(
        make=make, inputs=notes.inputs, fit=notes.fit, dense=notes.dense, not_dense=notes.not_dense,
        one_unit=lambda: _one_unit(make(notes.budgets[0]), notes),
        permuted=notes.permuted, permutable=lambda i: (i[0][:, :, -1:], *i[1:]),
        units=lambda m, i: i[1].shape[2] // m.arguments["block"] if notes.permuted else 0, not_permuted=notes.not_permuted,
        density=notes.density, density_slack=lambda n: notes.slack, budgets=notes.budgets, bad_arguments=tuple(bad),
        sound_arguments=given, site="layers.0.attn", bounds=notes.bounds, expected_failures=notes.expected_failures,
    )
