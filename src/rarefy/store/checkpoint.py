"""Checkpoints: each is a new directory that counts once it is renamed into place; nothing is overwritten."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from ..errors import BadInput, Damaged
from .fs import DISK, FS, make_dirs, read_bounded, writing
from .sealed import read_sealed, seal
from .tensors import from_bytes, to_bytes

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "rarefy-checkpoint"
TENSORS, MANIFEST = "tensors.safetensors", "manifest.json"
NAME = re.compile(r"step-(\d{12})(?:-(\d{4}))?")
_LEFT = (".tmp-", ".gone-")


@dataclass(frozen=True)
class Checkpoint:
    """What was saved at a step."""

    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    skipped: list[str] = field(default_factory=list)
    """Newer checkpoints that are damaged and were passed over, each with the reason."""


def save_checkpoint(
    root: str | Path,
    step: int,
    tensors: Mapping[str, Tensor],
    meta: dict[str, Any],
    keep: int = 2,
    *,
    fs: FS = DISK,
) -> None:
    """Keep tensors and meta as the checkpoint of `step`, durably; once this returns it survives a power cut.

    Args:
        root: folder of the checkpoints, made if missing; one process writes it at a time (see RunLock).
        meta: plain JSON.
        keep: how many checkpoints stay; older ones are deleted after the new one is safe.

    Raises:
        BadInput: arguments out of range, or the disk refuses; earlier checkpoints are untouched then.
    """
    root = Path(root)
    if not isinstance(step, int) or not 0 <= step < 10**12 or keep < 1:
        raise BadInput(f"step={step!r} must be in 0..10^12 and keep={keep!r} at least 1")
    data = to_bytes(tensors)
    manifest = seal(
        {
            "format": FORMAT,
            "version": 1,
            "step": step,
            "meta": meta,
            "files": {TENSORS: {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}},
        }
    )
    with writing(root):
        make_dirs(root, fs)
        _clean(root, fs)
        final = _free_name(root, step, fs)
        part = root / f".tmp-{final.name}"
        try:
            fs.mkdir(part)
            fs.write(part / TENSORS, data)
            fs.sync(part / TENSORS)
            fs.write(part / MANIFEST, manifest)
            fs.sync(part / MANIFEST)
            fs.sync_dir(part)
            fs.rename(part, final)
            fs.sync_dir(root)
        except BaseException:  # Ctrl-C too leaves nothing behind
            if fs.exists(part):
                fs.rmtree(part)
            raise
        _prune(root, keep, fs)


def load_checkpoint(root: str | Path, *, fs: FS = DISK) -> Checkpoint | None:
    """The newest checkpoint that is whole; None where none was ever finished.

    Raises:
        Damaged: there are checkpoints, and every one is damaged; says why, one by one.
    """
    skipped: list[str] = []
    for folder in reversed(checkpoints(Path(root), fs)):
        try:
            step, meta, data = read_checkpoint(folder, fs)
            return Checkpoint(step, from_bytes(data, folder / TENSORS), meta, skipped)
        except Damaged as error:
            skipped.append(str(error))
    if skipped:
        raise Damaged(f"no readable checkpoint in {root}: {'; '.join(skipped)}")
    return None


def checkpoints(root: Path, fs: FS = DISK) -> list[Path]:
    """Folders of checkpoints, oldest first; whole or not."""
    found = [(int(m[1]), int(m[2] or 0), root / name) for name in fs.names(root) if (m := NAME.fullmatch(name))]
    return [path for _, _, path in sorted(found)]


def read_checkpoint(folder: Path, fs: FS = DISK) -> tuple[int, dict[str, Any], bytes]:
    """Step, meta and the verified bytes of the tensors' file; Damaged otherwise."""
    document = _manifest(folder, fs)
    listed = document["files"][TENSORS]
    data = read_bounded(folder / TENSORS, listed["bytes"], fs)
    if len(data) != listed["bytes"]:
        raise Damaged(f"{folder / TENSORS} has {len(data)} bytes; {listed['bytes']} were written: truncated")
    if xxhash.xxh3_128_hexdigest(data) != listed["xxh3_128"]:
        raise Damaged(f"{folder / TENSORS} is altered: its checksum does not match")
    return document["step"], document["meta"], data


def diff_meta(old: Any, new: Any, at: str = "") -> list[str]:
    """What differs between two JSON values, one line each: "recipe.lr: was 0.1, now 0.2"."""
    if isinstance(old, dict) and isinstance(new, dict):
        out: list[str] = []
        for key in sorted({*old, *new}, key=str):
            name = f"{at}.{key}" if at else str(key)
            if key not in new:
                out.append(f"{name}: was {_short(old[key])}, now absent")
            elif key not in old:
                out.append(f"{name}: was absent, now {_short(new[key])}")
            else:
                out.extend(diff_meta(old[key], new[key], name))
        return out
    old, new = (list(v) if isinstance(v, tuple) else v for v in (old, new))
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, (a, b) in enumerate(zip(old, new, strict=True)) for line in diff_meta(a, b, f"{at}[{i}]")]
    # 1 == True and 1 == 1.0 in Python; a setting that changed its kind has changed unless both are numbers
    same = old == new and isinstance(old, bool) == isinstance(new, bool)
    return [] if same else [f"{at or 'value'}: was {_short(old)}, now {_short(new)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _manifest(folder: Path, fs: FS) -> dict[str, Any]:
    document = read_sealed(folder / MANIFEST, FORMAT, fs=fs)
    name, files = NAME.fullmatch(folder.name), document.get("files")
    listed = files.get(TENSORS) if isinstance(files, dict) and len(files) == 1 else None
    if (
        not isinstance(listed, dict)
        or type(listed.get("bytes")) is not int
        or not isinstance(document.get("meta"), dict)
    ):
        raise Damaged(f"{folder / MANIFEST} does not describe a checkpoint")
    if name is None or document.get("step") != int(name[1]):
        raise Damaged(f"{folder} holds the checkpoint of step {document.get('step')}: swapped or renamed")
    return document


def _free_name(root: Path, step: int, fs: FS) -> Path:
    # a damaged checkpoint of the same step may stand there; it is never touched before the new one is safe
    taken = set(fs.names(root))
    names = [f"step-{step:012d}", *(f"step-{step:012d}-{i:04d}" for i in range(1, 10000))]
    last = max((i for i, name in enumerate(names) if name in taken), default=-1)
    if last + 1 == len(names):
        raise BadInput(f"{root} holds {len(names)} checkpoints of step {step}; use another folder")
    return root / names[last + 1]


def _prune(root: Path, keep: int, fs: FS) -> None:
    whole = 0
    for folder in reversed(checkpoints(root, fs)):
        if whole >= keep:
            gone = root / f".gone-{folder.name}"
            fs.rename(folder, gone)  # so that a half-deleted checkpoint never carries a checkpoint's name
            fs.rmtree(gone)
            continue
        try:
            whole += fs.size(folder / TENSORS) == _manifest(folder, fs)["files"][TENSORS]["bytes"]
        except (Damaged, OSError):
            continue


def _clean(root: Path, fs: FS) -> None:
    for name in fs.names(root):
        if name.startswith(_LEFT):
            fs.rmtree(root / name)
