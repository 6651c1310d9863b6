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
    skip = 0 if method.W_skip_ED is None else linear(x, method.W_skip_ED)
    return (f @ method.W_dec_FD + method.b_dec_D + skip) / method.scale_out.to(x.dtype)


def all_latents_signed(method: Any, inputs: Inputs) -> Tensor:
    """all_latents without the ReLU."""
    x = inputs[0] * method.scale.to(inputs[0].dtype)
    f = linear(x - (0 if method.transcodes else method.b_dec_D), method.W_enc_FD) + method.b_enc_F
    return (f @ method.W_dec_FD + method.b_dec_D) / method.scale_out.to(x.dtype)


def tied_linear(method: Any, inputs: Inputs) -> Tensor:
    """Linear autoencoder with one matrix: (W^T (W s x + c) + b) / s."""
    x = inputs[0] * method.scale.to(inputs[0].dtype)
    return ((linear(x, method.W_enc_FD) + method.b_enc_F) @ method.W_enc_FD + method.b_dec_D) / method.scale.to(x.dtype)


def all_layers(method: Any, inputs: Inputs) -> Tensor:
    """Dense ReLU cross-layer transcoder: to each layer, the sum over the layers up to it."""
    x_S = (inputs[0] * method.scale.to(inputs[0].dtype)).split(list(method.parts_in), -1)
    encoders = zip(x_S, method.W_enc_FD.chunk(len(x_S)), method.b_enc_F.chunk(len(x_S)), strict=True)
    f_S = [(linear(x, W) + b).relu() for x, W, b in encoders]
    y_S = [sum(f @ rows for f, rows in zip(f_S, table.split(method.each), strict=False)) for table in method.W_dec]
    return (torch.cat(y_S, -1) + method.b_dec_D) / method.scale_out.to(inputs[0].dtype)  # type: ignore[arg-type]


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
        if hasattr(method, "rate_F"):
            method.rate_F.copy_(~quiet)
    return method, x, y


