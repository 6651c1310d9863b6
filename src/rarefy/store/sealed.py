"""Files that carry a checksum of their own bytes: JSON documents as their last entry, a page in its head."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import xxhash

from ..errors import BadInput, Damaged
from .fs import DISK, FS, read_bounded

MOST = 4 << 20
"""Largest document read, in bytes; keeps a hostile file from costing time or memory."""
MOST_REPORT = 1 << 29
"""Largest report or page read."""
_TAIL = re.compile(rb',\n "seal": "([0-9a-f]{32})"\n}\n')
SEAL_BYTES = 48
_META = re.compile(rb'<meta name="rarefy-seal" content="([0-9a-f]{32})">')


def seal(document: dict[str, Any]) -> bytes:
    """The document as bytes, sealed."""
    try:
        text = json.dumps(document, indent=1, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadInput(
            f"cannot be kept as JSON: {error}; use text, whole or finite numbers, true/false, lists and dicts"
        ) from error
    if not document or "seal" in document:
        raise BadInput("a document to seal needs at least one entry, and none called 'seal'")
    body = text.encode()[:-2]  # without its "\n}"
    if len(body) + SEAL_BYTES > MOST:
        raise BadInput(f"the document has {len(body)} bytes; at most {MOST - SEAL_BYTES} can be kept")
    return seal_body(body)


def seal_body(body: bytes) -> bytes:
    """A JSON object that lacks only its closing brace, closed and sealed."""
    return body + b',\n "seal": "' + xxhash.xxh3_128_hexdigest(body).encode() + b'"\n}\n'


def unseal(data: bytes, path: str | Path) -> dict[str, Any]:
    """The document in `data`, or Damaged naming `path` if a single bit is not as it was sealed."""
    tail = _TAIL.fullmatch(data[-SEAL_BYTES:])
    body = data[:-SEAL_BYTES]
    if tail is None:
        raise Damaged(f"{path} has no seal at its end: truncated, or not written by rarefy")
    if xxhash.xxh3_128_hexdigest(body).encode() != tail[1]:
        raise Damaged(f"{path} is altered: its checksum does not match")
    return parse(body + b"\n}", path)


def read_sealed(path: Path, form: str, version: int = 1, fs: FS = DISK) -> dict[str, Any]:
    """A sealed document of the given format, or Damaged."""
    document = unseal(read_bounded(path, MOST, fs), path)
    if document.get("format") != form:
        raise Damaged(f"{path} is a {str(document.get('format'))[:80]!r}, not a {form!r}")
    if document.get("version") != version:
        raise Damaged(f"{path} has format version {str(document.get('version'))[:80]}; this rarefy reads {version}")
    return document


def parse(data: bytes, path: str | Path) -> dict[str, Any]:
    """Strict JSON object: no NaN, no number beyond a float, no repeated keys, no deep nesting; Damaged otherwise."""
    try:
        out = json.loads(data, object_pairs_hook=_no_repeats, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(out, dict):
        raise Damaged(f"{path} holds a {type(out).__name__}, not an object")
    return out


def seal_page(page: bytes) -> bytes:
    """An HTML page with its checksum in its head, where no reader sees it."""
    head = page.index(b"<title>")
    return page[:head] + f'<meta name="rarefy-seal" content="{xxhash.xxh3_128_hexdigest(page)}">\n'.encode() + page[head:]


def check_page(path: Path) -> None:
    """Damaged unless the page is as `seal_page` made it."""
    page = read_bounded(path, MOST_REPORT)
    found = _META.search(page)
    if found is None or page[found.end() : found.end() + 1] != b"\n":
        raise Damaged(f"{path} has no seal: altered, or not written by rarefy")
    if xxhash.xxh3_128_hexdigest(page[: found.start()] + page[found.end() + 1 :]).encode() != found[1]:
        raise Damaged(f"{path} is altered: its checksum does not match")


def canonical(value: Any) -> bytes:
    """One spelling of a JSON value, for hashing."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise BadInput(f"cannot be kept as JSON: {error}") from error


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key stands twice")
    return out


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is beyond the range of a float")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
