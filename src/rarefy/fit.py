"""Fitting: `calibrate` passes data through a model, layer after layer; `train` is the one training loop.

Shape letters: B = rows of a batch, D = input width, E = output width, T = tokens of a context.
"""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import world
from .errors import BadInput, Damaged, Halted, Unsupported
from .learner import Learner, Recipe
from .method import Sparse
from .observing import Watched
from .places import refuse_shared, sites_of
from .selection import check_finite
from .site import Site, replaced
from .store.atomic import write_atomic
from .store.checkpoint import diff_meta, load_checkpoint, save_checkpoint
from .store.lines import append_line, read_lines, to_lines
from .store.lock import RunLock
from .streams import Batch, Stream, digest

__all__ = ["Log", "Recipe", "calibrate", "train"]

Log = Callable[[dict[str, Any]], None]


# ---------------------------------------------------------------------------------------------------- calibration


class _Enough(Exception):
    """Raised inside a forward pass once every site looked at was read."""


def _places(model: nn.Module, names: list[str]) -> dict[str, Site]:
    """Plan key -> the linear layer or the attention it names."""
    found = {}
    for name, there in zip(names, sites_of(model, names), strict=True):
        site, *more = there.values()
        if more or site.kind == "stream":
            what = f"{len(there)} sites" if more else f"a {site.kind}"
            raise BadInput(f"{name} names {what}; calibrate observes one linear layer or attention each, such as layers.0.up_proj or layers.0.attn")
        found[name] = site
    refuse_shared(model, found.values())
    return found


class _Pass:
    """One forward pass of calibration: the positions [B, T] that count, or None for all, and the sites read so far."""

    mask: Tensor | None
    read: set[str]


@contextlib.contextmanager
def _observing(model: nn.Module, plan: Mapping[str, Sparse], found: Mapping[str, Site], now: _Pass) -> Iterator[None]:
    """Show methods what flows at their sites; the pass ends once all were read."""
    handles = []

    def read(name: str) -> None:
        now.read.add(name)
        if len(now.read) == len(found):
            raise _Enough

    attention = {name: Watched(plan[name], partial(read, name)) for name, site in found.items() if site.kind == "attention"}
    try:
        for name, site in found.items():
            if site.kind == "attention":
                continue

            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                x, y = inputs[0].detach(), output.detach()
                check_finite(x, f"input of {name}")
                x, y = (v.flatten(0, -2) if now.mask is None else v.reshape(*now.mask.shape, -1)[now.mask] for v in (x, y))
                if len(x):
                    plan[name].observe(x, y)
                read(name)

            handles.append(model.get_submodule(site.module_path).register_forward_hook(hook))
        with replaced(model, attention):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _layer_of(site: Site) -> int:
    """Number of the layer a module lies in."""
    numbers = re.findall(r"\.(\d+)\.", f".{site.module_path}.")
    return int(numbers[0]) if numbers else -1


@dataclass(frozen=True)
class _Ids:
    input_ids: Tensor


