"""What a law needs to know of a method, and how a law says that it is broken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..method import Sparse
from ..selection import Selection

Inputs = tuple[Tensor, ...]


class Broken(AssertionError):
    """A law that does not hold; the message gives the figures."""


class NotApplicable(Exception):
    """A law that says nothing about this method; the message says why."""


@dataclass(frozen=True)
class Spec:
    """How to make, fit and feed one method.

    Inputs are tuples of tensors whose first dim is the batch: rows [B, d], or q, k, v [B, heads, T, d].
    """

    make: Callable[[float], Sparse]
    """A new method at a budget, not fitted; the same bits at each call."""
    inputs: Callable[[int, int], Inputs]
    """(batch, seed) -> float32 inputs."""
    fit: Callable[[Sparse, Inputs], None] | None = None
    """Fits the method to inputs: observe and finish, or a stand-in for training. None where there is nothing to fit."""
    dense: Callable[[Sparse, Inputs], Tensor] | None = None
    """The output of the dense module that the method stands in for."""
    not_dense: str = ""
    """Why `dense` is None."""
    one_unit: Callable[[], tuple[Sparse, Inputs]] | None = None
    """A method with a single unit and inputs for it."""
    permuted: Callable[[Sparse, Inputs, Tensor], tuple[Sparse, Inputs]] | None = None
    """The method and inputs with units in another order."""
    permutable: Callable[[Inputs], Inputs] = lambda inputs: inputs
    """The part of the inputs for which the law holds (a last query, say)."""
    units: Callable[[Sparse, Inputs], int] | None = None
    """How many units `permuted` may put in another order."""
    not_permuted: str = ""
    """Why `permuted` is None."""
    budgets: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 1.0)
    """Budgets the method can be made at; one or none where the budget is learned."""
    density: Callable[[Sparse, Inputs], float] | None = None
    """Measured density, where it is not that of the selection."""
    density_slack: Callable[[int], float] = lambda n: 0.5 / n + 1e-6
    """How far the measured density may lie from the budget, of n units: rounding alone by default."""
    bad_arguments: tuple[tuple[Mapping[str, Any], str], ...] = ()
    """Constructor arguments out of range and the one that the error must name."""
    sound_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments beside which a bad one is wrong."""
    site: str = ""
    """Where in a Llama it goes, for putting it in and taking it out."""
    loss_inputs: Callable[[Sparse], tuple[Sparse, Tensor, Tensor]] | None = None
    """Method in float64, x and y at which every part of the loss is alive and away from kinks."""
    loss_skip: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """(part, parameter) whose gradient is a stand-in by design -> why."""
    loss_along: Callable[[Sparse, str, str], Tensor | None] | None = None
    """(method, part, parameter) -> mask of the entries for which the part's gradient is exact; None for all."""
    bounds: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
    )
    """Relative error against float64 by dtype."""
    expected_failures: Mapping[str, str] = field(default_factory=dict)
    """Id of a law that the method cannot keep -> why. If it holds all the same, that is a failure."""


class Case:
    """A spec with what the laws ask of it."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    @property
    def budget(self) -> float:
        """A middling budget that the method can be made at."""
        return self.spec.budgets[len(self.spec.budgets) // 2] if self.spec.budgets else 1.0

    def inputs(self, batch: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32) -> Inputs:
        """Fresh inputs; those that are not of whole numbers, in `dtype`."""
        return tuple(x.to(dtype) if x.is_floating_point() else x for x in self.spec.inputs(batch, seed))

    def fresh(self, budget: float | None = None) -> Sparse:
        """Not fitted, in eval mode."""
        return self.spec.make(self.budget if budget is None else budget).eval()

    def ready(self, budget: float | None = None, dtype: torch.dtype = torch.float32) -> Sparse:
        """Fitted to standard inputs, in eval mode."""
        method = self.fresh(budget)
        if self.spec.fit is not None:
            self.spec.fit(method, self.inputs(64, seed=1))
        return method.to(dtype).eval()


Law = Callable[[Case], None]


def require(holds: bool | Tensor, message: str) -> None:
    """Raise Broken unless it holds."""
    if not bool(holds):
        raise Broken(message)


def same_bits(a: Tensor, b: Tensor, what: str) -> None:
    """Raise Broken unless two tensors are equal in dtype, shape and every value."""
    require(a.dtype == b.dtype and a.shape == b.shape, f"{what}: {a.dtype} {list(a.shape)} against {b.dtype} {list(b.shape)}")
    if not torch.equal(a, b):
        worst = (a.double() - b.double()).abs().max().item()
        raise Broken(f"{what}: {int((a != b).sum())} of {a.numel()} values differ, by up to {worst:.3g}")


def close(a: Tensor, b: Tensor, bound: float, what: str) -> None:
    """Raise Broken unless ||a - b|| <= bound * ||b||, and both are finite."""
    require(a.shape == b.shape, f"{what}: {list(a.shape)} against {list(b.shape)}")
    a, b = a.detach().double(), b.detach().double()
    require(torch.isfinite(a).all() and torch.isfinite(b).all(), f"{what}: NaN or inf in the result")
    error, size = (a - b).norm().item(), b.norm().item()
    require(error <= bound * max(size, 1e-30) or error == 0, f"{what}: relative error {error / max(size, 1e-30):.3g}, allowed {bound:g}")


def chosen(method: Sparse, inputs: Inputs) -> Selection:
    """The method's selection for inputs."""
    with torch.no_grad():
        return method.select(*inputs)


def state_of(method: Sparse) -> dict[str, Tensor]:
    """Every parameter and buffer, also those that are not saved, by name; copies."""
    held = dict(method.named_parameters(remove_duplicate=False)) | dict(method.named_buffers(remove_duplicate=False))
    return {k: v.detach().clone() for k, v in held.items()}


def same_state(before: dict[str, Tensor], after: dict[str, Tensor], what: str) -> None:
    """Raise Broken unless both hold the same names and bits."""
    require(before.keys() == after.keys(), f"{what}: {sorted(before.keys() ^ after.keys())} came or went")
    for key in before:
        same_bits(before[key], after[key], f"{what}: {key}")
