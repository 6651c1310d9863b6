"""What every sparse method is: it selects units of one site and computes on those only.

A method's constructor arguments are plain scalars and are its whole configuration; its tensors are parameters and
buffers. Together they are the method: `save` writes the first as JSON beside the second as safetensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from .cost import Cost
from .errors import BadInput, Unsupported
from .selection import Selection
from .world import Shards


@dataclass(frozen=True)
class Loss:
    """A training loss: the total to descend and the named parts it is made of, all scalars."""

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    """Each with its weight already applied where it is part of the total; diagnostics are detached."""


class Sparse(nn.Module):
    """Base of every method. Write `select`, `forward`, `reference`, `cost`; then `observe`/`finish` or `loss`.

    `forward(*inputs)` takes what the site's module takes: rows [..., d] for latents, weights and neurons; q, k, v for
    attention. Outside training a row's result depends on that row alone.
    """

    name: ClassVar[str] = ""
    """Catalogue name, such as "latents/topk"."""
    unit: ClassVar[str] = ""
    """What is selected: latent, weight, neuron, key, ..."""
    fitted: ClassVar[str] = "none"
    """"none", "calibrated" (observe + finish) or "trained" (loss)."""
    row_counters: ClassVar[tuple[str, ...]] = ()
    """Buffers in which `loss` counts rows since an event, so that `train` can add up the pieces a batch is worked through in."""

    sharded: ClassVar[tuple[str, ...]] = ()
    """Parameters and buffers of which each process holds a part of the rows, where a method is shared out over processes."""
    serves_all: ClassVar[bool] = False
    """Whether one object stands at every site of a plan, because what it does in a layer hangs on the layers before."""

    _arguments: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Remember constructor arguments, so that every method can be saved without writing a config class."""
        super().__init_subclass__(**kwargs)
        if "__init__" not in cls.__dict__:
            return
        original: Callable[..., None] = cls.__init__
        signature = inspect.signature(original)

        def __init__(self: Sparse, *args: Any, **kwargs: Any) -> None:
            if "_arguments" not in self.__dict__:      # the outermost constructor knows what was asked for
                try:
                    bound = signature.bind(self, *args, **kwargs)
                except TypeError as error:
                    known = ", ".join(list(signature.parameters)[1:])
                    raise BadInput(f"{type(self).name or type(self).__name__}: {error}; it takes {known or 'no arguments'}") from None
                bound.apply_defaults()
                arguments = {k: v for k, v in list(bound.arguments.items())[1:]}
                object.__setattr__(self, "_arguments", arguments)
            original(self, *args, **kwargs)

        __init__.__wrapped__ = original  # type: ignore[attr-defined]
        __init__.__doc__ = original.__doc__
        cls.__init__ = __init__  # type: ignore[method-assign]

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments: plain scalars, strings and lists."""
        return dict(self._arguments)

    @property
    def budget(self) -> float:
        """Fraction of units this method was asked to keep, in (0, 1]."""
        raise NotImplementedError

    @classmethod
    def for_module(cls, module: nn.Module, **arguments: Any) -> Self:
        """The method that stands in for `module` (a Linear, Conv1D, ...), taking over its tensors."""
        raise Unsupported(f"{cls.name} does not stand in for a {type(module).__name__}")

    def select(self, *inputs: Tensor) -> Selection:
        """Which units are kept for these inputs; static methods take none."""
        raise NotImplementedError

    def forward(self, *inputs: Tensor) -> Tensor:
        """The module's output, computed on selected units only."""
        raise NotImplementedError

    def reference(self, *inputs: Tensor) -> Tensor:
        """The same, computed densely with the unselected units masked. Defines what forward must return."""
        raise NotImplementedError

    def cost(self, density: float | None = None) -> Cost:
        """Counted work per row at a density (default: the budget)."""
        raise NotImplementedError

    def dense_cost(self) -> Cost:
        """Counted work per row of the dense module this replaces."""
        raise NotImplementedError

    def observe(self, *inputs: Tensor) -> None:
        """Calibration: take in a batch of the site's input rows and output rows, or of queries, keys and values. Must not change results yet."""
        raise Unsupported(f"{self.name} is not calibrated")

    def take_sizes(self, tensors: Mapping[str, Tensor]) -> None:
        """Before loading: give buffers the sizes that a file's tensors say, where arguments do not. Default: nothing."""

    def finish(self) -> None:
        """End calibration: choose thresholds or masks from what was observed. Calling it twice changes nothing."""
        raise Unsupported(f"{self.name} is not calibrated")

    def initialise(self, x: Tensor, y: Tensor | None = None) -> None:
        """Called once with the first rows, before any training or use: scales, centres, first directions. Default: nothing."""

    def loss(self, x: Tensor, y: Tensor) -> Loss:
        """Training: rows x in, rows y to reproduce (y is x for autoencoders)."""
        raise Unsupported(f"{self.name} is not trained")

    def shard(self, shards: Shards) -> Sparse:
        """This process's part of a method that several processes hold between them and train as one."""
        raise Unsupported(f"{self.name} cannot be shared out over processes; latents/topk and latents/abs_topk can, or train it with shards=1")

    def before_step(self) -> None:
        """Called by `train` between the backward pass and the optimiser's step (gradient projections). Default: nothing."""

    def after_step(self, step: int) -> None:
        """Called by `train` after each optimiser step (projections, counters). Default: nothing."""

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.arguments.items())


def positive(name: str, value: int, most: int | None = None) -> int:
    """`value` if it is an integer in 1..most, else BadInput naming the argument, the value and the range."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or (most is not None and value > most):
        raise BadInput(f"{name}={value!r} must be a whole number {'>= 1' if most is None else f'in 1..{most}'}")
    return value


def not_negative(name: str, value: float) -> float:
    """`value` if it is a finite number >= 0, else BadInput naming the argument and the value."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise BadInput(f"{name}={value!r} must be a finite number >= 0")
    return value


def fraction(name: str, value: float) -> float:
    """`value` if it is in (0, 1], else BadInput naming the argument, the value and the range."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise BadInput(f"{name}={value!r} must be in (0, 1]: the fraction of units kept")
    return float(value)
