"""Text in, packed contexts out. Documents keep their names and their borders all the way.

Shape letters: B = windows of a batch, T = tokens of a context.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput

SUFFIXES = {".txt", ".py", ".pyi", ".md", ".rst", ".jsonl"}
STDLIB_HELD_OUT_ONE_IN = 20
_STDLIB_SKIP = {"site-packages", "__pycache__", "lib2to3", "idlelib", "turtledemo", "_vendor", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Document:
    """One text."""

    name: str
    text: str


@dataclass(frozen=True)
class Batch:
    """Packed windows of tokens."""

    input_ids: Tensor
    """[B, T] int64."""
    doc: Tensor
    """[B, T] int64: number of the document each token belongs to."""
    offsets: Tensor
    """[B, T, 2] int64: characters of the document that each token covers; (0, 0) for the token that begins it."""
    attention_mask: Tensor | None = None
    """Always None: windows are full. There so that any padded batch can stand in for this one."""


class Undecodable:
    """Counts files that are not UTF-8 and warns once."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def read(self, path: Path) -> str | None:
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            self.names.append(str(path))
            return None

    def warn(self) -> None:
        if self.names:
            warnings.warn(f"{len(self.names)} files are not UTF-8 text and were left out, the first {self.names[0]}", stacklevel=3)


def stdlib_held_out(name: str) -> bool:
    """Whether the built-in model never saw this file: "stdlib/" + path below the standard library, by its hash."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % STDLIB_HELD_OUT_ONE_IN == 0


def _stdlib() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if _STDLIB_SKIP & set(inside.parts) or not 200 <= path.stat().st_size <= 200_000:
            continue
        text = Undecodable().read(path)      # its tests hold files in other encodings on purpose: no news
        if text is not None:
            yield Document(f"stdlib/{inside.as_posix()}", text)


def _jsonl(path: Path, field: str) -> Iterator[Document]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                raise BadInput(f"{path}, line {number}: not JSON") from None
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                raise BadInput(f"{path}, line {number}: no text field {field!r}")
            yield Document(f"{path.name}:{number}", record[field])


def _file(path: Path, bad: Undecodable, field: str, name: str = "") -> Iterator[Document]:
    if path.suffix == ".jsonl":
        try:
            yield from _jsonl(path, field)
        except UnicodeDecodeError:
            bad.names.append(str(path))
        return
    text = bad.read(path)
    if text is not None and text.strip():
        yield Document(name or path.name, text)


def _hub(spec: str, field: str) -> Iterator[Document]:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]
    except ImportError:
        raise BadInput(f"{spec} needs the datasets package: pip install 'rarefy[data]'") from None
    name, _, part = spec.removeprefix("datasets:").partition(":")
    for number, row in enumerate(load_dataset(name, split=part or "train", streaming=True)):
        if not isinstance(row.get(field), str):
            raise BadInput(f"{spec}: rows have no text field {field!r}; they have {', '.join(row)}")
        yield Document(f"{name}:{number}", row[field])


def documents(spec: str, *, field: str = "text") -> Iterator[Document]:
    """Documents of a specification, streamed.

    Args:
        spec: `stdlib` (the standard library of the Python that runs this, a file a document), a folder, a file
            (.txt, .py, .md, .jsonl), `datasets:NAME[:SPLIT]`, or several of these separated by commas.
        field: text field of .jsonl rows and data sets.

    Raises:
        BadInput: no such place, or nothing readable in it. Files that are not UTF-8 are left out with one warning.
    """
    bad, found = Undecodable(), 0
    for part in filter(None, (p.strip() for p in spec.split(","))):        # an empty part would be the current folder
        for document in _part(part, bad, field):
            found += 1
            yield document
    bad.warn()
    if not found:
        why = f"all {len(bad.names)} files are undecodable" if bad.names else f"no text in it (known endings: {', '.join(sorted(SUFFIXES))})"
        raise BadInput(f"data {spec!r}: {why}")


def _part(part: str, bad: Undecodable, field: str) -> Iterator[Document]:
    if part == "stdlib":
        yield from _stdlib()
    elif part.startswith("datasets:"):
        yield from _hub(part, field)
    elif Path(part).is_dir():
        for path in sorted(Path(part).rglob("*")):
            if path.suffix in SUFFIXES and path.is_file():
                yield from _file(path, bad, field, path.relative_to(part).as_posix())
    elif Path(part).is_file():
        yield from _file(Path(part), bad, field)
    else:
        raise BadInput(f"data {part!r}: no such file or folder; write `stdlib`, a path, or datasets:NAME")


def split(docs: Iterable[Document], *, held_out: float, seed: int = 0) -> tuple[list[Document], list[Document]]:
    """(to fit on, held out), by a hash of each name: the same name always falls on the same side.

    Files of the standard library keep the side they had in the built-in model's training, whatever `held_out` says.
    """
    if not 0 < held_out < 1:
        raise BadInput(f"held_out={held_out} must be in (0, 1): the fraction of documents held out")
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in docs:
        if document.name.startswith("stdlib/"):
            out = stdlib_held_out(document.name)
        else:
            digest = hashlib.sha256(f"{seed}/{document.name}".encode()).digest()
            out = int.from_bytes(digest[:8], "big") < held_out * 2**64
        sides[out].append(document)
    return sides


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        encoded = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids, [(0, 0)] * len(ids)


def pack(
    docs: Iterable[Document], tokenizer: Any, context: int, batch: int = 8, *, max_tokens: int | None = None,
    each: int | None = None,
) -> Iterator[Batch]:
    """Documents one after another in windows of `context` tokens, each begun by the tokenizer's bos (or eos) token.

    A window may hold the end of one document and the start of the next: `doc` says which is which. The last window
    is dropped unless full.

    Args:
        each: most tokens taken of one document, from a place that its name decides, so that few tokens can still come
            from many documents.

    Raises:
        BadInput: the text is shorter than one context.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids: list[int] = []
    owner: list[int] = []
    spans: list[tuple[int, int]] = []
    windows: list[tuple[Tensor, Tensor, Tensor]] = []
    given = 0
    limit = None if max_tokens is None else max(1, max_tokens // context)
    for number, document in enumerate(docs):
        some, offsets = _encode(tokenizer, document.text)
        if each is not None and len(some) > each:
            at = int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:4], "big") % (len(some) - each)
            some, offsets = some[at : at + each], offsets[at : at + each]
        if start is not None:
            some, offsets = [start, *some], [(0, 0), *offsets]
        ids += some
        owner += [number] * len(some)
        spans += offsets
        while len(ids) >= context and (limit is None or given < limit):
            windows.append((torch.tensor(ids[:context]), torch.tensor(owner[:context]), torch.tensor(spans[:context])))
            del ids[:context], owner[:context], spans[:context]
            given += 1
            if len(windows) == batch:
                yield _stack(windows)
                windows = []
        if limit is not None and given >= limit:
            break
    if windows:
        yield _stack(windows)
    if not given:
        raise BadInput(f"the text is {len(ids)} tokens, shorter than one context of {context}; give more text or a smaller --context")


