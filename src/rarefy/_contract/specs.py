"""Specs of the catalogue's methods, one function a family.

Shape letters: I, D = inputs; O = outputs; F = latents; H, G = query and key heads; T, S = queries and keys.
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
from .spec import Inputs, Spec

_NO_EXPORT = "inputs are checked for NaN before use, a branch on data that torch.export does not trace"
D_IN, D_OUT, WIDTH = 60, 37, 111


def rows(batch: int, seed: int) -> Inputs:
    """Rows of unequal channels, some large, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.2, 2.0, D_IN)[torch.randperm(D_IN, generator=torch.Generator().manual_seed(99))]
    return (torch.randn(batch, D_IN, generator=generator) * scale + 0.1,)


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


def _permuted_latents(method: Any, inputs: Inputs, order: Tensor) -> tuple[Sparse, Inputs]:
    other = copy.deepcopy(method)
    with torch.no_grad():
        for held in (*other.parameters(), *other.buffers()):
            if held.ndim and len(held) == WIDTH:
                held.copy_(held[order])
    return other, inputs


def _all_latents(method: Any, inputs: Inputs) -> Tensor:
    """Dense ReLU dictionary in plain operations: (relu(W (s x - b) + c) D + b) / s."""
    x = inputs[0] * method.scale.to(inputs[0].dtype)
    shift = 0 if method.transcodes else method.b_dec_D
    f = (linear(x - shift, method.W_enc_FD) + method.b_enc_F).relu()
    return (f @ method.W_dec_FD + method.b_dec_D) / method.scale_out.to(x.dtype)


def _pretrained(method: Any, inputs: Inputs) -> None:
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
            method.steps.fill_(method.warmup)


def _fit_threshold(method: Any, inputs: Inputs) -> None:
    """As _pretrained, then the running threshold from batches, as training would leave it."""
    _pretrained(method, inputs)
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


_FROZEN = "the auxiliary reconstruction decodes with frozen weights (eq. 8)"
_SURROGATE = "the gradient through the step is a kernel estimate (eq. 11, 12)"
_SKIP = {
    "latents/gated": {("aux", "W_dec_FD"): _FROZEN, ("aux", "b_dec_D"): "frozen in the decoder, live in the encoder"},
    "latents/jumprelu": {("mse", "log_theta_F"): _SURROGATE, ("l0_penalty", "log_theta_F"): _SURROGATE},
}


_FLIPS = {torch.float32: 1e-5, torch.float16: 0.1, torch.bfloat16: 0.4}
"""Rounding moves a choice near its boundary, and then a whole unit comes or goes."""
_ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def latents(cls: type[Sparse], **arguments: Any) -> Spec:
    """Of a dictionary; `k` where there is one follows from the budget."""
    counted = "k" in cls.__init__.__wrapped__.__code__.co_varnames  # type: ignore[attr-defined]
    small: dict[str, Any] = {"dead_after": 10} if cls.fitted == "trained" else {}
    if cls.name == "latents/jumprelu":
        small["bandwidth"] = 0.5                                # wide enough that some rows reach the threshold

    def make(budget: float) -> Sparse:
        k = {"k": max(1, round(budget * WIDTH))} if counted else {}
        return cls(**{"d_in": D_IN, "width": WIDTH, **k, **small, **arguments})

    batchwise = cls.name == "latents/batch_topk"
    bad: list[tuple[dict[str, Any], str]] = [({"d_in": 0}, "d_in"), ({"width": -1}, "width"), ({"width": 1.5}, "width")]
    bad += [({"k": 0}, "k"), ({"k": 12}, "k"), ({"k": 1.5}, "k")] if counted else []
    bad += [({"dead_after": -1}, "dead_after"), ({"d_out": -2}, "d_out")] if small else []
    bad += [({"aux_k": -1}, "aux_k"), ({"aux_alpha": -1.0}, "aux_alpha")] if counted and small else []
    bad += [({"momentum": 1.5}, "momentum")] if batchwise else []
    bad += [({"l1": -1.0}, "l1"), ({"warmup": -1}, "warmup")] if cls.name in ("latents/relu", "latents/gated") else []
    bad += [({"theta": 0.0}, "theta"), ({"bandwidth": 0.0}, "bandwidth")] if cls.name == "latents/jumprelu" else []
    dense = _all_latents if cls.name in ("latents/topk", "latents/batch_topk", "latents/relu") else None
    return Spec(
        make=make, inputs=rows, fit=_fit_threshold if batchwise else _pretrained, dense=dense,
        not_dense="no setting of it is a plain ReLU dictionary",
        one_unit=lambda: (cls(d_in=1, width=1, **({"k": 1} if counted else {})), (torch.tensor([[1.5], [-0.5], [0.0]]),)),
        permuted=_permuted_latents, units=lambda m, i: WIDTH,
        budgets=(0.05, 0.1, 0.2) if batchwise else (0.05, 0.1, 0.3, 1.0) if counted else (),
        density_slack=(lambda n: 0.02) if batchwise else Spec.density_slack,
        bad_arguments=tuple(bad), sound_arguments={"d_in": 8, "width": 11, **({"k": 3} if counted else {})},
        site="layers.0.mlp.out",
        bounds=_FLIPS if batchwise else _ROUNDING,
        loss_inputs=_living_loss if cls.fitted == "trained" else None, loss_along=_exact_along, loss_skip=_SKIP.get(cls.name, {}),
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
        site="layers.0.attn", bounds=_FLIPS,
    )


_FAMILY: dict[str, Callable[..., Spec]] = {"weights": weights, "neurons": neurons, "latents": latents, "attention": attention}
_VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "weights/wanda": ({"n": 2, "m": 4}, {"group": "layer"}),
    "weights/magnitude": ({"n": 1, "m": 4}, {"group": "layer"}),
    "neurons/wina": ({"mode": "threshold"},),
    "latents/topk": ({"d_out": 29},),
    "latents/batch_topk": ({"d_out": 29},),
    "latents/jumprelu": ({"target_l0": 9.0},),
    "attention/quest": ({"query_block": 8},),
    "attention/random": ({"query_block": 8},),
}


def specs_of(method: str | type[Sparse]) -> tuple[Spec, ...]:
    """The default spec of a catalogue entry, or of a class of its family, and those of its variants."""
    cls = catalogue.entry(method).load() if isinstance(method, str) else method
    family = cls.name.split("/")[0]
    if family not in _FAMILY:
        raise BadInput(f"{cls.__name__} belongs to no family of the catalogue; pass a Spec (rarefy.contract.Spec)")
    made = (_FAMILY[family](cls, **arguments) for arguments in ({}, *_VARIANTS.get(cls.name, ())))
    return tuple(replace(spec, expected_failures={"C13b": _NO_EXPORT, **spec.expected_failures}) for spec in made)


def variants(name: str) -> tuple[str, ...]:
    """Ids of the specs of an entry, in the order of specs_of."""
    return (name, *(f"{name}[{','.join(f'{k}={v}' for k, v in a.items())}]" for a in _VARIANTS.get(name, ())))


__all__ = ["Spec", "specs_of", "variants"]
