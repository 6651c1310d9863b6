"""Logs of JSON records, one a line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import BadInput, Damaged
from .fs import DISK, FS, writing
from .sealed import parse


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def to_lines(records: Iterable[dict[str, Any]]) -> bytes:
    """Records as a file's bytes. NaN and infinities have no JSON and become null."""
    try:
        return b"".join(json.dumps(_plain(r), allow_nan=False).encode() + b"\n" for r in records)
    except (TypeError, ValueError) as error:
        raise BadInput(f"a log record cannot be kept as JSON: {error}") from error


def append_line(path: str | Path, record: dict[str, Any], fs: FS = DISK) -> None:
    """Add one record. A torn line that a crash left at the end is dropped first.

    Raises:
        BadInput: the record is not JSON, or the disk refuses.
    """
    path, line = Path(path), to_lines([record])
    with writing(path):
        if fs.exists(path):
            whole = _whole_bytes(path)
            if whole != fs.size(path):
                fs.truncate(path, whole)
        fs.append(path, line)


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Every record. A last line without its newline was never finished and is dropped.

    Raises:
        Damaged: a line inside is not a JSON object; names the file and the line.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise BadInput(f"{path} does not exist") from error
    lines = data.split(b"\n")[:-1]
    return [parse(line, f"{path} line {i}") for i, line in enumerate(lines, 1)]


def check_lines(path: Path) -> int:
    """Number of records, or Damaged; reads a line at a time."""
    count = 0
    with open(path, "rb") as file:
        while line := file.readline(16 << 20):
            if not line.endswith(b"\n"):
                if file.read(1):
                    raise Damaged(f"{path} line {count + 1} is longer than {16 << 20} bytes")
                break
            count += 1
            parse(line, f"{path} line {count}")
    return count


def _whole_bytes(path: Path) -> int:
    """Bytes up to and including the last newline."""
    with open(path, "rb") as file:
        end = file.seek(0, 2)
        while end:
            start = max(0, end - 65536)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                return start + at + 1
            end = start
    return 0
