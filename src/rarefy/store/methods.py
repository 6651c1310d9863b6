"""One fitted method as a folder: method.json says what it is, tensors.safetensors holds its tensors."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..catalogue import entry
from ..errors import BadInput, Damaged, RarefyError
from .fs import DISK, FS, make_dirs, read_bounded, writing
from .sealed import read_sealed, seal
from .tensors import Held, dtype_name, from_bytes, read_header, to_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from ..method import Sparse

FORMAT = "rarefy-method"
CARD, TENSORS = "method.json", "tensors.safetensors"
_MOST = 1 << 40
_SHA = re.compile(r"[0-9a-f]{64}")


def save(method: Sparse, folder: str | Path, *, fs: FS = DISK) -> None:
    """Keep a method, durably and in one step; a method already there is replaced.

    Raises:
        BadInput: the method has no name, an argument or a state that is no plain value or tensor, the folder holds
            something else, or the disk refuses.
    """
    folder = Path(os.path.abspath(folder))
    if not method.name:
        raise BadInput(f"{type(method).__name__} has no catalogue name; set its class attribute `name`")
    tensors = method.state_dict()
    data = to_bytes(tensors)
    card = seal(
        {
            "format": FORMAT,
            "version": 1,
            "name": method.name,
            "arguments": _plain_arguments(method),
            "tensors": {k: {"shape": list(v.shape), "dtype": dtype_name(v.dtype)} for k, v in tensors.items()},
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    )
    if fs.exists(folder) and (not folder.is_dir() or set(fs.names(folder)) - {CARD, TENSORS}):
        raise BadInput(f"{folder} exists and is not a saved method; choose another folder")
    part, old = folder.with_name(f".tmp-{folder.name}"), _aside(folder)
    with writing(folder):
        make_dirs(folder.parent, fs)
        for left in (part, old):
            if fs.exists(left) and (left == part or fs.exists(folder)):
                fs.rmtree(left)
        try:
            fs.mkdir(part)
            for name, content in ((TENSORS, data), (CARD, card)):
                fs.write(part / name, content)
                fs.sync(part / name)
            fs.sync_dir(part)
        except BaseException:  # Ctrl-C too leaves nothing behind
            if fs.exists(part):
                fs.rmtree(part)
            raise
        if fs.exists(folder):
            fs.rename(folder, old)
        fs.rename(part, folder)
        fs.sync_dir(folder.parent)
        if fs.exists(old):
            fs.rmtree(old)


def load(folder: str | Path, method_class: type[Sparse] | None = None) -> Sparse:
    """The method saved in a folder, with the same bits and dtypes, in eval mode.

    Args:
        method_class: class to build, for methods that are not in the catalogue; its name must be the saved one.

    Raises:
        BadInput: no method there, or an unknown method name.
        Damaged: a file is altered, or does not fit the method it names: missing, extra or differently shaped tensors.
    """
    folder = Path(folder)
    if not DISK.exists(folder) and DISK.exists(_aside(folder)):
        folder = _aside(folder)  # a save was cut off between its two renames
    if not DISK.exists(folder):
        raise BadInput(f"{folder} does not exist; make a method with `rarefy fit` or rarefy.save")
    card, data = read_method(folder)
    name = card["name"]
    if method_class is None:
        method_class = entry(name).load()
    elif method_class.name != name:
        raise BadInput(f"{folder} holds a {name!r}, not a {method_class.name!r}")
    tensors = from_bytes(data, folder / TENSORS)
    arguments = card["arguments"]
    with contextlib.suppress(NotImplementedError, RuntimeError, TypeError):
        # shapes are compared before memory is taken, so that a hostile width costs nothing
        shape = _build(method_class, arguments, folder, meta=True)
        shape.take_sizes(tensors)
        _compare(shape.state_dict(), tensors, name, folder)
    method = _build(method_class, arguments, folder)
    method.take_sizes(tensors)
    _compare(method.state_dict(), tensors, name, folder)
    method.load_state_dict(tensors, strict=True, assign=True)
    return method.eval()


def read_method(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The card and the verified bytes of the tensors; builds nothing. Damaged otherwise."""
    path = folder / CARD
    card = read_sealed(path, FORMAT)
    sound = (
        isinstance(card.get("name"), str)
        and isinstance(card.get("arguments"), dict)
        and isinstance(card.get("tensors"), dict)
        and type(card.get("bytes")) is int
        and isinstance(card.get("sha256"), str)
        and _SHA.fullmatch(card["sha256"])
    )
    if not sound:
        raise Damaged(f"{path} does not describe a method: it needs name, arguments, tensors, bytes and sha256")
    data = read_bounded(folder / TENSORS, min(card["bytes"], _MOST))
    if len(data) != card["bytes"] or hashlib.sha256(data).hexdigest() != card["sha256"]:
        raise Damaged(
            f"{folder / TENSORS} is altered, truncated or of another method: its SHA-256 does not match {CARD}"
        )
    held, _ = read_header(data, len(data), folder / TENSORS)
    listed = card["tensors"]
    wrong = sorted(k for k in {*listed, *held} if listed.get(k) != _described(held.get(k)))
    if wrong:
        raise Damaged(f"{folder}: {CARD} and {TENSORS} disagree about {', '.join(repr(k[:80]) for k in wrong[:5])}")
    return card, data


def _described(held: Held | None) -> dict[str, Any] | None:
    return None if held is None else {"shape": held.shape, "dtype": held.dtype}


def _aside(folder: Path) -> Path:
    return folder.with_name(f".old-{folder.name}")


def _plain_arguments(method: Sparse) -> dict[str, Any]:
    for name, value in method.arguments.items():
        if not _is_plain(value):
            raise BadInput(
                f"{method.name}: argument {name} is a {type(value).__name__}; only plain scalars and lists are kept"
            )
    return method.arguments


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    return value is None or type(value) in (bool, int, float, str)


def _build(method_class: type[Sparse], arguments: dict[str, Any], folder: Path, *, meta: bool = False) -> Sparse:
    import torch

    device = torch.device("meta") if meta else contextlib.nullcontext()
    state = torch.get_rng_state()
    try:
        with device:
            return method_class(**arguments)
    except RarefyError as error:
        raise Damaged(f"{folder / CARD}: {method_class.name} refuses its arguments: {error}") from error
    except (TypeError, RuntimeError, MemoryError, OverflowError, ValueError) as error:
        if meta:
            raise NotImplementedError from error
        raise Damaged(
            f"{folder / CARD}: {method_class.name} cannot be built from {str(arguments)[:200]}: {error}"
        ) from error
    finally:
        torch.set_rng_state(state)


def _compare(mine: dict[str, Tensor], theirs: dict[str, Tensor], name: str, folder: Path) -> None:
    """Damaged, naming tensors, unless both have the same names, shapes and kinds of number."""
    problems = [f"missing {k}" for k in sorted(mine.keys() - theirs.keys())]
    problems += [f"extra {k}" for k in sorted(theirs.keys() - mine.keys())]
    for k in sorted(mine.keys() & theirs.keys()):
        a, b = mine[k], theirs[k]
        if a.shape != b.shape:
            problems.append(f"{k} has shape {list(b.shape)}, the method needs {list(a.shape)}")
        elif a.dtype != b.dtype and not (a.is_floating_point() and b.is_floating_point()):
            problems.append(f"{k} is {b.dtype}, the method needs {a.dtype}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise Damaged(f"{folder} does not fit {name}: {'; '.join(problems[:5])}{more}")
