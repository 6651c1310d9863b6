"""The processes that train together (torch.distributed, where it was initialised); one process is a world of its own.

Whatever stops, saves or fails is decided on what every process knows: a process that left alone would leave the others
waiting for it in a reduction.

Shape letters: B = rows of a batch.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterable, Iterator

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


def _device() -> torch.device:
    """Where numbers that are no part of a model can be reduced."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


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
    rank, size = place()
    if len(rows_B) % size:
        raise BadInput(f"a batch of {len(rows_B)} rows does not divide over {size} processes; use a multiple of {size} rows")
    return rows_B.chunk(size)[rank]


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's tensors, in place."""
    if place()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def mean_(tensors: Iterable[Tensor]) -> None:
    """Average over processes, in place."""
    size = place()[1]
    if size > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor.div_(size)


def sum_(tensor: Tensor) -> Tensor:
    """Sum over processes, in place."""
    if place()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def least_(tensor: Tensor) -> Tensor:
    """The least over processes, elementwise, in place."""
    if place()[1] > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
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
    mean_([held])
    return dict(zip(names, held.tolist(), strict=True))
