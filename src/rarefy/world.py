"""The processes that train together (torch.distributed, where it was initialised); one process is a world of its own.

By default each has whole methods and a share of the rows. Within `meshed(S)` every S consecutive processes share out the
latents of one dictionary and see the same rows, and rows are shared out over those sets.

Whatever stops, saves or fails is decided on what every process knows: a process that left alone would leave the others
waiting for it in a reduction.

Shape letters: B = rows of a batch.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import BadInput, RarefyError, Unsupported


def place() -> tuple[int, int]:
    """(this process's rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def first() -> bool:
    """Whether this is the process that writes."""
    return place()[0] == 0


_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PATIENCE = timedelta(days=1)
"""How long a process waits for another, which may be writing a store meanwhile; torchrun ends those whose peer has died."""


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Meet the processes that torchrun started beside this one, on gloo, for a block; nothing to do where there are none or they have met."""
    alone = not all(name in os.environ for name in _TORCHRUN) or int(os.environ["WORLD_SIZE"]) < 2
    if alone or not dist.is_available() or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _device() -> torch.device:
    """Where numbers that are no part of a model can be reduced."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


@dataclass(frozen=True)
class Shards:
    """The processes that hold one dictionary between them, and this one's place among them."""

    rank: int
    size: int
    group: Any
    """Of torch.distributed: these processes."""
    others: Any
    """Of torch.distributed: the processes with the same part of the dictionary and other rows."""

    def total(self, part: Tensor) -> Tensor:
        """Sum over the shards. Each shard takes the whole sum further alike, so each part's gradient is the sum's."""
        return _Total.apply(part, self.group)

    def gather(self, mine: Tensor) -> Tensor:
        """[S, ...] what every shard has, on each of them; follows no gradient."""
        held = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(held, mine.detach().contiguous(), group=self.group)
        return torch.stack(held)

    def count(self, value: int) -> int:
        """Sum of a whole number over the shards."""
        held = torch.tensor(value, device=_device())
        dist.all_reduce(held, group=self.group)
        return int(held)

    def part(self, whole: Tensor) -> Tensor:
        """This process's rows of a tensor that is shared out."""
        return whole.chunk(self.size)[self.rank]

    def whole(self, part: Tensor) -> Tensor | None:
        """The parts of all one after another, in the first process of the shards; elsewhere None."""
        held = [torch.empty_like(part) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(part.detach().contiguous(), held, group=self.group, group_dst=0)
        return None if held is None else torch.cat(held)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part, group):  # type: ignore[no-untyped-def]
        out = part.detach().contiguous().clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, None


_held: ContextVar[Shards | None] = ContextVar("shards", default=None)
"""What the innermost `meshed` block shares dictionaries out over."""


@contextlib.contextmanager
def meshed(shards: int) -> Iterator[Shards | None]:
    """Share out dictionaries over every `shards` consecutive processes for a block; None where `shards` is 1.

    Raises:
        BadInput: the processes do not divide into sets of that size.
    """
    rank, size = place()
    if shards < 1 or size % shards:
        raise BadInput(f"shards={shards} must divide the number of processes, {size}; start a multiple of {shards} of them with torchrun")
    if shards == 1:
        yield None
        return
    sets = [list(range(first, first + shards)) for first in range(0, size, shards)]
    groups = [dist.new_group(ranks) for ranks in sets]                                      # every process makes all of them
    others = [dist.new_group(list(range(at, size, shards))) for at in range(shards)]
    mesh = Shards(rank % shards, shards, groups[rank // shards], others[rank % shards])
    before = _held.set(mesh)
    try:
        yield mesh
    finally:
        _held.reset(before)
        for group in (mesh.group, mesh.others):
            dist.destroy_process_group(group)


def share() -> tuple[int, int]:
    """(this process's share of the rows, number of shares)."""
    rank, size = place()
    mesh = _held.get()
    return (rank // mesh.size, size // mesh.size) if mesh else (rank, size)


def _sharers() -> Any:
    """The processes over which rows are shared out; None means all."""
    mesh = _held.get()
    return mesh.others if mesh else None


def most(*values: int) -> list[int]:
    """The largest of each value over all processes."""
    if place()[1] == 1:
        return list(values)
    held = torch.tensor(values, dtype=torch.long, device=_device())
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return held.tolist()


class Stop:
    """A signal that asks for the end: `seen` by this process, `agreed` once all know of it."""

    seen = 0
    agreed = 0


@contextlib.contextmanager
def together(stop: Stop | None = None) -> Iterator[None]:
    """Run a block that fails on every process if it fails on one, and tell all of a signal that one has seen.

    The block must not reduce anything itself. An error in the input is raised where it was met; the other processes
    raise BadInput that names the process to look at.
    """
    rank, size = place()
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        if size == 1:
            raise
        failed = error
    who, signum = most(rank + 1 if failed else 0, stop.seen if stop else 0)
    if failed:
        raise failed
    if who:
        raise BadInput(f"process {who - 1} of {size} stopped with an error, so all stop; its own message says why")
    if stop:
        stop.agreed = signum


def same(what: str, value: int) -> None:
    """Raise on every process if `value` is not the same on all of them.

    Raises:
        RarefyError: it is not; says what differs.
    """
    high, low = most(value, -value)
    if high != -low:
        raise RarefyError(f"the processes differ in {what} ({-low} and {high}); start all of them alike, with one run folder that all share")


def mine(rows_B: Tensor) -> Tensor:
    """This process's share of a batch: consecutive rows.

    Raises:
        BadInput: the rows do not divide over the processes.
    """
    rank, size = share()
    if len(rows_B) % size:
        raise BadInput(f"a batch of {len(rows_B)} rows does not divide over {size} processes; use a multiple of {size} rows")
    return rows_B.chunk(size)[rank]


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Give every process the tensors of the first that has the same part of a method, in place."""
    if share()[1] > 1:
        mesh = _held.get()
        for tensor in tensors:
            dist.broadcast(tensor, mesh.rank if mesh else 0, group=_sharers())


def mean_(tensors: Iterable[Tensor]) -> None:
    """Average over the shares of the rows, in place."""
    size = share()[1]
    if size > 1:
        for tensor in tensors:
            dist.all_reduce(tensor, group=_sharers())
            tensor.div_(size)


def sum_(tensor: Tensor) -> Tensor:
    """Sum over the shares of the rows, in place."""
    if share()[1] > 1:
        dist.all_reduce(tensor, group=_sharers())
    return tensor


def least_(tensor: Tensor) -> Tensor:
    """The least over the shares of the rows, elementwise, in place."""
    if share()[1] > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=_sharers())
    return tensor


def mean_of(values: dict[str, float]) -> dict[str, float]:
    """Each named number averaged over processes.

    Raises:
        Unsupported: the processes name different numbers.
    """
    if place()[1] == 1:
        return values
    names = sorted(values)
    try:
        same("the parts of a loss", zlib.crc32("\n".join(names).encode()))
    except RarefyError:
        raise Unsupported(
            f"the processes logged different parts of a loss; here {', '.join(names)}: a method must name the same parts for every batch"
        ) from None
    held = torch.tensor([values[name] for name in names], dtype=torch.float64, device=_device())
    dist.all_reduce(held)
    held /= place()[1]
    return dict(zip(names, held.tolist(), strict=True))
