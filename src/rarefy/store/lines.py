"""Logs of JSON records, one a line, each sealed on its own, so that an altered byte is noticed and a line can be taken out."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from ..errors import BadInput, Damaged
from .fs import DISK, FS, open_regular, writing
from .sealed import parse

MOST_LINE = 16 << 20
"""Longest line read, in bytes."""
_SEAL = re.compile(rb', "seal": "([0-9a-f]{16})"\}')
_SEAL_BYTES = 29


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def to_lines(records: Iterable[dict[str, Any]]) -> bytes:
    """Records as a file's bytes. NaN and infinities have no JSON and become null."""
    return b"".join(_line(record) for record in records)


def _line(record: dict[str, Any]) -> bytes:
    if not record or "seal" in record:
        raise BadInput("a log record needs at least one entry, and none called 'seal'")
    try:
        body = json.dumps(_plain(record), allow_nan=False).encode()[:-1]
    except (TypeError, ValueError) as error:
        raise BadInput(f"a log record cannot be kept as JSON: {error}") from error
    return body + b', "seal": "' + xxhash.xxh3_64_hexdigest(body).encode() + b'"}\n'


def append_line(path: str | Path, record: dict[str, Any], fs: FS = DISK) -> None:
    """Add one record, durably. A torn line that a crash left at the end is dropped first.

    Raises:
        BadInput: the record is not JSON, or the disk refuses.
    """
    path, line = Path(path), to_lines([record])
    with writing(path):
        there = fs.exists(path)
        if there:
            whole = _whole_bytes(path)
            if whole != fs.size(path):
                fs.truncate(path, whole)
        fs.append(path, line)
        fs.sync(path)
        if not there:
            fs.sync_dir(path.parent)


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Every finished record; a line that a crash left torn at the end does not count.

    Raises:
        BadInput: there is no such file.
        Damaged: a line is altered, too long, or no sealed JSON object; names the file and the line.
    """
    path = Path(path)
    if not DISK.exists(path):
        raise BadInput(f"{path} does not exist")
    return list(_records(path))


def check_lines(path: Path) -> int:
    """Number of records, or Damaged; holds one line at a time."""
    return sum(1 for _ in _records(path))


def _records(path: Path) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        fd = open_regular(path)
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror or error}") from error
    with os.fdopen(fd, "rb") as file:
        while line := file.readline(MOST_LINE):
            number += 1
            where = f"{path} line {number}"
            if line.endswith(b"\n"):
                yield _unseal_line(line[:-1], where)
            elif len(line) == MOST_LINE:
                raise Damaged(f"{where} is longer than {MOST_LINE} bytes")
            elif (sealed := _SEAL.search(line)) and sealed.end() < len(line):
                raise Damaged(f"{where} is altered: another byte stands where it ends")  # no torn write leaves that


def _unseal_line(line: bytes, where: str) -> dict[str, Any]:
    seal, body = _SEAL.fullmatch(line[-_SEAL_BYTES:]), line[:-_SEAL_BYTES]
    if seal is None:
        raise Damaged(f"{where} has no seal at its end: altered, or not written by rarefy; take the line out")
    if xxhash.xxh3_64_hexdigest(body).encode() != seal[1]:
        raise Damaged(f"{where} is altered: its checksum does not match; take the line out")
    return parse(body + b"}", where)


def _whole_bytes(path: Path) -> int:
    """Bytes up to and including the last newline."""
    with os.fdopen(open_regular(path), "rb") as file:
        end = file.seek(0, 2)
        while end:
            start = max(0, end - 65536)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                return start + at + 1
            end = start
    return 0
