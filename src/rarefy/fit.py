"""Fitting: `calibrate` passes data once through a model, `train` is the one training loop.

Shape letters: B = rows of a batch, D = input width, E = output width.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import BadInput, Halted
from .method import Sparse, positive
from .selection import check_finite
from .site import replaced, sites
from .store.checkpoint import diff_meta, load_checkpoint, save_checkpoint
from .store.lines import append_line, read_lines
from .streams import Batch, Stream

Log = Callable[[dict[str, Any]], None]


# ---------------------------------------------------------------------------------------------------- calibration


@contextlib.contextmanager
def _observing(model: nn.Module, plan: Mapping[str, Sparse], names: Iterable[str]) -> Iterator[None]:
    found = {name: sites(model, name)[name] for name in names}
    handles = []
    try:
        for name, site in found.items():
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any, name: str = name) -> None:
                x = inputs[0].detach()
                check_finite(x, f"input of {name}")
                plan[name].observe(x.flatten(0, -2), output.detach().flatten(0, -2))

            handles.append(model.get_submodule(site.module_path).register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer_of(name: str) -> int:
    parts = name.split(".")
    return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else -1


@torch.no_grad()
def calibrate(
    model: nn.Module, plan: Mapping[str, Sparse], batches: Iterable[Any], *, sequential: bool = True,
    on_progress: Callable[[str, int], None] | None = None,
) -> Mapping[str, Sparse]:
    """Show each calibrated method of `plan` its site's inputs and outputs, then let it finish.

    Args:
        plan: linear site name -> method. Methods that need no calibration are left as they are.
        batches: objects with `.input_ids` [B, T] and optionally `.attention_mask`; walked once a layer when
            sequential, so a list or another re-iterable.
        sequential: layer after layer, each seeing what the already fitted layers before it give (the order of the
            Wanda and SparseGPT papers); otherwise one pass for all. Memory is that of the methods' own statistics.

    Raises:
        BadInput: no data, or data with NaN, naming the site.
    """
    wanted = [name for name, method in plan.items() if method.fitted == "calibrated"]
    groups: dict[int, list[str]] = {}
    for name in wanted:
        groups.setdefault(_layer_of(name) if sequential else 0, []).append(name)
    batches = batches if isinstance(batches, list) else list(batches)
    if wanted and not batches:
        raise BadInput("calibration data is empty; give --data text that holds at least one context")
    done: dict[str, Sparse] = {}
    for group in sorted(groups):
        with replaced(model, done) if done else contextlib.nullcontext(), _observing(model, plan, groups[group]):
            for count, batch in enumerate(batches, 1):
                model(input_ids=batch.input_ids, attention_mask=getattr(batch, "attention_mask", None), use_cache=False)
                if on_progress:
                    on_progress(groups[group][0], count)
        for name in groups[group]:
            plan[name].finish()
            done[name] = plan[name]
    return plan


# ------------------------------------------------------------------------------------------------------- training


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
    """Largest norm of a method's gradient; 0 switches clipping off."""
    accumulate: int = 1
    """Pieces a batch is worked through in; the gradient is that of the whole batch."""
    precision: str = "float32"
    """float32, or bfloat16 autocast of the products."""
    save_every: int = 500
    log_every: int = 25

    def check(self) -> Recipe:
        """Raise BadInput if a field is out of range."""
        for name in ("steps", "accumulate", "save_every", "log_every"):
            positive(name, getattr(self, name))
        if self.lr < 0 or not math.isfinite(self.lr):
            raise BadInput(f"lr={self.lr} must be >= 0 (0 chooses one by width)")
        if not 0 <= self.decay <= 1:
            raise BadInput(f"decay={self.decay} must be in [0, 1]: the last fraction of the steps")
        if not 0 <= self.warmup <= self.steps:
            raise BadInput(f"warmup={self.warmup} must be in 0..{self.steps}, the steps")
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


