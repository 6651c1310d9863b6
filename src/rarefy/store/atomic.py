"""A file that is either the old one or the new one, whatever happens in between."""

from __future__ import annotations

import os
from pathlib import Path

from .fs import DISK, FS, writing


def write_atomic(path: str | Path, data: bytes, fs: FS = DISK) -> None:
    """Make `path` hold `data`, durably, in one step.

    Raises:
        BadInput: the disk is full, read-only or refuses; the old file is unchanged then.
    """
    path = Path(path)
    part = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    with writing(path):
        try:
            fs.write(part, data)
            fs.sync(part)
            fs.rename(part, path)
            fs.sync_dir(path.parent)
        except BaseException:  # Ctrl-C too leaves nothing behind
            if fs.exists(part):
                fs.remove(part)
            raise