def _exact_along(method: Any, part: str, parameter: str) -> Tensor | None:
    """The error that dead latents explain is held fixed: exact only where it does not move, in the dead latents' own rows."""
    if part != "aux" or not hasattr(method, "aux_k"):
        return None
    if parameter in ("W_enc_FD", "W_dec_FD", "b_enc_F"):
        dead = torch.zeros(method.width).double().index_fill(0, method.needy(), 1.0)
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
_NO_SIZES = ("3, 2", "0", "12", "1.5", "a", "1/0")
NOTES: dict[str, Notes] = {
    "latents/relu": Notes(bad=_PENALTY, dense=all_latents, variants=({"d_in": [20, 40]}, {"d_out": [9, 20], "skip": True})),
    "latents/gated": Notes(
        bad=_PENALTY, loss_skip={("aux", "W_dec_FD"): _FROZEN, ("aux", "b_dec_D"): "frozen in the decoder, live in the encoder"},
    ),
    "latents/topk": Notes(
        dense=all_latents, bad=(({"skip": True}, "skip"), ({"skip": "half", "d_out": 5}, "skip")),
        variants=({"d_out": 29}, {"d_out": 29, "skip": "least_squares"}, {"d_in": [20, 40]}),
    ),
    "latents/abs_topk": Notes(dense=all_latents_signed, variants=({"d_out": 29},)),
    "latents/group_max": Notes(
        dense=all_latents, budgets=(1 / 111, 3 / 111, 1.0), permuted=None, not_permuted="its groups are runs of neighbours",
        bad=(({"width": 11, "k": 3}, "k"),),
    ),
    "latents/annealed_topk": Notes(
        dense=all_latents, variants=({"d_out": 29}, {"aux_alpha": 1 / 32, "anneal": 0}),
        bad=(({"k_begin": 2}, "k_begin"), ({"anneal": -1}, "anneal")),
    ),
    "latents/top_afa": Notes(bad=(({"afa": -1.0}, "afa"),), bounds=FLIPS),
    "latents/gradient_topk": Notes(dense=all_latents, bad=(({"beta": -1.0}, "beta"),)),
    "latents/k_sparse": Notes(dense=tied_linear, bad=(({"alpha": 0.5}, "alpha"), ({"k_begin": 2}, "k_begin"), ({"anneal": -1}, "anneal"))),
    "latents/batch_topk": Notes(
        bad=(({"momentum": 1.5}, "momentum"),), fit=with_threshold, dense=all_latents, budgets=(0.05, 0.1, 0.2), density_slack=lambda n: 0.02,
        bounds=FLIPS, variants=({"d_out": 29},),
    ),
    "latents/matryoshka": Notes(
        bad=tuple(({"prefixes": text}, "prefixes") for text in _NO_SIZES), fit=with_threshold, dense=all_latents,
        budgets=(0.05, 0.1, 0.2), density_slack=lambda n: 0.02, bounds=FLIPS, variants=({"d_out": 29, "prefixes": "7, 50", "skip": True},),
    ),
    "latents/mutual_choice": Notes(
        bad=(({"exponent": -1.0}, "exponent"), ({"slack": 1.5}, "slack")), fit=with_threshold, dense=all_latents, budgets=(0.05, 0.1, 0.2),
        density_slack=lambda n: 0.02, bounds=FLIPS, variants=({"d_out": 29},),
    ),
    "latents/feature_choice": Notes(
        small={"exponent": 0.6},                                # at 1 some shares pass the half of rows whose affinity is positive
        bad=(({"exponent": -1.0}, "exponent"),), fit=with_threshold, dense=all_latents, budgets=(0.05, 0.1, 0.2),
        density_slack=lambda n: 0.02, bounds=FLIPS, variants=({"d_out": 29, "exponent": 0.0},),
    ),
    "latents/nested_topk": Notes(
        small={"levels": "5, 33"},                              # 33 is the k of the middling budget: what k leaves silent, the last level does
        bad=(*(({"levels": text}, "levels") for text in _NO_SIZES), ({"weights": "no"}, "weights")),
        dense=all_latents, variants=({"d_out": 29, "weights": "reverse", "skip": True},),
    ),
    "latents/matching_pursuit": Notes(
        budgets=(0.05, 0.1), density_slack=lambda n: 0.02, bounds=FLIPS,        # a latent may be taken twice: k is the most there can be
    ),
    "latents/archetypal": Notes(
        small={"points": 20}, bad=(({"points": -1}, "points"), ({"delta": -1.0}, "delta")), dense=all_latents,
        variants=({"d_out": 29, "skip": True},),
    ),
    "latents/mutual_feature": Notes(
        bad=(({"parallel": 1}, "parallel"), ({"alpha": -1.0}, "alpha")), dense=all_latents, variants=({"d_out": 29, "parallel": 3},),
    ),
    "latents/gated_p_annealed": Notes(
        bad=(*_PENALTY, ({"p_end": 0.0}, "p_end"), ({"hold": -1}, "hold"), ({"anneal": 0}, "anneal")),
        small={"warmup": 30, "hold": 10, "anneal": 40},         # p = 0.6 where the laws look
        loss_skip={("aux", "W_dec_FD"): _FROZEN, ("aux", "b_dec_D"): "frozen in the decoder, live in the encoder"},
    ),
    "latents/p_annealed": Notes(
        bad=(*_PENALTY, ({"p_end": 0.0}, "p_end"), ({"hold": -1}, "hold"), ({"anneal": 0}, "anneal")), dense=all_latents,
        variants=({"warmup": 30, "hold": 10, "anneal": 40, "d_in": [20, 40]},),   # p = 0.6 where the laws look
    ),
    "latents/cross_layer": Notes(
        small={"d_in": [20, 20, 20], "d_out": [9, 9, 9]},
        bad=(({"momentum": 1.5}, "momentum"), ({"width": 11, "d_in": [4, 4]}, "width"), ({"d_in": [4, 3]}, "d_in"), ({"d_out": [4, 4]}, "d_out")),
        fit=with_threshold, dense=all_layers, budgets=(0.05, 0.1, 0.2), density_slack=lambda n: 0.02, bounds=FLIPS,
        permuted=None, not_permuted="latents keep to their layer",
    ),
    "latents/jumprelu": Notes(
        small={"bandwidth": 0.5},                               # wide enough that some rows reach the threshold
        bad=(({"theta": 0.0}, "theta"), ({"bandwidth": 0.0}, "bandwidth")), variants=({"target_l0": 9.0},),
        loss_skip={("mse", "log_theta_F"): _SURROGATE, ("l0_penalty", "log_theta_F"): _SURROGATE},
    ),
    "latents/sparse_coding": Notes(
        small={"tolerance": 1e-6, "most": 1000},
        bad=(({"weight": -1.0}, "weight"), ({"penalty": "ridge"}, "penalty"), ({"solver": "magic"}, "solver"), ({"most": 0}, "most"),
             ({"tolerance": -1.0}, "tolerance"), ({"solver": "coordinate", "penalty": "hard"}, "solver")),
        not_dense="its codes are those of a solver", bounds=FLIPS, variants=({"penalty": "hard", "positive_codes": False},),
    ),
    "latents/omp": Notes(
        bad=(({"by": "luck"}, "by"), ({"k": 9}, "k")), budgets=(0.05, 0.1, 0.3), not_dense="its codes are those of a solver", bounds=FLIPS,
        variants=({"by": "gradient"},),
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
