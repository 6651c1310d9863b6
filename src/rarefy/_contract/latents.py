"""Specs of dictionaries: what all of them share, and one Notes for what is peculiar to each.

Shape letters: D = inputs; F = latents.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..method import Sparse
from .shapes import D_IN, WIDTH, rows
from .spec import Inputs, Spec

ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
FLIPS = {torch.float32: 1e-5, torch.float16: 0.1, torch.bfloat16: 0.4}
"""Rounding moves a choice near its boundary, and then a whole unit comes or goes."""


def _permuted(method: Any, inputs: Inputs, order: Tensor) -> tuple[Sparse, Inputs]:
    other = copy.deepcopy(method)
    with torch.no_grad():
        for held in (*other.parameters(), *other.buffers()):
            if held.ndim and len(held) == WIDTH:
                held.copy_(held[order])
    return other, inputs


def all_latents(method: Any, inputs: Inputs) -> Tensor:
    """Dense ReLU dictionary in plain operations: (relu(W (s x - b) + c) D + b) / s."""
    x = inputs[0] * method.scale.to(inputs[0].dtype)
    shift = 0 if method.transcodes else method.b_dec_D
    f = (linear(x - shift, method.W_enc_FD) + method.b_enc_F).relu()
    return (f @ method.W_dec_FD + method.b_dec_D) / method.scale_out.to(x.dtype)


def pretrained(method: Any, inputs: Inputs) -> None:
    """Stands for training: data statistics, and parameters moved off their symmetric start."""
    (x,) = inputs
    y = x[:, : method.d_out] if method.transcodes else x
    method.initialise(x, y)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in method.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
        if hasattr(method, "log_theta_F"):
            method.log_theta_F.fill_(-1.0)
        if hasattr(method, "steps"):
            method.steps.fill_(getattr(method, "warmup", 0))


def with_threshold(method: Any, inputs: Inputs) -> None:
    """As pretrained, then the running threshold from batches, as training would leave it."""
    pretrained(method, inputs)
    method.train()
    y = inputs[0][:, : method.d_out] if method.transcodes else inputs[0]
    for _ in range(3):
        method.loss(inputs[0], y)
    method.eval()


def _living_loss(method: Any) -> tuple[Sparse, Tensor, Tensor]:
    """Half of the latents that no row selects are dead, so that the auxiliary loss is alive too."""
    (x,) = rows(12, 21)
    x = x.double()
    y = x[:, : method.d_out] if method.transcodes else x
    if hasattr(method, "aux_k"):
        quiet = ~method.train().select(x).mask.any(0)           # with gradients on, as training selects
        method.idle_F[quiet] = method.dead_after + 1
        method.idle_F[~quiet] = 0
    return method, x, y


def _exact_along(method: Any, part: str, parameter: str) -> Tensor | None:
    """The error that dead latents explain is held fixed: exact only where it does not move, in the dead latents' own rows."""
    if part != "aux" or not hasattr(method, "aux_k"):
        return None
    if parameter in ("W_enc_FD", "W_dec_FD", "b_enc_F"):
        dead = (method.idle_F > method.dead_after).double()
        return dead[:, None] if parameter != "b_enc_F" else dead
    return torch.zeros(())


@dataclass(frozen=True)
class Notes:
    """What the laws must know of one dictionary beyond its constructor. Fields are those of Spec where they share a name."""

    small: Mapping[str, Any] = field(default_factory=dict)
    """Arguments to make it with for the laws."""
    bad: tuple[tuple[Mapping[str, Any], str], ...] = ()
    """Arguments of its own that are out of range, and the one the error names; those of d_in, width, k, ... are added."""
    fit: Callable[[Any, Inputs], None] = pretrained
    dense: Callable[[Any, Inputs], Tensor] | None = None
    not_dense: str = "no setting of it is a plain ReLU dictionary"
    budgets: tuple[float, ...] = (0.05, 0.1, 0.3, 1.0)
    """Where it takes k."""
    density_slack: Callable[[int], float] = Spec.density_slack
    density: Callable[[Sparse, Inputs], float] | None = None
    permuted: Callable[[Any, Inputs, Tensor], tuple[Sparse, Inputs]] | None = _permuted
    not_permuted: str = ""
    bounds: Mapping[torch.dtype, float] = field(default_factory=lambda: ROUNDING)
    loss_inputs: Callable[[Any], tuple[Sparse, Tensor, Tensor]] = _living_loss
    loss_skip: Mapping[tuple[str, str], str] = field(default_factory=dict)
    loss_along: Callable[[Any, str, str], Tensor | None] = _exact_along
    expected_failures: Mapping[str, str] = field(default_factory=dict)
    variants: tuple[dict[str, Any], ...] = ()
    """Further arguments under which every law is run again."""