@torch.no_grad()
def calibrate(
    model: nn.Module, plan: Mapping[str, Sparse], batches: Iterable[Any], *, sequential: bool = True,
    on_progress: Callable[[str, int], None] | None = None,
) -> Mapping[str, Sparse]:
    """Show each calibrated method of `plan` its site's inputs and outputs, then let it finish.

    Memory is that of the token ids and of the methods' own statistics: activations are not kept, but computed again from
    the embedding for every layer, and only as deep as that layer.

    Args:
        plan: name of a linear site or of an attention -> method. Methods that need no calibration are left as they are and stand in no pass.
        batches: token ids [B, T], or objects with `.input_ids` [B, T] and optionally `.attention_mask` [B, T], whose zeros mark padding that no
            method is shown.
        sequential: layer after layer, each seeing what the model gives with the methods of all layers before it already in
            place (the order of the Wanda and SparseGPT papers); the layers of one number are observed together, before any
            of them is replaced. Otherwise every site sees the dense model, in one pass.

    Raises:
        BadInput: no data, data with NaN, or a name that is not one linear layer or attention; names the site.
        Unsupported: a model that does not read token ids.
    """
    wanted = [name for name, method in plan.items() if method.fitted == "calibrated"]
    if wanted and (reads := getattr(model, "main_input_name", "input_ids")) != "input_ids":
        raise Unsupported(f"{plan[wanted[0]].name} is calibrated on token ids, and a {type(model).__name__} reads {reads}")
    found = _places(model, wanted)
    groups: dict[int, dict[str, Site]] = {}
    for name, site in found.items():
        groups.setdefault(_layer_of(site) if sequential else 0, {})[name] = site
    batches = [_Ids(batch) if isinstance(batch, Tensor) else batch for batch in batches]
    if bad := next((batch for batch in batches if not hasattr(batch, "input_ids")), None):
        raise BadInput(f"a batch to calibrate on is a {type(bad).__name__} without .input_ids; give token ids [B, T] or what a tokenizer returns")
    if wanted and not batches:
        raise BadInput("calibration data is empty; give --data text that holds at least one context")
    more = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    done: dict[str, Sparse] = {}
    now = _Pass()
    for _, group in sorted(groups.items()):
        with replaced(model, done), _observing(model, plan, group, now):
            for count, batch in enumerate(batches, 1):
                mask = getattr(batch, "attention_mask", None)
                now.mask, now.read = (mask.bool() if mask is not None and mask.ndim == 2 else None), set()
                with contextlib.suppress(_Enough):
                    model(input_ids=batch.input_ids, attention_mask=mask, **more)
                if on_progress:
                    on_progress(next(iter(group)), count)
        for name in group:
            plan[name].finish()
            done[name] = plan[name]
    return plan


# ------------------------------------------------------------------------------------------------------- training


def train(
    plan: Mapping[str, Sparse], stream: Stream, recipe: Recipe, run: str | Path | None = None, *, resume: bool = True,
    begun: Collection[str] = (), shards: int = 1, on_log: Log | None = None,
) -> Mapping[str, Sparse]:
    """Train every method of `plan` on one stream of activations; the only training loop.

    Each batch is read once and shown to every method, in that method's dtype and on its device. With a `run` folder,
    which no other process may then write, checkpoints go to `run/checkpoints` every `recipe.save_every` steps and at the
    end, the log to `run/log.jsonl`, and a run found there is taken up bit-exactly where its last checkpoint stands;
    SIGINT and SIGTERM end it after the step at work with a checkpoint. Without a run folder signals do what they always do.

    Under torch.distributed every process reads every batch and works on its share of the rows; the first one's methods
    are the ones trained, and it alone writes. An end, an error or a signal of one process is that of all.

    Args:
        plan: name -> method to train, on the device and in the dtype to train in. Back in eval mode afterwards.
        resume: False refuses a folder that holds a run.
        begun: names of methods that were trained before: they are not initialised again but go on from their tensors, which
            a run taken up again must be given too.
        shards: of torch.distributed's processes, how many hold a method between them, each a part of its latents; every set
            of that many works on its share of the rows. Checkpoints are those of whole methods, whatever `shards` is.
        on_log: called in the first process with each log record: step, seconds, rows a second, and per method the loss
            and its parts; and with {"step", "skipped"} when damaged checkpoints were passed over.

    Raises:
        BadInput: settings out of range or other than those of the run found; another process has the folder; the disk
            refuses; NaN in data, loss or gradient, naming method, step and batch. No method has then taken that step.
        Halted: SIGINT or SIGTERM came; a checkpoint was written first.
    """
    recipe.check()
    run = None if run is None else Path(run)
    learners = _learners(plan, recipe)
    meta = _meta(learners, stream, recipe, begun)
    with contextlib.ExitStack() as held:
        if mesh := held.enter_context(world.meshed(shards)):
            learners = [Learner(whole.name, whole.method.shard(mesh), recipe, mesh) for whole in learners]
        stop = held.enter_context(_signals()) if run else world.Stop()
        with world.together():
            if run and world.first():
                held.enter_context(RunLock(run / "checkpoints"))
        start = _begin(run, learners, meta, resume, on_log)
        for learner in learners:
            learner.method.train()
            held.callback(learner.method.eval)
            if mesh:
                held.callback(learner.give_back, plan[learner.name])
        _steps(learners, stream, recipe, start, run, meta, stop, begun, on_log)
    return plan


