"""One writer a folder."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from ..errors import BadInput
from .fs import make_dirs, writing

if os.name == "nt":
    import msvcrt
else:
    import fcntl

LOCK_NAME = ".lock"


class RunLock:
    """Held by the one process that may write a folder; the kernel drops it when that process dies, however it dies.

    Raises:
        BadInput: on entry, when another process (or another RunLock of this one) holds it; names its process id.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._fd = -1

    def __enter__(self) -> Self:
        path = self.folder / LOCK_NAME
        with writing(self.folder):
            make_dirs(self.folder)
            fd = os.open(
                path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0), 0o666
            )
        try:
            _take(fd)
        except OSError:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() if os.name != "nt" else ""
            os.close(fd)
            who = f"process {holder}" if holder.isdigit() else "another process"
            raise BadInput(
                f"{self.folder} is being written by {who}; wait for it, end it, or use another folder"
            ) from None
        self._fd = fd
        with writing(self.folder):
            os.ftruncate(fd, 0)
            os.write(fd, f"{os.getpid()}\n".encode())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _take(fd: int) -> None:
    if os.name == "nt":
        os.lseek(fd, 1 << 20, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        os.lseek(fd, 0, os.SEEK_SET)
    else:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
