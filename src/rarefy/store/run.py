"""A run folder: one writer at a time, and a manifest that says what is being made, of what and with which versions."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Collection
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..errors import BadInput
from .atomic import write_atomic
from .checkpoint import diff_meta
from .fs import DISK, make_dirs, writing
from .lock import LOCK_NAME, RunLock
from .sealed import canonical, read_sealed, seal

FORMAT, MANIFEST = "rarefy-run", "run.json"
_PACKAGES = ("torch", "transformers", "numpy", "numba", "safetensors")


class Run:
    """Context manager that holds a run folder. A folder that holds this very run is taken up; any other is refused.

    Args:
        folder: made if missing; may be empty.
        made: plain JSON: the command, its settings, hashes of model and data, seeds. No secrets belong there.
        may_change: dotted keys of `made`, such as "request.steps", in which a run taken up may differ.

    Raises:
        BadInput: on entry, when another process holds the folder, when it holds something else, or when its run was begun
            with other settings; shows the difference.
        Damaged: its manifest is.
    """

    def __init__(self, folder: str | Path, made: dict[str, Any], may_change: Collection[str] = ()) -> None:
        self.folder, self.may_change = Path(folder), tuple(may_change)
        self.made: dict[str, Any] = json.loads(canonical(made))
        self.resumed = False
        """Whether the folder held this run already."""
        self._lock = RunLock(self.folder)

    def __enter__(self) -> Self:
        refuse_foreign(self.folder)  # before a lock file is put into somebody else's folder
        with writing(self.folder):
            make_dirs(self.folder)
        self._lock.__enter__()
        try:
            refuse_foreign(self.folder)
            self._begin()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.__exit__(kind, error, trace)

    def _begin(self) -> None:
        path = self.folder / MANIFEST
        if DISK.exists(path):
            old = read_run(self.folder)["made"]
            lines = refuse_changes(self.folder, old, self.made, self.may_change)
            self.resumed = True
            if not lines:
                return
        document = {
            "format": FORMAT,
            "version": 1,
            "made": self.made,
            "versions": versions(),
            "hardware": hardware(),
        }
        write_atomic(path, seal(document))


def refuse_foreign(folder: Path) -> None:
    """Raise BadInput for a file, or for a folder that holds something other than a run. Changes nothing."""
    if DISK.exists(folder) and not folder.is_dir():
        raise BadInput(f"{folder} is a file; a run needs a folder of its own")
    names = DISK.names(folder)
    foreign = [n for n in names if n != LOCK_NAME and not n.startswith(".tmp-")]
    if foreign and MANIFEST not in names:
        raise BadInput(f"{folder} holds {foreign[0]!r} and is not a run of rarefy; use a new or empty folder")


def refuse_changes(folder: Path, old: dict[str, Any], new: dict[str, Any], may_change: Collection[str] = ()) -> list[str]:
    """What differs between two of `made`, a line each; BadInput, with the lines, unless `may_change` allows all of it."""

    def allowed(line: str) -> bool:
        key = line.split(":")[0]
        return any(key == one or key.startswith((f"{one}.", f"{one}[")) for one in may_change)

    lines = diff_meta(old, new)
    if barred := [line for line in lines if not allowed(line)]:
        raise BadInput(f"{folder} was begun with other settings: {'; '.join(barred)}; use another folder, or the same settings")
    return lines


def read_run(folder: str | Path) -> dict[str, Any]:
    """A run's manifest: made, versions, hardware. BadInput if there is none; Damaged if it is altered."""
    path = Path(folder) / MANIFEST
    if not DISK.exists(path):
        raise BadInput(f"{folder} is not a run: it has no {MANIFEST}")
    document = read_sealed(path, FORMAT)
    return {
        key: document.get(key) if isinstance(document.get(key), dict) else {}
        for key in ("made", "versions", "hardware")
    }


def versions() -> dict[str, str]:
    """Versions of what results depend on, read without importing it."""
    from .. import __version__

    out = {"rarefy": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


def hardware() -> dict[str, Any]:
    """What the run computes on; nothing that names the machine or its user."""
    out: dict[str, Any] = {
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "processor": _cpu(),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        out["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            out["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return out


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        return platform.processor()
