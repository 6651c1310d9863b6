"""Dictionaries in the layouts of other libraries: read into ours, and written, with the same output on the same rows."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import BadInput
from ..latents.dictionary import Dictionary
from ..store.fs import DISK, make_dirs, writing
from . import circuit_tracer, dictionary_learning, gemma_scope, saelens, sparsify
from .plain import Plain, of_method, recentred, to_method

__all__ = ["LAYOUTS", "Foreign", "layout_of", "read_dictionary", "write_dictionary"]

_Write = Callable[[Plain, dict[str, Any]], dict[str, bytes]]


class _Layout(Protocol):
    """What each layout's file gives."""

    recognises: Callable[[Path], bool]
    read: Callable[[Path], tuple[Plain, dict[str, Any]]]


_READERS: dict[str, _Layout] = {
    "saelens": saelens, "sparsify": sparsify, "dictionary_learning": dictionary_learning, "gemma_scope": gemma_scope,
    "circuit-tracer": circuit_tracer,
}
_WRITERS: dict[str, _Write] = {
    "saelens": saelens.write, "saelens-v5": saelens.write_v5, "sparsify": sparsify.write, "dictionary_learning": dictionary_learning.write,
    "gemma_scope": gemma_scope.write, "circuit-tracer": circuit_tracer.write,
}
LAYOUTS = tuple(_WRITERS)
"""Names of what can be written; saelens is read in either version."""


@dataclass(frozen=True)
class Foreign:
    """A dictionary that another library wrote."""

    method: Dictionary
    """In eval mode, in raw units, float32."""
    layout: str
    made: dict[str, Any]
    """Plain JSON, as the files say it: `model`, `site` and `target` (their words, which `rarefy.sites` understands; None where
    they say nothing), and what else is known."""


def layout_of(path: str | Path) -> str | None:
    """The layout in which a file or folder holds a dictionary, by the names of its files; None if it is none of these."""
    path = Path(path)
    return next((name for name, layout in _READERS.items() if path.exists() and layout.recognises(path)), None)


def read_dictionary(path: str | Path, *, transcodes: bool | None = None) -> Foreign:
    """The dictionary at `path`, whichever layout it is in.

    Latents keep their order and, but for a common factor, their activations. Nothing in the files is executed, and no other
    file is opened because one of them names it.

    Args:
        path: the folder of one dictionary, or its file where a layout has several in one folder.
        transcodes: whether it reproduces another place than it reads, where the files do not say (Gemma Scope, dictionary_learning).

    Raises:
        BadInput: nothing there, no layout known, or several dictionaries.
        Damaged: truncated, altered, or of shapes, numbers or names that do not fit each other; names the file.
        Unsupported: something that these layouts can say and no dictionary here can do; says which.
    """
    path = Path(path)
    if not path.exists():
        raise BadInput(f"{path} does not exist; give the folder of a dictionary")
    layout = layout_of(path)
    if layout is None:
        raise BadInput(f"{path} holds no dictionary in a known layout ({', '.join(_READERS)}); those of rarefy itself are opened by rarefy.load")
    plain, made = _READERS[layout].read(path)
    if transcodes is False and plain.d_in != plain.d_out:
        raise BadInput(f"{path} reads {plain.d_in} channels and gives {plain.d_out}; it can only be a transcoder")
    if transcodes is not None and transcodes != plain.transcodes:
        plain = dataclasses.replace(recentred(plain, not transcodes), transcodes=transcodes)
    named = {key: made.get(key) if isinstance(made.get(key), str) else None for key in ("model", "site", "target")}
    return Foreign(to_method(plain), layout, made | named)


def write_dictionary(method: Dictionary, path: str | Path, layout: str, *, made: Mapping[str, Any] | None = None) -> list[Path]:
    """Write a dictionary so that the other library gives the same output on raw activations; the files written.

    Args:
        path: folder, new or empty; of circuit-tracer, one that holds other layers of the same transcoders too.
        layout: one of LAYOUTS.
        made: what the files should say it was made of: `model`, `site`, `target`, `dataset_path`, `context_size`.

    Raises:
        BadInput: no such layout, or a folder that holds something else.
        Unsupported: a method that the layout has no word for; says what to convert it to.
    """
    folder = Path(os.path.abspath(path))
    if layout not in _WRITERS:
        raise BadInput(f"layout {layout!r} must be one of {', '.join(LAYOUTS)}")
    files = _WRITERS[layout](of_method(method), dict(made or {}))
    there = DISK.names(folder) if folder.is_dir() else []
    if DISK.exists(folder) and not folder.is_dir():
        raise BadInput(f"{folder} is a file; give a folder to write")
    if there and layout == "circuit-tracer":
        _refuse_other_set(folder, files, there)
    elif there:
        raise BadInput(f"{folder} holds {there[0]!r} already; give a new or empty folder")
    with writing(folder):
        make_dirs(folder)
        for name, data in files.items():
            if name in there:                                  # the config, which is the same
                continue
            part = folder / f".tmp-{name}"
            DISK.write(part, data)
            DISK.sync(part)
            DISK.rename(part, folder / name)
        DISK.sync_dir(folder)
    return [folder / name for name in files]


def _refuse_other_set(folder: Path, files: Mapping[str, bytes], there: list[str]) -> None:
    """Raise BadInput unless `folder` holds layers of the same set of transcoders, and not this one."""
    config = circuit_tracer.CFG
    if config not in there or DISK.read(folder / config) != files[config]:
        raise BadInput(f"{folder} holds {there[0]!r} and not transcoders of the same model and places; give a new folder")
    if taken := [name for name in files if name != config and name in there]:
        raise BadInput(f"{folder} holds {taken[0]} already; give another folder, or delete it")
