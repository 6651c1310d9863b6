"""MoA (Fu et al. 2024, arXiv 2406.14909): each head a window of alpha + beta * length keys behind sinks, chosen by what it would do to the loss.

Masking key j for query i moves its output by A_ij / (1 - A_ij) (o_i - v_j), the softmax renormalised; so, to first order, the loss by
    E_ij = A_ij / (1 - A_ij) (dL/do_i . o_i - dL/do_i . v_j)
A rule's influence is the sum of E over the pairs that it masks. L is the loss against the dense model's own answers. Rules are chosen
for all heads of all layers at once, least total influence within the mean density, by `spread`; within one layer by `finish`. Sequences of
several lengths are profiled together: a rule's span, its influence and its density all follow each sequence's length.
Departure: without gradients (`observe` of queries, keys and values alone, as `calibrate` does) a pair counts by the squared change of the output.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width, R = rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...errors import BadInput
from ...site import replaced
from ..heads import per_head
from ..trained.base import dense_map
from .searched import Searched, allot

ALPHAS, BETAS = (0, 16, 64, 128, 256), (0.0, 0.0625, 0.125, 0.25, 0.5, 0.75, 1.0)


def influence(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor | None, scale: float) -> Tensor:
    """[B, H, T, S] change of the loss if that pair alone were masked, to first order; without a gradient |change of the output|^2.

    Args:
        gradient: [B, H, T, D] of the loss in the output of dense attention.
    """
    H, wide = q.shape[1], torch.promote_types(q.dtype, torch.float32)
    weight = dense_map(q.to(wide), k.to(wide), scale, True)
    value = per_head(v, H).to(wide)
    out, odds = weight @ value, weight / (1 - weight).clamp_min(1e-6)
    if gradient is not None:
        gradient = gradient.to(wide)
        return odds * ((gradient * out).sum(-1, keepdim=True) - gradient @ value.mT)
    apart = out.square().sum(-1, keepdim=True) - 2 * out @ value.mT + value.square().sum(-1)[:, :, None]
    return odds.square() * apart.clamp_min(0)


class MoA(Searched):
    """A rule for each head, from profiling; its span grows with the sequence.

    Args:
        budget: mean fraction of visible pairs over heads, at the lengths profiled.
        sinks: first keys that every head keeps.
        signed: whether pairs that would help if masked are counted against those that would harm, as the formula sums; else every pair by its
            size, as the authors' code does.
        options: rules as expressions; empty for the grid of ALPHAS and BETAS.
    """

    name = "attention/moa"

    def __init__(self, budget: float = 0.25, sinks: int = 4, signed: bool = True, options: str = "", block: int = 64,
                 query_block: int = 64) -> None:
        if isinstance(sinks, bool) or not isinstance(sinks, int) or sinks < 0:
            raise BadInput(f"sinks={sinks!r} must be a whole number >= 0")
        rules = options or "; ".join(f"elastic({a}, {b})" for a in ALPHAS for b in BETAS)
        first = f" | sinks({sinks})" if sinks else ""
        super().__init__(budget, "; ".join(rule + first for rule in rules.split(";")), block, query_block)
        self.signed = signed
        self._gradient: Tensor | None = None

    def observe(self, q_BHTD: Tensor, k_BGSD: Tensor | None = None, v_BGSD: Tensor | None = None, gradient_BHTD: Tensor | None = None) -> None:
        """As Fitted.observe; with the loss's gradient in the output of dense attention, what `profile` gives."""
        if (gradient_BHTD is not None) != (self._gradient_given if self._sums else gradient_BHTD is not None):
            raise BadInput(f"{self.name} saw data with gradients and without: their influences do not add up; profile afresh")
        self._gradient, self._gradient_given = gradient_BHTD, gradient_BHTD is not None
        try:
            super().observe(q_BHTD, k_BGSD, v_BGSD)
        finally:
            self._gradient = None

    _gradient_given = False

    def harm(self, q: Tensor, k: Tensor, v: Tensor, keep_RTS: Tensor) -> Tensor:
        """Influence of the pairs that each rule masks."""
        influence_BHTS = influence(q, k, v, self._gradient, q.shape[-1] ** -0.5)
        influence_HTS = (influence_BHTS if self.signed else influence_BHTS.abs()).sum(0)
        return influence_HTS.flatten(1) @ (~keep_RTS).flatten(1).to(influence_HTS.dtype).mT


class _Profiled:
    """Dense attention that shows its method queries, keys, values and the gradient that comes back."""

    def __init__(self, method: MoA) -> None:
        self.method = method

    def attend(
        self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, scale: float, causal: bool = True, padding_BS: Tensor | None = None, layer: int = 0,
    ) -> Tensor:
        """Dense output."""
        if not causal or padding_BS is not None:
            raise BadInput(f"{self.method.name} is profiled on causal sequences without padding")
        out = dense_map(q_BHTD, k_BGSD, scale, True) @ per_head(v_BGSD, q_BHTD.shape[1])
        unit = q_BHTD.detach() * (scale * q_BHTD.shape[-1] ** 0.5)
        out.register_hook(lambda gradient: self.method.observe(unit, k_BGSD.detach(), v_BGSD.detach(), gradient))
        return out

    __call__ = attend


def profile(model: nn.Module, plan: Mapping[str, MoA], batches: Iterable[Tensor]) -> None:
    """Show methods the gradients of the model's loss against its own most likely tokens, on ids [B, T]; then `finish` or `spread`."""
    watched: dict[str, Any] = {name: _Profiled(method) for name, method in plan.items()}
    held: list[Tensor] = []

    def wanting(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        held[:] = [out.detach().requires_grad_()]            # attention is in the graph also where no parameter wants a gradient
        return held[0]

    handle = model.get_input_embeddings().register_forward_hook(wanting)  # type: ignore[operator]
    try:
        with replaced(model, watched), torch.enable_grad():
            for ids_BT in batches:
                logits = model(input_ids=ids_BT, use_cache=False).logits.flatten(0, 1)
                torch.autograd.grad(cross_entropy(logits, logits.detach().argmax(-1), reduction="sum"), held)
    finally:
        handle.remove()


def spread(methods: Iterable[MoA], budget: float) -> None:
    """Choose the rules of all heads of all these methods at once, so that the least is lost at a mean density of at most `budget`.

    Raises:
        BadInput: a method that was not shown anything.
    """
    methods = list(methods)
    for method in methods:
        method.finish()
    harm, share = (torch.cat([getattr(method, name).double() for method in methods]) for name in ("harm_HR", "share_HR"))
    for method, choice in zip(methods, allot(harm, share, budget).split([len(m.choice_H) for m in methods]), strict=True):
        method.choice_H.copy_(choice)
