"""`check`: verify every file of a run, a store, or a folder of them, and change none."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import BadInput, RarefyError, printable
from . import checkpoint, methods, run
from .fs import DISK, read_bounded
from .layout import STORE, foreign_names
from .lines import check_lines
from .sealed import MOST_REPORT, check_page, unseal
from .tensors import read_header

PAGE, LOGS = "report.html", ("log.jsonl", "points.jsonl")
SEALED = ("report.json", "errors.json", "joined.json")
_UNFINISHED = (".tmp-", ".gone-")


@dataclass
class CheckReport:
    """What was verified and what is wrong with it, one printable line each."""

    problems: list[str] = field(default_factory=list)
    """Names the file."""
    checked: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def sound(self, what: str | Path) -> None:
        """Note a file that was verified."""
        self.checked.append(printable(str(what)))

    def wrong(self, problem: str | Exception) -> None:
        """Note what is wrong with a file."""
        self.problems.append(printable(str(problem)))


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
        _tree(path, report)
    else:
        _file(path, report)
    if not report.checked and not report.problems:
        raise BadInput(f"{path} holds nothing that rarefy wrote; give a run folder or an activation store")
    return report


def _tree(top: Path, report: CheckReport) -> None:
    """Every folder from `top` down, however deep."""
    waiting = [top]
    while waiting:
        path = waiting.pop()
        try:
            waiting += reversed(_folder(path, report))
        except (RarefyError, OSError) as error:
            report.wrong(error if str(path) in str(error) else f"{path}: {error}")


def _folder(path: Path, report: CheckReport) -> list[Path]:
    """Verify one folder; what is below it and still to be looked at."""
    names = set(DISK.names(path))
    shards = any(n.startswith("shard-") and n.endswith((".data", ".index")) for n in names)
    if STORE in names or shards or path.name.startswith("acts-"):
        _store(path, report)
        return []
    if methods.CARD in names or (methods.TENSORS in names and checkpoint.MANIFEST not in names and not _is_step(path)):
        methods.read_method(path)
        report.sound(path)
        return []
    if checkpoint.MANIFEST in names or _is_step(path):
        _checkpoint(path, report)
        return []
    below = []
    for name in sorted(names):
        one = path / name
        if one.is_symlink() or name.startswith(_UNFINISHED):
            continue
        below += [one] if one.is_dir() else []
        if one.suffix != ".jsonl" or run.MANIFEST in names or name in LOGS:  # others are somebody's data
            _file(one, report)
    return below


def _is_step(path: Path) -> bool:
    return bool(checkpoint.NAME.fullmatch(path.name))


def _file(path: Path, report: CheckReport) -> None:
    """Verify one file of a run, if it is one; a damaged one does not hide the next."""
    try:
        if path.suffix == ".jsonl":
            report.sound(f"{path}: {check_lines(path)} records")
            return
        if path.name == run.MANIFEST:
            run.read_run(path.parent)
        elif path.name in SEALED:
            unseal(read_bounded(path, MOST_REPORT), path)
        elif path.name == PAGE:
            check_page(path)
        else:
            return
        report.sound(path)
    except (RarefyError, OSError) as error:
        report.wrong(error)


def _store(path: Path, report: CheckReport) -> None:
    from .shards import ActivationStore

    for name in foreign_names(path):
        report.wrong(f"{path / name} does not belong in a store")
    with ActivationStore(path, cache_bytes=0) as store:
        report.sound(f"{path / STORE}: {len(store)} rows, {'closed' if store.closed else 'unfinished'}")
        for file, problem in store.verify():
            report.wrong(problem) if problem else report.sound(file)


def _checkpoint(path: Path, report: CheckReport) -> None:
    _, _, data = checkpoint.read_checkpoint(path)
    read_header(data, len(data), path / checkpoint.TENSORS)
    report.sound(path)
    for name in DISK.names(path):
        if name not in (checkpoint.MANIFEST, checkpoint.TENSORS):
            report.wrong(f"{path / name} does not belong in a checkpoint")
