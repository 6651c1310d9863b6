"""Specs of the catalogue's methods, one function a family.

Shape letters: I, D = inputs; O = outputs; H, G = query and key heads; T, S = queries and keys.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .. import catalogue
from ..errors import BadInput
from ..method import Sparse
from .latents import FLIPS, NOTES, latents
from .shapes import D_IN, D_OUT, rows
from .spec import Inputs, Spec

_NO_EXPORT = "inputs are checked for NaN before use, a branch on data that torch.export does not trace"


def heads(batch: int, seed: int) -> Inputs:
    """q [B, 4, 53, 20], k and v [B, 2, 53, 20]: 53 keys leave a ragged last block."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, 4, 53, 20, generator=generator)
    k, v = torch.randn(2, batch, 2, 53, 20, generator=generator).unbind()
    return q, k, v


def _module() -> nn.Linear:
    made = nn.Linear(D_IN, D_OUT)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        made.weight.copy_(torch.randn(D_OUT, D_IN, generator=generator) / 8)
        assert made.bias is not None
        made.bias.copy_(torch.randn(D_OUT, generator=generator))
    return made


def _observe(method: Sparse, inputs: Inputs) -> None:
    method.observe(inputs[0])
    method.finish()


def _dense_linear(method: Any, inputs: Inputs) -> Tensor:
    module = _module().to(inputs[0].dtype)
    return linear(inputs[0], module.weight, module.bias)


_LINEAR_BAD = (
    ({"budget": 0.0}, "budget"), ({"budget": 1.5}, "budget"), ({"budget": float("nan")}, "budget"), ({"budget": -0.1}, "budget"),
    ({"d_in": 0}, "d_in"), ({"d_in": -3}, "d_in"), ({"d_in": 2.5}, "d_in"), ({"d_out": 0}, "d_out"),
)


def _permuted_inputs(method: Any, inputs: Inputs, order: Tensor) -> tuple[Sparse, Inputs]:
    """Input channels in another order, for weights and neurons alike."""
    other = copy.deepcopy(method)
    with torch.no_grad():
        for name, dim in (("weight_OI", 1), ("mask_OI", 1), ("columns_IO", 0), ("norm_I", 0), ("square_I", 0)):
            held = getattr(other, name, None)
            if held is not None:
                held.copy_(held.index_select(dim, order))
        if hasattr(other, "mask_OI"):
            other.mask_OI.fill_(True)
            other.mask_OI = other._choose()
    return other, tuple(x[..., order] for x in inputs)


def weights(cls: type[Sparse], **arguments: Any) -> Spec:
    """Of a linear layer's weights."""
    pattern = {k: arguments[k] for k in ("n", "m") if k in arguments}
    fixed = pattern["n"] / pattern["m"] if pattern else None

    def make(budget: float) -> Sparse:
        return cls.for_module(_module(), **({} if pattern else {"budget": budget}), **arguments)

    lottery = cls.name.endswith("random")
    return Spec(
        make=make, inputs=rows, fit=_observe if cls.fitted == "calibrated" else None, dense=_dense_linear,
        one_unit=lambda: (_one_unit_linear(cls), (torch.randn(3, 1, generator=torch.Generator().manual_seed(0)),)),
        permuted=None if lottery or pattern else _permuted_inputs, units=lambda m, i: D_IN,
        not_permuted="the lottery goes by position" if lottery else "a group is m consecutive inputs",
        budgets=(fixed,) if fixed else (0.1, 0.25, 0.5, 0.75, 1.0),
        bad_arguments=(*_LINEAR_BAD, ({"n": 3, "m": 2}, "n"), ({"n": 2, "m": 7}, "m"), ({"group": "column"}, "group")),
        sound_arguments={"d_in": 12, "d_out": 5}, site="layers.0.down_proj",
    )


def _one_unit_linear(cls: type[Sparse]) -> Sparse:
    module = nn.Linear(1, 1)
    nn.init.constant_(module.weight, 0.5)
    made = cls.for_module(module, budget=0.5)
    if made.fitted == "calibrated":
        made.observe(torch.ones(2, 1))
        made.finish()
    return made


def neurons(cls: type[Sparse], **arguments: Any) -> Spec:
    """Of a linear layer's inputs."""
    by_threshold = cls.fitted == "calibrated" or arguments.get("mode") == "threshold"
    lottery = cls.name.endswith("random")
    return Spec(
        make=lambda budget: cls.for_module(_module(), budget=budget, **arguments), inputs=rows,
        fit=_observe if by_threshold else None, dense=_dense_linear,
        one_unit=lambda: (_one_unit_linear(cls), (torch.full((3, 1), 2.0),)),
        permuted=None if lottery else _permuted_inputs, units=lambda m, i: D_IN, not_permuted="the lottery goes by position",
        density_slack=(lambda n: 2e-3) if by_threshold else Spec.density_slack,
        bad_arguments=_LINEAR_BAD, sound_arguments={"d_in": 12, "d_out": 5}, site="layers.0.down_proj",
    )


