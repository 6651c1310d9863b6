"""Reports on disk: plain numbers in, report.json out, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BadInput, Damaged
from ..store.atomic import write_atomic
from ..store.fs import read_bounded
from ..store.sealed import MOST_REPORT, SEAL_BYTES, seal_body, unseal
from .schema import Report, validate

NAME = "report.json"


def tidy(value: Any) -> Any:
    """The same value in JSON's terms: NaN and infinity become None, tuples lists, arrays and tensors lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    if isinstance(value, Mapping):
        return {str(k): tidy(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [tidy(v) for v in value]
    if hasattr(value, "tolist"):
        return tidy(value.tolist())
    if isinstance(value, Path):
        return str(value)
    raise BadInput(f"a report holds strings, numbers, lists and objects, not {type(value).__name__}")


def dumps(report: Mapping[str, Any]) -> str:
    """Checked, compact JSON in ASCII: lone surrogates and separators stay escaped. Raises BadInput as `validate`."""
    return json.dumps(validate(report), ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def write_report(folder: Path, report: Mapping[str, Any]) -> Path:
    """Write `folder`/report.json sealed, whole or not at all; returns its path. Raises BadInput as `validate`."""
    path = Path(folder) / NAME
    plain = {key: value for key, value in tidy(report).items() if key != "seal"}  # that of a report read as a plain file
    data = seal_body(dumps(plain).encode("ascii")[:-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)
    return path


def read_report(folder: Path) -> Report:
    """The report of a run folder. Raises BadInput where there is none, Damaged where it cannot be read."""
    return _read(Path(folder))[0]


def report_json(folder: Path) -> bytes:
    """The same as JSON, checked and as it was written: a large report is not spelt anew for each reader."""
    return _read(Path(folder))[1][:-SEAL_BYTES] + b"}"


def _read(folder: Path) -> tuple[Report, bytes]:
    path = folder / NAME
    if not path.is_file():
        raise BadInput(f"{folder}: no {NAME}; name a run folder made by `rarefy demo`, `fit`, `judge` or `sweep`")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BadInput(f"{path}: leads out of the run folder; copy the file instead of linking it")
    data = read_bounded(path, MOST_REPORT)
    try:
        return validate(unseal(data, path)), data
    except BadInput as error:
        raise Damaged(f"{path}: {error}") from None