def _learners(plan: Mapping[str, Sparse], recipe: Recipe) -> list[Learner]:
    if not plan:
        raise BadInput("the plan is empty: give at least one method to train")
    names: dict[int, str] = {}
    for name, method in plan.items():
        if names.setdefault(id(method), name) != name:
            raise BadInput(f"{names[id(method)]} and {name} are the same method; give each name a method of its own")
    return [Learner(name, method, recipe) for name, method in plan.items()]


def _meta(learners: list[Learner], stream: Stream, recipe: Recipe, begun: Collection[str]) -> dict[str, Any]:
    if strange := set(begun) - {m.name for m in learners}:
        raise BadInput(f"begun names {', '.join(sorted(strange))}, which the plan does not hold; it holds {', '.join(m.name for m in learners)}")
    return {
        "methods": {m.name: {"method": m.method.name, "dtype": str(m.dtype).removeprefix("torch."), **m.method.arguments} for m in learners},
        "recipe": {**asdict(recipe), "betas": list(recipe.betas)},
        "data": stream.made_from,
        **({"begun": {m.name: digest(m.method.state_dict()) for m in learners if m.name in begun}} if begun else {}),
    }


def _begin(run: Path | None, learners: list[Learner], meta: dict[str, Any], resume: bool, on_log: Log | None) -> int:
    """Step to start at: 0, or that of the run's last checkpoint, which is taken up. Refuses a folder that holds another run."""
    if run is None:
        return 0
    with world.together():
        found = load_checkpoint(run / "checkpoints")
        if found and not resume:
            raise BadInput(f"{run} already holds a training run; resume it or use another folder")
        if found:
            different = diff_meta(found.meta.get("made"), meta)
            if different:
                raise BadInput(f"{run} was begun with other settings: {'; '.join(different)}; use another folder, or the same settings")
            for learner in learners:
                learner.restore(found.tensors)
            _restore_random(found.tensors)
        start = found.step if found else 0
        if world.first():
            _forget_after(run / "log.jsonl", start)
            if found and found.skipped and on_log:
                on_log({"step": start, "skipped": found.skipped})
    world.same("the step they start at", start)
    return start


def _steps(
    learners: list[Learner], stream: Stream, recipe: Recipe, start: int, run: Path | None, meta: dict[str, Any], stop: world.Stop,
    begun: Collection[str], on_log: Log | None,
) -> None:
    if start >= recipe.steps:
        return
    batches = stream.batches(start)
    with world.together():
        first = _next(batches, start, recipe.steps)
        world.mine(first[0])
        if start == 0:
            for learner in learners:
                if learner.name not in begun:
                    learner.method.initialise(*_placed(first, learner, {}))
    world.copy_from_first(t for learner in learners for t in learner.tensors())
    clock, rows = time.perf_counter(), 0
    for step in range(start, recipe.steps):
        try:
            with world.together(stop):
                batch = first if step == start else _next(batches, step, recipe.steps)
                share, placed = _share(batch), {}
                for learner in learners:
                    learner.gradient(*_placed(share, learner, placed), step)
            for learner in learners:
                learner.settle(step)
        except BaseException:
            for learner in learners:
                learner.undo()
            raise
        for learner in learners:
            learner.step(step)
        done, rows = step + 1, rows + (len(batch[0]) if batch[0].is_floating_point() else batch[0].numel())      # of windows: tokens
        if done % recipe.log_every == 0 or done == recipe.steps:
            seconds = time.perf_counter() - clock
            record = {"step": done, "of": recipe.steps, "seconds": round(seconds, 3), "rows_per_s": round(rows / seconds, 1)}
            _report(record, learners, run, on_log)
        if run and (done % recipe.save_every == 0 or done == recipe.steps or stop.agreed):
            _keep(run, learners, meta, done)
        if stop.agreed:
            raise Halted(done, stop.agreed)
    with world.together(stop):
        pass
    if stop.agreed:        # it came while the last checkpoint was written
        raise Halted(recipe.steps, stop.agreed)


