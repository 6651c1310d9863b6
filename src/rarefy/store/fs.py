"""The few file operations the store is made of, in one object, so that a test can fail or cut any of them."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from ..errors import BadInput, Damaged


class FS:
    """The real disk. Paths are Path objects; nothing is atomic or durable by itself but `rename` and the syncs."""

    def write(self, path: Path, data: bytes) -> None:
        """Make the file hold exactly `data`."""
        with open(path, "wb", buffering=0) as file:
            _write_all(file.fileno(), data)

    def append(self, path: Path, data: bytes | memoryview) -> None:
        """Add to the end of the file, made if missing."""
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            _write_all(fd, data)
        finally:
            os.close(fd)

    def truncate(self, path: Path, size: int) -> None:
        """Cut the file to `size` bytes."""
        os.truncate(path, size)

    def sync(self, path: Path) -> None:
        """Force a file's bytes to the disk."""
        _fsync(path)

    def sync_dir(self, path: Path) -> None:
        """Force a directory's entries to the disk."""
        _fsync(path)

    def mkdir(self, path: Path) -> None:
        """Make one directory; its parent exists and it does not."""
        os.mkdir(path)

    def rename(self, old: Path, new: Path) -> None:
        """Atomically give a file or directory another name; an existing file of that name is replaced."""
        os.replace(old, new)

    def remove(self, path: Path) -> None:
        """Delete a file."""
        os.unlink(path)

    def rmtree(self, path: Path) -> None:
        """Delete a directory and all below it."""
        shutil.rmtree(path)

    def names(self, path: Path) -> list[str]:
        """Names in a directory, sorted; none where there is no directory."""
        return sorted(os.listdir(path)) if path.is_dir() else []

    def exists(self, path: Path) -> bool:
        """Whether the name is taken (also by a dangling link)."""
        return os.path.lexists(path)

    def size(self, path: Path) -> int:
        """Bytes of a regular file; OSError for anything else."""
        return _regular(path.stat(), path).st_size

    def read(self, path: Path) -> bytes:
        """All bytes of a regular file; OSError for anything else."""
        with os.fdopen(open_regular(path), "rb") as file:
            return file.read(os.fstat(file.fileno()).st_size)


DISK = FS()


def open_regular(path: Path, *, follow: bool = True) -> int:
    """A descriptor to read a regular file by. A pipe, on which opening would wait, or a device, which has no end, is refused.

    `follow`: whether the name may be a link; links elsewhere than in a store's shards are how the Hub's cache holds files.
    """
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    fd = os.open(path, flags if follow else flags | getattr(os, "O_NOFOLLOW", 0))
    try:
        _regular(os.fstat(fd), path)
    except OSError:
        os.close(fd)
        raise
    return fd


def _regular(found: os.stat_result, path: Path) -> os.stat_result:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return found


def _write_all(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view) :]


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows has no handle to sync a directory by
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_dirs(path: Path, fs: FS = DISK) -> None:
    """Make a directory and its missing parents, each durable before the next is used."""
    if fs.exists(path):
        return
    make_dirs(path.parent, fs)
    with contextlib.suppress(FileExistsError):
        fs.mkdir(path)
    fs.sync_dir(path.parent)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the disk's refusal to write into one line that names the place and what to try."""
    try:
        yield
    except OSError as error:
        hint = "free some space" if error.errno == errno.ENOSPC else "choose a folder that can be written"
        raise BadInput(
            f"cannot write {path}: {error.strerror or error}; {hint}. What was there before is unchanged"
        ) from error


def size_of(path: Path, fs: FS = DISK) -> int:
    """Bytes of a file, or Damaged."""
    try:
        return fs.size(path)
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror or error}") from error


def read_bounded(path: Path, most: int, fs: FS = DISK) -> bytes:
    """A file's bytes, or Damaged if it is missing, unreadable or larger than `most`."""
    try:
        size = fs.size(path)
        if size > most:
            raise Damaged(f"{path} has {size} bytes; at most {most} belong there")
        return fs.read(path)
    except FileNotFoundError as error:
        raise Damaged(f"{path} is missing") from error
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise Damaged(f"{path} claims {size} bytes, more than fit into this machine's memory") from error