def _stack(windows: list[tuple[Tensor, Tensor, Tensor]]) -> Batch:
    ids, owner, spans = zip(*windows, strict=True)
    return Batch(torch.stack(ids), torch.stack(owner), torch.stack(spans))


@dataclass
class Text:
    """Packed text for fitting and for judging; no document is in both."""

    fit: list[Batch]
    judge: list[Batch]
    fit_names: list[str]
    judge_docs: list[Document]
    """In the order of the batches' document numbers."""

    @property
    def judge_names(self) -> list[str]:
        """Names of the documents judged on."""
        return [d.name for d in self.judge_docs]


def text(
    spec: str | Iterable[Document], tokenizer: Any, *, context: int = 512, fit_tokens: int = 400_000, judge_tokens: int = 20_000, batch: int = 8,
) -> Text:
    """Documents of `spec`, split by name into text to fit on and text to judge on, packed into windows of `context` tokens.

    Where no name falls on one of the sides, a tenth of the documents is held out; of a lone document, its last tenth.

    Args:
        spec: as for `documents`, or the documents themselves.
        fit_tokens, judge_tokens: most tokens of each; 0 takes all. Those to judge on come from as many documents as they allow.
        batch: windows a batch.

    Raises:
        BadInput: nothing to read, or text shorter than one context on either side.
    """
    fit_docs, judge_docs = split(documents(spec) if isinstance(spec, str) else spec, held_out=0.1)
    if not judge_docs or not fit_docs:
        both = [*fit_docs, *judge_docs]
        both = both if len(both) > 1 else [part for document in both for part in _cut(document)]
        if not both:
            raise BadInput("no documents; give text to fit on and to judge on")
        middle = max(1, len(both) // 10)
        fit_docs, judge_docs = both[middle:], both[:middle]
    judge_docs = _mixed(judge_docs)
    fit = list(pack(_mixed(fit_docs), tokenizer, context, batch, max_tokens=fit_tokens or None))
    each = max(context // 2, 2 * max(judge_tokens, context) // len(judge_docs)) if judge_tokens else None
    judge = list(pack(judge_docs, tokenizer, context, batch, max_tokens=judge_tokens or None, each=each))
    read = 1 + max(int(b.doc.max()) for b in judge)
    return Text(fit, judge, [d.name for d in fit_docs], judge_docs[:read])


def _cut(document: Document) -> list[Document]:
    """(end, start): the last tenth of a lone document, from a line's beginning where one is near, and what comes before."""
    at = len(document.text) * 9 // 10
    line = document.text.find("\n", at, at + 1000) + 1
    at = line or at
    return [Document(f"{document.name} (end)", document.text[at:]), Document(f"{document.name} (start)", document.text[:at])]


def _mixed(docs: list[Document]) -> list[Document]:
    """Documents in an order that does not follow their folders, so that the first ones are a fair sample."""
    return sorted(docs, key=lambda d: hashlib.sha256(d.name.encode()).digest())