def _next(batches: Iterator[Batch], step: int, steps: int) -> Batch:
    """The batch of a step, checked."""
    got = next(batches, None)
    if got is None:
        raise BadInput(f"the data ended at step {step} of {steps}; give a stream without end, or fewer steps")
    x_BD, y_BE = got
    check_finite(x_BD, f"training rows of step {step}")
    if y_BE is not x_BD:
        check_finite(y_BE, f"training targets of step {step}")
    return got


def _share(batch: Batch) -> Batch:
    """This process's rows."""
    x_BD, y_BE = batch
    mine = world.mine(x_BD)
    return mine, (mine if y_BE is x_BD else world.mine(y_BE))


def _placed(batch: Batch, learner: Learner, made: dict[tuple[torch.dtype, torch.device], Batch]) -> Batch:
    """The batch in a method's dtype (token ids in their own) and on its device; `made` holds what other methods of the step had made."""
    key = (learner.dtype, learner.device)
    if key not in made:
        x, y = batch
        mine = x.to(device=learner.device, dtype=learner.dtype if x.is_floating_point() else x.dtype)
        made[key] = mine, (mine if y is x else y.to(device=learner.device, dtype=learner.dtype))
    return made[key]


def _report(record: dict[str, Any], learners: list[Learner], run: Path | None, on_log: Log | None) -> None:
    record["methods"] = {m.name: world.mean_of({part: float(value) for part, value in m.logged.items()}) for m in learners}
    with world.together():
        if world.first() and run:
            append_line(run / "log.jsonl", record)
        if world.first() and on_log:
            on_log(record)


def _keep(run: Path, learners: list[Learner], meta: dict[str, Any], step: int) -> None:
    parts = [learner.state() for learner in learners if learner.shards or world.first()]
    with world.together():
        if world.first():
            tensors = _random()
            for learner, held in zip(learners, parts, strict=True):
                learner.check(held)
                tensors |= held
            save_checkpoint(run / "checkpoints", step, tensors, {"made": meta})


def _random() -> dict[str, Tensor]:
    """State of every random generator that a method may draw from."""
    out = {"rng/torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        out |= {f"rng/cuda/{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
    return out


def _restore_random(tensors: Mapping[str, Tensor]) -> None:
    if "rng/torch" not in tensors:
        raise Damaged("the checkpoint does not hold rng/torch, the state of the random generator; it was written by another version")
    torch.set_rng_state(tensors["rng/torch"])
    if torch.cuda.is_initialized():
        for i in range(torch.cuda.device_count()):
            if f"rng/cuda/{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"rng/cuda/{i}"], i)


@contextlib.contextmanager
def _signals() -> Iterator[world.Stop]:
    """Note SIGINT and SIGTERM, however many come, instead of dying of them; only the main thread may."""
    stop = world.Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(signum: int, _: Any) -> None:
        stop.seen = stop.seen or signum

    old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in old.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)


def _forget_after(log: Path, step: int) -> None:
    """Drop log records past the checkpoint taken up, which will be made again."""
    if not log.exists():
        return
    records = read_lines(log)
    kept = [r for r in records if r.get("step", 0) <= step]
    if len(kept) < len(records):
        write_atomic(log, to_lines(kept))
