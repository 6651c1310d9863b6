"""A command's output folder: refused before any work, taken up, or left as it was found."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from .. import world
from ..errors import BadInput, RarefyError
from ..store.fs import DISK
from ..store.lock import LOCK_NAME, RunLock
from ..store.run import MANIFEST, Run, read_run, refuse_changes, refuse_foreign


def refuse_early(out: Path, command: str, request: dict[str, Any], may_change: Collection[str] = ()) -> None:
    """Raise BadInput where `out` can neither become nor go on as this run; what a model must be opened for is left to Run.

    A file, somebody else's folder, a run of another command or with other settings, one that another process is writing.
    """
    refuse_foreign(out)
    refuse_unwritable(out)
    if DISK.exists(out / MANIFEST):
        old = read_run(out)["made"]
        refuse_changes(out, {key: old.get(key) for key in ("command", "request")}, {"command": command, "request": request}, may_change)
    refuse_held(out)


def refuse_unwritable(out: Path) -> None:
    """Raise BadInput where no folder could be made or written at `out`."""
    there = next(folder for folder in (out, *out.absolute().parents) if DISK.exists(folder))
    if not there.is_dir():
        raise BadInput(f"cannot write {out}: {there} is a file; choose another --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise BadInput(f"cannot write {out}: no permission to write in {there}; choose another --out")


def refuse_held(out: Path) -> None:
    """Raise BadInput where another process is writing `out`."""
    if DISK.exists(out / LOCK_NAME):
        with RunLock(out):
            pass


@contextlib.contextmanager
def run_folder(out: Path, made: dict[str, Any], may_change: Collection[str] = ()) -> Iterator[Run]:
    """A Run that goes away again when it ends by an error before anything but its manifest was written."""
    fresh = not DISK.exists(out)
    run = Run(out, made, may_change)
    with parents_of(out):
        try:
            with run:
                yield run
        except BaseException:
            with contextlib.suppress(RarefyError, OSError):
                if not run.resumed and not _results(out) and (fresh or DISK.exists(out / MANIFEST)):
                    with RunLock(out):                      # not if another process has begun there meanwhile
                        _empty(out)
                    if fresh:
                        out.rmdir()
            raise


@contextlib.contextmanager
def joint_folder(out: Path, made: dict[str, Any]) -> Iterator[bool]:
    """`run_folder` for processes that train together: the first holds it, and what is refused to it ends all. Yields whether it was taken up."""
    with contextlib.ExitStack() as held:
        resumed = False
        with world.together():
            if world.first():
                resumed = held.enter_context(run_folder(out, made)).resumed
        yield bool(world.most(int(resumed))[0])


@contextlib.contextmanager
def parents_of(out: Path) -> Iterator[None]:
    """Takes away again, after an error, the empty folders above `out` that were made for it."""
    missing = [folder for folder in out.parents if not DISK.exists(folder)]
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in missing:
                folder.rmdir()
        raise


def _beginning(name: str) -> bool:
    return name in (MANIFEST, LOCK_NAME) or name.startswith(".tmp-")


def _results(out: Path) -> list[Path]:
    return [p for p in out.rglob("*") if not p.is_dir() and not _beginning(p.name)]


def _empty(out: Path) -> None:
    for path in sorted(out.rglob("*"), reverse=True):
        with contextlib.suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()
