"""Specs of attention methods: what all of them share, and one Notes for what is peculiar to each.

Shape letters: H, G = query and key heads; T, S = queries and keys; D = head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..method import Sparse
from .latents import FLIPS
from .spec import Inputs, Spec

HEADS, KV_HEADS, KEYS, D_HEAD = 4, 2, 53, 20


def heads(batch: int, seed: int) -> Inputs:
    """q [B, 4, 53, 20], k and v [B, 2, 53, 20]: 53 keys leave a ragged last block."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, HEADS, KEYS, D_HEAD, generator=generator)
    k, v = torch.randn(2, batch, KV_HEADS, KEYS, D_HEAD, generator=generator).unbind()
    return q, k, v


def causal(method: Any, inputs: Inputs) -> Tensor:
    """softmax(q k / sqrt(D)) v over keys not later than the query, as two products."""
    q, k, v = inputs[:3]
    T, S = q.shape[2], k.shape[2]
    share = q.shape[1] // k.shape[1]
    score = q @ k.repeat_interleave(share, 1).mT / q.shape[-1] ** 0.5
    later = ~torch.ones(T, S, dtype=torch.bool).tril(S - T)
    return score.masked_fill(later, -torch.inf).softmax(-1) @ v.repeat_interleave(share, 1)


def pairs(method: Any, inputs: Inputs) -> float:
    """Density by the method's own count of (query, key) pairs."""
    with torch.no_grad():
        method.measured_density()
        method(*inputs)
    return method.measured_density()


def moved_blocks(method: Any, inputs: Inputs, order: Tensor) -> tuple[Sparse, Inputs]:
    """Whole key blocks before the newest in another order, seen from the last query only."""
    q, k, v = inputs
    at = torch.arange(k.shape[2])
    at[: len(order) * method.block] = at[: len(order) * method.block].view(len(order), -1)[order].flatten()
    return method, (q, k[:, :, at], v[:, :, at])


@dataclass(frozen=True)
class Notes:
    """What is peculiar to one attention method."""

    arguments: Mapping[str, Any] = field(default_factory=lambda: {"block": 8})
    """Constructor arguments beside budget, for small inputs."""
    variants: tuple[dict[str, Any], ...] = ()
    """Further arguments to run the laws with."""
    takes_budget: bool = True
    """False where the density follows from other arguments; the laws then run at `budgets` alone."""
    budgets: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    inputs: Callable[[int, int], Inputs] = heads
    fit: Callable[[Sparse, Inputs], None] | None = None
    dense: Callable[[Sparse, Inputs], Tensor] | None = causal
    """What everything selected must give; None with `not_dense`."""
    not_dense: str = ""
    permuted: Callable[[Sparse, Inputs, Tensor], tuple[Sparse, Inputs]] | None = None
    not_permuted: str = "the choice goes by position"
    density: Callable[[Sparse, Inputs], float] | None = pairs
    slack: float = 0.25
    """How far the measured density may lie from the budget: a query of the inputs sees at most 7 blocks of 8."""
    bad: tuple[tuple[Mapping[str, Any], str], ...] = ()
    """Further bad arguments and the one that the error must name."""
    bounds: Mapping[torch.dtype, float] = field(default_factory=lambda: FLIPS)
    expected_failures: Mapping[str, str] = field(default_factory=dict)


_MAP = "another map than softmax: with every key kept it is still not dense attention"
_LOOSE = "how many weights are above zero follows from the scores"
_SIZES = {"heads": HEADS, "key_heads": KV_HEADS, "d_head": D_HEAD}
_TRAINED_BAD = (({"heads": 0}, "heads"), ({"key_heads": 3}, "key_heads"), ({"d_head": 0}, "d_head"))


def with_hidden(batch: int, seed: int) -> Inputs:
    """`heads` and the 24-wide hidden state [B, 53, 24] that the layer was given."""
    generator = torch.Generator().manual_seed(seed + 1)
    return (*heads(batch, seed), torch.randn(batch, KEYS, 24, generator=generator))


def selected_pairs(method: Any, inputs: Inputs) -> float:
    """Density of the selection branch alone: pairs of chosen blocks of pairs seen."""
    mask = method.select(*inputs).mask.repeat_interleave(method.block, 3)[..., :KEYS].tril()
    return float(mask.sum()) / (mask.shape[0] * mask.shape[1] * KEYS * (KEYS + 1) / 2)


_NSA = Notes(
    arguments={**_SIZES, "hidden": 24, "block": 8, "compress": 8, "stride": 4, "window": 12, "local": 1}, inputs=with_hidden, dense=None,
    not_dense="three branches are mixed by gates", density=selected_pairs, slack=0.3,
    bad=(*_TRAINED_BAD, ({"stride": 3}, "stride"), ({"window": 0}, "window"), ({"top": -1}, "top"), ({"hidden": 0}, "hidden")),
)
NOTES: dict[str, Notes] = {
    "attention/moba": Notes(
        variants=({"query_block": 8}, {"order": "keys"}), permuted=moved_blocks, not_permuted="", bad=(({"top": -1}, "top"), ({"order": "rows"}, "order")),
    ),
    "attention/seer": Notes(
        arguments={**_SIZES, "block": 8, "query_block": 1}, variants=({"query_block": 8},), bad=(*_TRAINED_BAD, ({"d_gate": 3}, "d_gate")),
    ),
    "attention/nsa": _NSA,
    "attention/fsa": _NSA,
    "attention/diff": Notes(
        arguments=_SIZES, takes_budget=False, budgets=(1.0,), dense=None, not_dense="it is the difference of two maps", slack=0.0,
        bad=(*_TRAINED_BAD, ({"layer": -1}, "layer"), ({"eps": -1.0}, "eps")),
    ),
    "attention/sparsek": Notes(
        arguments={**_SIZES, "window": 4}, slack=0.25, bad=(*_TRAINED_BAD, ({"window": 0}, "window"), ({"k": -1}, "k")),
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
    "attention/random": Notes(variants=({"query_block": 8},)),
    "attention/window": Notes(slack=0.03, bad=(({"sinks": 0}, "sinks"), ({"window": -1}, "window"))),
}


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
        one_unit=lambda: (make(notes.budgets[0]), tuple(x[:2, :, :1] if x.ndim == 4 else x[:2, :1] for x in notes.inputs(2, 0))),
        permuted=notes.permuted, permutable=lambda i: (i[0][:, :, -1:], *i[1:]),
        units=lambda m, i: i[1].shape[2] // m.arguments["block"] if notes.permuted else 0, not_permuted=notes.not_permuted,
        density=notes.density, density_slack=lambda n: notes.slack, budgets=notes.budgets, bad_arguments=tuple(bad),
        sound_arguments=given, site="layers.0.attn", bounds=notes.bounds, expected_failures=notes.expected_failures,
    )
