"""Specs of the catalogue's methods, one function a family.

Shape letters: I, D = inputs; O = outputs.
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
from .attention import NOTES as ATTENTION_NOTES
from .attention import attention
from .latents import NOTES as LATENT_NOTES
from .latents import latents
from .shapes import D_IN, D_OUT, rows
from .spec import Inputs, Spec

_NO_EXPORT = "inputs are checked for NaN before use, a branch on data that torch.export does not trace"


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


_FAMILY: dict[str, Callable[..., Spec]] = {"weights": weights, "neurons": neurons, "latents": latents, "attention": attention}
_VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "weights/wanda": ({"n": 2, "m": 4}, {"group": "layer"}),
    "weights/magnitude": ({"n": 1, "m": 4}, {"group": "layer"}),
    "neurons/wina": ({"mode": "threshold"},),
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
    for notes in (LATENT_NOTES, ATTENTION_NOTES):
        if name in notes:
            return notes[name].variants
    return _VARIANTS.get(name, ())


def variants(name: str) -> tuple[str, ...]:
    """Ids of the specs of an entry, in the order of specs_of."""
    return (name, *(f"{name}[{','.join(f'{k}={v}' for k, v in a.items())}]" for a in _variants(name)))


__all__ = ["Spec", "specs_of", "variants"]
