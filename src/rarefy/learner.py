"""One method in training: the recipe, its optimiser, its gradient on a batch, and its state by name.

A step has two halves, so that a loss that is not finite stops training before any method of the plan has moved:
`gradient` and `settle` may raise and are undone by `undo`; `step` moves.

Shape letters: B = rows of a batch, D = input width, E = output width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import world
from .errors import BadInput, Damaged
from .method import Sparse, not_negative, positive

_ADAM = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Recipe:
    """How to train; the same for every method of a plan. Saved with the run, and a resumed run must agree with it."""

    steps: int
    lr: float = 0.0
    """Peak learning rate; 0 chooses 2e-4 / sqrt(width / 16384) for each method (Gao et al. 2024, appendix A.3)."""
    warmup: int = 0
    """Steps of linear rise from 0; 0 means steps // 20."""
    decay: float = 0.3
    """Last fraction of the steps over which the rate falls linearly to 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    """Largest norm of a method's gradient, over the whole batch; 0 switches clipping off."""
    accumulate: int = 1
    """Pieces a batch is worked through in, for less memory. Gradient and counters are those of the whole batch where the
    loss is a mean over rows; a rule that looks at a batch as one (batch top-k, a target L0) looks at each piece."""
    precision: str = "float32"
    """float32, or bfloat16 autocast of the loss; parameters, gradients and moments stay in the method's dtype."""
    save_every: int = 500
    """Steps between checkpoints: at most as many are lost when the process dies."""
    log_every: int = 25
    """Steps between log records; a record tells of its own step's batch."""

    def check(self) -> Recipe:
        """Raise BadInput if a field is out of range."""
        for name in ("steps", "accumulate", "save_every", "log_every"):
            positive(name, getattr(self, name))
        not_negative("lr", self.lr)
        not_negative("clip", self.clip)
        if not_negative("decay", self.decay) > 1:
            raise BadInput(f"decay={self.decay} must be in [0, 1]: the last fraction of the steps")
        if type(self.warmup) is not int or not 0 <= self.warmup <= self.steps:
            raise BadInput(f"warmup={self.warmup!r} must be a whole number in 0..{self.steps}, the steps")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise BadInput(f"betas={self.betas!r} must be two numbers in [0, 1): how much of the moments a step keeps")
        if self.precision not in ("float32", "bfloat16"):
            raise BadInput(f"precision={self.precision!r} must be float32 or bfloat16")
        return self

    def rate(self, step: int) -> float:
        """Factor on the peak rate at a step."""
        warmup = self.warmup or max(1, self.steps // 20)
        rise = min(1.0, (step + 1) / warmup)
        tail = self.steps * self.decay
        return rise * (min(1.0, (self.steps - step) / tail) if tail else 1.0)


def peak_rate(recipe: Recipe, method: Sparse) -> float:
    """The recipe's rate, or the one its width calls for."""
    width = method.arguments.get("width", 2**14)
    return recipe.lr or 2e-4 * math.sqrt(2**14 / width)


class Learner:
    """A method with its Adam.

    Raises:
        BadInput: the method is not one that is trained, or has nothing to train.
    """

    def __init__(self, name: str, method: Sparse, recipe: Recipe, shards: world.Shards | None = None) -> None:
        if method.fitted != "trained":
            raise BadInput(f"{name}: {method.name or type(method).__name__} is not trained; use calibrate, or leave it out")
        self.parameters = [p for p in method.parameters() if p.requires_grad]
        if not self.parameters:
            raise BadInput(f"{name}: no parameter of {method.name or type(method).__name__} requires a gradient; unfreeze it, or leave it out")
        self.name, self.method, self.recipe, self.peak, self.shards = name, method, recipe, peak_rate(recipe, method), shards
        self.optimiser = torch.optim.Adam(self.parameters, lr=self.peak, betas=recipe.betas, fused=True)
        self.logged: dict[str, Tensor] = {}
        """Loss and parts of the last batch, means over its pieces weighted by rows."""
        self._norm = 0.0
        self._before: dict[str, Tensor] = {}
        self._join: _Join | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters; batches are given in it."""
        return self.parameters[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are; batches are given there."""
        return self.parameters[0].device

    def gradient(self, x_BD: Tensor, y_BE: Tensor, step: int) -> None:
        """Compute this process's gradient. Raises BadInput if the loss is not finite, or what the method's loss raises."""
        self.logged = {}
        self._before = {k: b.clone() for k, b in self.method.named_buffers()}
        pieces = [(x_BD, y_BE)] if self.recipe.accumulate == 1 else _pieces(x_BD, y_BE, self.recipe.accumulate)
        self._join = None if len(pieces) * world.share()[1] == 1 else _Join(self.method, self._before)
        for x, y in pieces:
            share = len(x) / len(x_BD)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
                loss = self.method.loss(x, y)
            total = loss.total * share if len(pieces) > 1 else loss.total
            total.backward()
            for part, value in {"loss": loss.total, **loss.parts}.items():
                value = value.detach() * share
                self.logged[part] = self.logged[part] + value if part in self.logged else value
            if self._join:
                self._join.take(share)
        if not math.isfinite(value := float(self.logged["loss"])):
            raise BadInput(self._lost(f"the loss became {value}", step))

    def settle(self, step: int) -> None:
        """Average the gradient over processes and project it; raises BadInput, on all of them, if it is not finite."""
        if world.place()[1] > 1:
            for p in self.parameters:
                if p.grad is None:        # every process must take part in every reduction
                    p.grad = torch.zeros_like(p)
            self._sum_shards()
            world.mean_(p.grad for p in self.parameters if p.grad is not None)
        self.method.before_step()
        self._norm = self._whole_norm()
        if not math.isfinite(self._norm):
            raise BadInput(self._lost(f"the norm of its gradient became {self._norm}", step))

    def _sum_shards(self) -> None:
        """Of a parameter that all shards have, each has the gradient of what it did with it: add them up."""
        if self.shards:
            for name, p in self.method.named_parameters():
                if p.grad is not None and name not in self.method.sharded:
                    p.grad = self.shards.total(p.grad)

    def _whole_norm(self) -> float:
        """Norm of the whole method's gradient."""
        def norm(names: Callable[[str], bool]) -> Tensor:
            grads = [p.grad for n, p in self.method.named_parameters() if p.grad is not None and names(n)]
            return torch.nn.utils.get_total_norm(grads)

        if not self.shards:
            return float(norm(lambda _: True))
        part = self.shards.total(norm(lambda n: n in self.method.sharded).square())
        return float((part + norm(lambda n: n not in self.method.sharded).square()).sqrt())

    def step(self, step: int) -> None:
        """Move the parameters and let the method project and count."""
        clip = self.recipe.clip
        if clip and self._norm > clip:
            for p in self.parameters:
                if p.grad is not None:
                    p.grad.mul_(clip / self._norm)
        self.optimiser.param_groups[0]["lr"] = self.peak * self.recipe.rate(step)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self._join:
            self._join.finish()
        self.method.after_step(step)
        self._before = {}

    @torch.no_grad()
    def undo(self) -> None:
        """Forget an unfinished step: the method is as it was before the batch."""
        self.optimiser.zero_grad(set_to_none=True)
        for name, buffer in self.method.named_buffers():
            if name in self._before:
                buffer.copy_(self._before[name])
        self._before = {}

    def _lost(self, what: str, step: int) -> str:
        return (
            f"{self.name}: {what} at step {step} of training, on batch {step} (`next(stream.batches({step}))`); training stops, no method took "
            "this step and the last good checkpoint is kept: look at that batch, or start again with a lower lr"
        )

    def tensors(self) -> list[Tensor]:
        """The method's own parameters and buffers, on their own storage."""
        return [t.detach() for t in (*self.method.parameters(), *self.method.buffers())]

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed step depends on, as named tensors; of a method that is shared out the whole, in the first
        process of the shards, and every one of them must ask. The number of shards may then differ when it is taken up."""
        out = {f"{self.name}/method/{k}": (k, v) for k, v in self.method.state_dict().items()}
        name_of = {id(p): name for name, p in self.method.named_parameters()}
        for i, p in enumerate(self.parameters):
            held = self.optimiser.state[p]
            out |= {f"{self.name}/optimiser/{i}/{k}": ("" if k == "step" else name_of[id(p)], held[k]) for k in _ADAM if k in held}
        whole = {key: self.shards.whole(v) if self.shards and name in self.method.sharded else v for key, (name, v) in out.items()}
        return {key: v for key, v in whole.items() if v is not None}

    def give_back(self, method: Sparse) -> None:
        """Put what the shards have into the whole method that they were made of, in the first process of each set of shards."""
        assert self.shards
        parts = {k: self.shards.whole(v) if k in self.method.sharded else v for k, v in self.method.state_dict().items()}
        if self.shards.rank == 0:
            method.load_state_dict({k: v for k, v in parts.items() if v is not None})

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise BadInput if a parameter in a state is not finite."""
        for name, _ in self.method.named_parameters():
            if not bool(torch.isfinite(tensors[f"{self.name}/method/{name}"]).all()):
                raise BadInput(
                    f"{self.name}: {name} became NaN or inf; it is not saved and the last good checkpoint is kept: start again with a lower lr"
                )

    def _parts(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This shard's rows of a whole state."""
        assert self.shards
        ours = {f"{self.name}/method/{k}" for k in self.method.sharded}
        names = [n for n, p in self.method.named_parameters() if p.requires_grad]
        ours |= {f"{self.name}/optimiser/{i}/{k}" for i, n in enumerate(names) if n in self.method.sharded for k in _ADAM if k != "step"}
        return {key: self.shards.part(v) if key in ours else v for key, v in tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The reverse of `state`. Raises Damaged, before anything is changed, if a tensor is missing or has another shape."""
        at = f"{self.name}/optimiser"
        if self.shards:
            tensors = self._parts(tensors)
        moved = [i for i in range(len(self.parameters)) if any(f"{at}/{i}/{k}" in tensors for k in _ADAM)]    # others never had a gradient
        moments = {f"{at}/{i}/{k}": (self.parameters[i], k) for i in moved for k in _ADAM}
        want: dict[str, Any] = {f"{self.name}/method/{k}": v.shape for k, v in self.method.state_dict().items()}
        want |= {key: p.shape if k != "step" else torch.Size() for key, (p, k) in moments.items()}
        for key, shape in want.items():
            if key not in tensors or tensors[key].shape != shape:
                found = f"has shape {list(tensors[key].shape)}, not {list(shape)}" if key in tensors else "is missing"
                raise Damaged(f"the checkpoint does not fit: tensor {key} {found}; it was written by another version or for another method")
        self.method.load_state_dict({k: tensors[f"{self.name}/method/{k}"] for k in self.method.state_dict()})
        for key, (p, k) in moments.items():
            self.optimiser.state[p][k] = tensors[key].to(p.device, copy=True)


def _pieces(x_BD: Tensor, y_BE: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    """At most `count` pieces of near equal size; a target that is the input stays the same object."""
    xs = x_BD.chunk(count)
    return [(x, x) for x in xs] if y_BE is x_BD else list(zip(xs, y_BE.chunk(count), strict=True))


class _Join:
    """What a batch does to a method's buffers, from what its pieces did, each begun from the same state.

    The pieces are those of `accumulate` on each process. A float (a running threshold) moves by the mean of their moves,
    weighted by rows. A counter of rows since an event (`Sparse.row_counters`) is the least where a piece reset it, else it
    counts the rows of all. Any other counter counts once.
    """

    def __init__(self, method: Sparse, before: dict[str, Tensor]) -> None:
        self.method, self.before = method, before
        self.moves: dict[str, Tensor] = {}
        self.least: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, share: float) -> None:
        """Take in what a piece of `share` of the rows did, and set the buffers back for the next."""
        for name, buffer in self.method.named_buffers():
            old = self.before[name]
            if buffer.is_floating_point():
                move = torch.where(buffer == old, 0.0, buffer - old) * (share / world.share()[1])     # inf - inf would be NaN
                self.moves[name] = self.moves[name] + move if name in self.moves else move
            else:
                value = buffer.long()
                self.least[name] = torch.minimum(self.least[name], value) if name in self.least else value.clone()
                if name in self.method.row_counters:
                    self.moves[name] = self.moves[name] + (value - old) if name in self.moves else value - old
            buffer.copy_(old)

    @torch.no_grad()
    def finish(self) -> None:
        """Set the buffers to what the whole batch did to them."""
        for name, buffer in self.method.named_buffers():
            old = self.before[name]
            there = old + world.sum_(self.moves[name]) if name in self.moves else old
            if not buffer.is_floating_point():
                least = world.least_(self.least[name])
                there = torch.where(least > old, there, least) if name in self.moves else least
            buffer.copy_(there)