class _Learner:
    """One method with its optimiser and what it logs."""

    def __init__(self, name: str, method: Sparse, recipe: Recipe) -> None:
        if method.fitted != "trained":
            raise BadInput(f"{name}: {method.name or type(method).__name__} is not trained; use calibrate, or leave it out")
        self.name, self.method, self.recipe = name, method, recipe
        self.peak = peak_rate(recipe, method)
        self.parameters = [p for p in method.parameters() if p.requires_grad]
        self.optimiser = torch.optim.Adam(self.parameters, lr=self.peak, betas=recipe.betas, fused=True)

    def step(self, x_BD: Tensor, y_BE: Tensor, step: int) -> dict[str, float]:
        """One optimiser step; returns the logged scalars. Raises BadInput on a loss or gradient that is not finite."""
        self.optimiser.param_groups[0]["lr"] = self.peak * self.recipe.rate(step)
        pieces = list(zip(x_BD.chunk(self.recipe.accumulate), y_BE.chunk(self.recipe.accumulate), strict=True))
        logged: dict[str, float] = {}
        for x, y in pieces:
            share = len(x) / len(x_BD)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
                loss = self.method.loss(x, y)
            (loss.total * share).backward()
            for part, value in {"loss": loss.total, **loss.parts}.items():
                logged[part] = logged.get(part, 0.0) + float(value.detach()) * share
        _average_gradients(self.parameters)
        self.method.before_step()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if not (math.isfinite(logged["loss"]) and bool(torch.isfinite(norm))):
            raise BadInput(
                f"{self.name}: the loss became {logged['loss']} with gradient norm {float(norm)} at step {step}; training stops "
                "and the last good checkpoint is kept: lower lr or look at the batch of that step"
            )
        if self.recipe.clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.recipe.clip, norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=False)
        self.method.after_step(step)
        _join_buffers(self.method)
        return logged

    def state(self) -> dict[str, Tensor]:
        """Parameters, buffers and optimiser state as named tensors."""
        out = {f"{self.name}/method/{k}": v for k, v in self.method.state_dict().items()}
        for i, p in enumerate(self.parameters):
            for k, v in self.optimiser.state.get(p, {}).items():
                out[f"{self.name}/optimiser/{i}/{k}"] = v
        return out

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The reverse of `state`."""
        mine = f"{self.name}/method/"
        self.method.load_state_dict({k.removeprefix(mine): v for k, v in tensors.items() if k.startswith(mine)})
        mine = f"{self.name}/optimiser/"
        for key, value in tensors.items():
            if key.startswith(mine):
                i, field = key.removeprefix(mine).split("/")
                self.optimiser.state[self.parameters[int(i)]][field] = value.clone()


def _world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    _, size = _world()
    if size > 1:
        for p in parameters:
            grad = p.grad if p.grad is not None else torch.zeros_like(p)
            dist.all_reduce(grad)
            p.grad = grad.div_(size)


def _join_buffers(method: Sparse) -> None:
    """Make counters and thresholds of data-parallel copies agree: counts since last use by minimum, values by mean."""
    _, size = _world()
    if size > 1:
        for buffer in method.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer.div_(size)
            else:
                dist.all_reduce(buffer, op=dist.ReduceOp.MIN)


def _mine(rows: Tensor) -> Tensor:
    rank, size = _world()
    if len(rows) % size:
        raise BadInput(f"a batch of {len(rows)} rows does not divide over {size} processes")
    return rows.chunk(size)[rank]


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; only the main thread may."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    old = {s: signal.signal(s, lambda signum, _: seen.append(signum)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)


def _meta(learners: list[_Learner], stream: Stream, recipe: Recipe) -> dict[str, Any]:
    return {
        "methods": {learner.name: {"method": learner.method.name, **learner.method.arguments} for learner in learners},
        "recipe": {**asdict(recipe), "betas": list(recipe.betas)},
        "data": stream.made_from,
    }


def _resume(run: Path, learners: list[_Learner], meta: dict[str, Any], on_log: Log | None) -> int:
    checkpoint = load_checkpoint(run / "checkpoints")
    if checkpoint is None:
        return 0
    if checkpoint.skipped and on_log:
        on_log({"step": checkpoint.step, "skipped": checkpoint.skipped})
    different = diff_meta(checkpoint.meta["made"], meta)
    if different:
        raise BadInput(f"{run} was begun with other settings: {'; '.join(different)}; use another folder, or the same settings")
    for learner in learners:
        learner.restore(checkpoint.tensors)
    torch.set_rng_state(checkpoint.tensors["rng/torch"])
    return checkpoint.step


def _begin(run: Path | None, learners: list[_Learner], meta: dict[str, Any], resume: bool, on_log: Log | None) -> int:
    """Step to start at: 0, or that of the run's last checkpoint, which is taken up. Refuses a folder that holds another run."""
    if run is None:
        return 0
    start = _resume(run, learners, meta, on_log) if resume else 0
    if not start and load_checkpoint(run / "checkpoints") is not None:
        raise BadInput(f"{run} already holds a training run; resume it or use another folder")
    if start:
        _forget_after(run / "log.jsonl", start)
    return start


