"""`check`: verify every file of a run, a store, or a folder of them, and change none."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import BadInput, RarefyError
from . import checkpoint, methods, run
from .fs import DISK
from .layout import STORE, foreign_names
from .lines import check_lines
from .tensors import read_header


@dataclass
class CheckReport:
    """What was verified and what is wrong with it."""

    problems: list[str] = field(default_factory=list)
    """One line each; names the file."""
    checked: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def check(path: str | Path) -> CheckReport:
    """Verify everything rarefy wrote at or below `path`; links are not followed.

    Raises:
        BadInput: nothing is there, or nothing that rarefy wrote.
    """
    path = Path(path)
    if not path.exists():
        raise BadInput(f"{path} does not exist; give a run folder or an activation store")
    report = CheckReport()
    if path.is_dir():
        _folder(path, report)
    elif path.suffix == ".jsonl":
        _lines(path, report)
    if not report.checked and not report.problems:
        raise BadInput(f"{path} holds nothing that rarefy wrote; give a run folder or an activation store")
    return report


def _folder(path: Path, report: CheckReport) -> None:
    names = set(DISK.names(path))
    shards = any(n.startswith("shard-") and n.endswith((".data", ".index")) for n in names)
    if STORE in names or shards or path.name.startswith("acts-"):
        _store(path, report)
        return
    if methods.CARD in names or (methods.TENSORS in names and checkpoint.MANIFEST not in names and not _is_step(path)):
        _method(path, report)
        return
    if checkpoint.MANIFEST in names or _is_step(path):
        _checkpoint(path, report)
        return
    if run.MANIFEST in names:
        _run(path, report)
    for name in sorted(names):
        one = path / name
        if one.is_symlink() or name.startswith(".tmp-") or name.startswith(".gone-"):
            continue
        if one.is_dir():
            _folder(one, report)
        elif name.endswith(".jsonl"):
            _lines(one, report)


def _is_step(path: Path) -> bool:
    return bool(checkpoint.NAME.fullmatch(path.name))


def _store(path: Path, report: CheckReport) -> None:
    from .shards import ActivationStore

    report.problems += [f"{path / name} does not belong in a store" for name in foreign_names(path)]
    try:
        with ActivationStore(path, cache_bytes=0) as store:
            report.checked.append(f"{path / STORE}: {len(store)} rows, {'closed' if store.closed else 'unfinished'}")
            for file, problem in store.verify():
                (report.problems.append(problem) if problem else report.checked.append(str(file)))
    except (RarefyError, OSError) as error:
        report.problems.append(str(error))


def _checkpoint(path: Path, report: CheckReport) -> None:
    try:
        _, _, data = checkpoint.read_checkpoint(path)
        read_header(data, len(data), path / checkpoint.TENSORS)
        report.problems += [
            f"{path / name} does not belong in a checkpoint"
            for name in DISK.names(path)
            if name not in (checkpoint.MANIFEST, checkpoint.TENSORS)
        ]
        report.checked.append(str(path))
    except RarefyError as error:
        report.problems.append(str(error))


def _method(path: Path, report: CheckReport) -> None:
    try:
        methods.read_method(path)
        report.checked.append(str(path))
    except RarefyError as error:
        report.problems.append(str(error))


def _run(path: Path, report: CheckReport) -> None:
    try:
        run.read_run(path)
        report.checked.append(str(path / run.MANIFEST))
    except RarefyError as error:
        report.problems.append(str(error))


def _lines(path: Path, report: CheckReport) -> None:
    try:
        report.checked.append(f"{path}: {check_lines(path)} records")
    except (RarefyError, OSError) as error:
        report.problems.append(str(error))