def _causal(method: Any, inputs: Inputs) -> Tensor:
    """softmax(q k / sqrt(D)) v over keys not later than the query, as two products."""
    q, k, v = inputs
    T, S = q.shape[2], k.shape[2]
    share = q.shape[1] // k.shape[1]
    score = q @ k.repeat_interleave(share, 1).mT / q.shape[-1] ** 0.5
    later = ~torch.ones(T, S, dtype=torch.bool).tril(S - T)
    return score.masked_fill(later, -torch.inf).softmax(-1) @ v.repeat_interleave(share, 1)


def _pairs(method: Any, inputs: Inputs) -> float:
    with torch.no_grad():
        method.measured_density()
        method(*inputs)
    return method.measured_density()


def _moved_blocks(method: Any, inputs: Inputs, order: Tensor) -> tuple[Sparse, Inputs]:
    """Whole key blocks before the newest in another order, seen from the last query only."""
    q, k, v = inputs
    at = torch.arange(k.shape[2])
    at[: len(order) * method.block] = at[: len(order) * method.block].view(len(order), -1)[order].flatten()
    return method, (q, k[:, :, at], v[:, :, at])


def attention(cls: type[Sparse], **arguments: Any) -> Spec:
    """Of attention; small blocks, so that the budget can be met to within a block a query."""
    by_key = cls.name == "attention/window"
    block = {"block": 8, **arguments}
    decode = cls.name == "attention/quest"
    return Spec(
        make=lambda budget: cls(budget=budget, **block), inputs=heads, dense=_causal,
        one_unit=lambda: (cls(budget=0.5, **block), tuple(x[:2, :, :1] for x in heads(2, 0))),
        permuted=_moved_blocks if decode else None,
        permutable=lambda i: (i[0][:, :, -1:], *i[1:]), units=lambda m, i: i[1].shape[2] // m.arguments["block"] if decode else 0,
        not_permuted="the choice goes by position", density=_pairs,
        # a query sees at most 7 blocks: half a block in 7 on average over positions, and one block at least
        density_slack=(lambda n: 0.03) if by_key else (lambda n: 0.25), budgets=(0.25, 0.5, 0.75, 1.0),
        bad_arguments=(({"budget": 0.0}, "budget"), ({"budget": 1.01}, "budget"), ({"budget": float("nan")}, "budget"),
                       ({"block": 0}, "block"), ({"block": 2.5}, "block"), ({"query_block": 0}, "query_block"),
                       *(((({"sinks": 0}), "sinks"), (({"window": -1}), "window")) if by_key else ())),
        site="layers.0.attn", bounds=FLIPS,
    )


_FAMILY: dict[str, Callable[..., Spec]] = {"weights": weights, "neurons": neurons, "latents": latents, "attention": attention}
_VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "weights/wanda": ({"n": 2, "m": 4}, {"group": "layer"}),
    "weights/magnitude": ({"n": 1, "m": 4}, {"group": "layer"}),
    "neurons/wina": ({"mode": "threshold"},),
    "attention/quest": ({"query_block": 8},),
    "attention/random": ({"query_block": 8},),
}


def specs_of(method: str | type[Sparse]) -> tuple[Spec, ...]:
    """The default spec of a catalogue entry, or of a class of its family, and those of its variants."""
    cls = catalogue.entry(method).load() if isinstance(method, str) else method
    family = cls.name.split("/")[0]
    if family not in _FAMILY:
        raise BadInput(f"{cls.__name__} belongs to no family of the catalogue; pass a Spec (rarefy.contract.Spec)")
    made = (_FAMILY[family](cls, **arguments) for arguments in ({}, *_variants(cls.name)))
    return tuple(replace(spec, expected_failures={"C13b": _NO_EXPORT, **spec.expected_failures}) for spec in made)


def _variants(name: str) -> tuple[dict[str, Any], ...]:
    return NOTES[name].variants if name in NOTES else _VARIANTS.get(name, ())


def variants(name: str) -> tuple[str, ...]:
    """Ids of the specs of an entry, in the order of specs_of."""
    return (name, *(f"{name}[{','.join(f'{k}={v}' for k, v in a.items())}]" for a in _variants(name)))


__all__ = ["Spec", "specs_of", "variants"]