def train(
    plan: Mapping[str, Sparse], stream: Stream, recipe: Recipe, run: Path | None = None, *, resume: bool = True,
    on_log: Log | None = None,
) -> Mapping[str, Sparse]:
    """Train every method of `plan` on one stream of activations; the only training loop.

    Each batch is read once and shown to every method. With a `run` folder, checkpoints are written every
    `recipe.save_every` steps and at the end, the log goes to `run/log.jsonl`, and a run found there is taken up
    bit-exactly where its last checkpoint stands. Under torch.distributed each process takes its share of every batch.

    Args:
        plan: name -> method to train, on the device and in the dtype to train in.
        on_log: called with each log record: step, seconds, rows a second, and per method loss and its parts.

    Raises:
        BadInput: settings out of range or other than those of the run found; NaN in data or loss, naming method and step.
        Halted: SIGINT or SIGTERM came; a checkpoint was written first.
    """
    recipe.check()
    if not plan:
        raise BadInput("the plan is empty: give at least one method to train")
    learners = [_Learner(name, method, recipe) for name, method in plan.items()]
    meta = _meta(learners, stream, recipe)
    start = _begin(run, learners, meta, resume, on_log)
    for method in plan.values():
        method.train()
    with _signals() as seen:
        _steps(learners, stream, recipe, start, run, meta, seen, on_log)
    for method in plan.values():
        method.eval()
    return plan


def _steps(
    learners: list[_Learner], stream: Stream, recipe: Recipe, start: int, run: Path | None, meta: dict[str, Any], seen: list[int],
    on_log: Log | None,
) -> None:
    clock, rows = time.perf_counter(), 0
    for step, (x_BD, y_BE) in zip(range(start, recipe.steps), stream.batches(start), strict=False):
        check_finite(x_BD, f"training rows of step {step}")
        if step == 0:
            for learner in learners:
                learner.method.initialise(x_BD, y_BE)
        x_BD, y_BE = _share(x_BD, y_BE)
        record: dict[str, Any] = {"step": step + 1, "methods": {}}
        for learner in learners:
            record["methods"][learner.name] = learner.step(x_BD, y_BE, step)
        rows += len(x_BD)
        done = step + 1
        if done % recipe.log_every == 0 or done == recipe.steps:
            seconds = time.perf_counter() - clock
            record |= {"seconds": round(seconds, 3), "rows_per_s": round(rows / seconds, 1), "of": recipe.steps}
            _report(record, run, on_log)
        if run and (done % recipe.save_every == 0 or done == recipe.steps or seen):
            _keep(run, learners, meta, done)
        if seen:
            raise Halted(done, seen[0])


def _keep(run: Path, learners: list[_Learner], meta: dict[str, Any], step: int) -> None:
    if _world()[0] == 0:
        tensors = {"rng/torch": torch.get_rng_state()}
        for learner in learners:
            tensors.update(learner.state())
        save_checkpoint(run / "checkpoints", step, tensors, {"made": meta})


def _share(x_BD: Tensor, y_BE: Tensor) -> Batch:
    mine = _mine(x_BD)
    return mine, (mine if y_BE is x_BD else _mine(y_BE))


def _report(record: dict[str, Any], run: Path | None, on_log: Log | None) -> None:
    if _world()[0]:
        return
    if run:
        append_line(run / "log.jsonl", record)
    if on_log:
        on_log(record)


def _forget_after(log: Path, step: int) -> None:
    """Drop log records past the checkpoint taken up, which will be made again."""
    if not log.exists():
        return
    kept = [r for r in read_lines(log) if r.get("step", 0) <= step]
    from .store.atomic import write_atomic
    from .store.lines import to_lines

    write_atomic(log, to_lines(kept))
