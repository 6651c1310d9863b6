"""Laws about gradients, in float64 against central differences: M3 of forward, and of every named part of a loss."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..method import Loss, Sparse
from .spec import Broken, Case, Law, NotApplicable, require

EPS = 1e-6


def _directional(value, at: Tensor, along: Tensor) -> float:  # type: ignore[no-untyped-def]
    """Central difference of a scalar function along a direction, changing `at` in place and back."""
    kept, ends = at.detach().clone(), []
    for sign in (1, -1):
        with torch.no_grad():
            at.copy_(kept + sign * EPS * along)
        ends.append(float(value().detach()))        # with gradients on: some rules differ where there are none
    with torch.no_grad():
        at.copy_(kept)
    return (ends[0] - ends[1]) / (2 * EPS)


def _agree(analytic: float, numeric: float, what: str) -> None:
    slack = 1e-6 + 1e-5 * max(abs(analytic), abs(numeric))
    require(abs(analytic - numeric) <= slack, f"gradient of {what}: autograd {analytic:.8g}, by difference {numeric:.8g}")


def of_forward(case: Case) -> None:
    """M3: forward's gradient in its inputs and in every parameter, through a random projection of the output."""
    method = case.ready(dtype=torch.float64)
    inputs = case.inputs(5, seed=9, dtype=torch.float64)
    leaves = {f"input {i}": x.requires_grad_() for i, x in enumerate(inputs) if x.is_floating_point()}
    out = method(*inputs)
    if not out.requires_grad:
        raise NotApplicable("forward has no gradient")
    generator = torch.Generator().manual_seed(0)
    lot = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    at = leaves | dict(method.named_parameters())
    grads = torch.autograd.grad((out * lot).sum(), list(at.values()), allow_unused=True)
    for (name, leaf), grad in zip(at.items(), grads, strict=True):
        for _ in range(3):
            along = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            numeric = _directional(lambda: (method(*inputs) * lot).sum(), leaf, along)
            _agree(0.0 if grad is None else float((grad * along).sum()), numeric, f"forward in {name}")


def _parts(method: Sparse, x: Tensor, y: Tensor) -> Loss:
    """The loss, with every counter that it moved put back; what it did not move autograd may still need."""
    held = {k: v.clone() for k, v in method.named_buffers()}
    loss = method.loss(x, y)
    with torch.no_grad():
        for k, v in method.named_buffers():
            if not torch.equal(v, held[k]):
                v.copy_(held[k])
    return loss


def of_loss(case: Case) -> None:
    """M3: the gradient of each named part of the loss in each parameter; the total is the sum of its parts."""
    if case.spec.loss_inputs is None:
        raise NotApplicable("it is not trained")
    method, x, y = case.spec.loss_inputs(case.ready(dtype=torch.float64))
    method = copy.deepcopy(method).train()
    loss = _parts(method, x, y)
    trained = {k: v for k, v in loss.parts.items() if v.requires_grad}
    require(len(trained) > 0, "no named part of the loss has a gradient")
    total = sum(trained.values(), torch.zeros((), dtype=torch.float64))
    require(torch.allclose(total, loss.total), f"parts with a gradient add up to {float(total):.8g}, the total is {float(loss.total):.8g}")
    generator = torch.Generator().manual_seed(1)
    reached: set[str] = set()
    parameters = dict(method.named_parameters())
    at = list(parameters.values())
    gradients = {k: torch.autograd.grad(v, at, retain_graph=True, allow_unused=True) for k, v in trained.items()}
    for part, grads in gradients.items():
        for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
            if grad is not None and grad.abs().sum() > 0:
                reached.add(name)
            if (part, name) in case.spec.loss_skip:
                continue
            mask = case.spec.loss_along(method, part, name) if case.spec.loss_along else None
            along = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            along = along if mask is None else along * mask
            numeric = _directional(lambda part=part: _parts(method, x, y).parts[part], parameter, along)
            _agree(0.0 if grad is None else float((grad * along).sum()), numeric, f"{part} in {name}")
    unreached = parameters.keys() - reached
    if unreached:
        raise Broken(f"no part of the loss reaches {', '.join(sorted(unreached))}")


LAWS: dict[str, Law] = {
    "M3 gradient of forward": of_forward,
    "M3b gradient of every part of the loss": of_loss,
}