_FROZEN = "the auxiliary reconstruction decodes with frozen weights (eq. 8)"
_SURROGATE = "the gradient through the step is a kernel estimate (eq. 11, 12)"
_PENALTY = (({"l1": -1.0}, "l1"), ({"warmup": -1}, "warmup"))
NOTES: dict[str, Notes] = {
    "latents/relu": Notes(bad=_PENALTY, dense=all_latents),
    "latents/gated": Notes(
        bad=_PENALTY, loss_skip={("aux", "W_dec_FD"): _FROZEN, ("aux", "b_dec_D"): "frozen in the decoder, live in the encoder"},
    ),
    "latents/topk": Notes(dense=all_latents, variants=({"d_out": 29},)),
    "latents/batch_topk": Notes(
        bad=(({"momentum": 1.5}, "momentum"),), fit=with_threshold, dense=all_latents, budgets=(0.05, 0.1, 0.2), density_slack=lambda n: 0.02,
        bounds=FLIPS, variants=({"d_out": 29},),
    ),
    "latents/jumprelu": Notes(
        small={"bandwidth": 0.5},                               # wide enough that some rows reach the threshold
        bad=(({"theta": 0.0}, "theta"), ({"bandwidth": 0.0}, "bandwidth")), variants=({"target_l0": 9.0},),
        loss_skip={("mse", "log_theta_F"): _SURROGATE, ("l0_penalty", "log_theta_F"): _SURROGATE},
    ),
}


def latents(cls: type[Sparse], **arguments: Any) -> Spec:
    """Of a dictionary; `k` where there is one follows from the budget."""
    notes = NOTES.get(cls.name) or next((NOTES[base.name] for base in cls.__mro__ if getattr(base, "name", "") in NOTES), Notes())
    takes = inspect.signature(inspect.unwrap(cls.__init__)).parameters
    counted, trained = "k" in takes, cls.fitted == "trained"
    small: dict[str, Any] = {**({"dead_after": 10} if "dead_after" in takes else {}), **notes.small}

    def make(budget: float) -> Sparse:
        k = {"k": max(1, round(budget * WIDTH))} if counted else {}
        return cls(**{"d_in": D_IN, "width": WIDTH, **k, **small, **arguments})

    bad: list[tuple[Mapping[str, Any], str]] = [({"d_in": 0}, "d_in"), ({"width": -1}, "width"), ({"width": 1.5}, "width")]
    bad += [({"k": 0}, "k"), ({"k": 12}, "k"), ({"k": 1.5}, "k")] if counted else []
    bad += [({name: -1}, name) for name in ("dead_after", "aux_k", "aux_alpha") if name in takes]
    bad += [({"d_out": -2}, "d_out")] if "d_out" in takes else []
    return Spec(
        make=make, inputs=rows, fit=notes.fit, dense=notes.dense, not_dense=notes.not_dense,
        one_unit=lambda: (cls(d_in=1, width=1, **({"k": 1} if counted else {})), (torch.tensor([[1.5], [-0.5], [0.0]]),)),
        permuted=notes.permuted, not_permuted=notes.not_permuted, units=lambda m, i: WIDTH, budgets=notes.budgets if counted else (),
        density=notes.density, density_slack=notes.density_slack, bad_arguments=(*bad, *notes.bad),
        sound_arguments={"d_in": 8, "width": 11, **({"k": 3} if counted else {})}, site="layers.0.mlp.out", bounds=notes.bounds,
        loss_inputs=notes.loss_inputs if trained else None, loss_along=notes.loss_along, loss_skip=notes.loss_skip,
        expected_failures=notes.expected_failures,
    )
