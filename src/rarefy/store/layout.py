"""The layout of an activation store on disk, as FORMAT.md defines it: names, identity, commit records."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadInput, Damaged
from .fs import DISK, FS, read_bounded, size_of
from .sealed import canonical, read_sealed
from .tensors import ITEM_BYTES

FORMAT, CLOSED_FORMAT = "rarefy-activations", "rarefy-activations-closed"
STORE, CLOSED = "store.json", "closed.json"
MAGIC = b"RAREFYA1"
HEADER, RECORD = 40, 32
COMMIT = 1 << 63
MOST_SHARD_ROWS = 1 << 19
"""A shard's rows at most: its commit records, of which a row has at most one, then take at most 16 MiB."""
MOST_BLOCK_BYTES = 1 << 26
CUT_OFF = "start the same writing again: it goes on from the last row that reached the disk"
_SHARD = re.compile(r"shard-(\d{6})\.(data|index)")
_NAME = re.compile(r"acts-[0-9a-f]{32}")
_P = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def store_name(made_from: dict[str, Any]) -> str:
    """Directory name of the store made from this: "acts-" and 32 hex digits of the SHA-256 of its canonical JSON."""
    return f"acts-{hashlib.sha256(canonical(made_from)).hexdigest()[:32]}"


def mix(words: np.ndarray, start: int) -> np.ndarray:
    """Checksum [n] of rows of 64-bit words [n, k]. Each step is a bijection, so one changed word always changes it."""
    out = np.full(len(words), start, dtype=np.uint64)
    for column in words.T:
        out = (out ^ column) * np.uint64(_P)
        out ^= out >> np.uint64(32)
    return out


def mix_one(words: list[int], start: int) -> int:
    """`mix` of one row, in plain integers."""
    out = start
    for word in words:
        out = ((out ^ word) * _P) & _MASK
        out ^= out >> 32
    return out


@dataclass(frozen=True)
class Layout:
    """What store.json says."""

    id: str
    """32 hex digits, random; binds the shards to this store."""
    d: int
    dtype: str
    block_rows: int
    """Rows a checksum covers."""
    shard_rows: int
    """Rows of every shard but the last; a multiple of block_rows."""
    made_from: dict[str, Any]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.d * ITEM_BYTES[self.dtype]

    @property
    def shard_blocks(self) -> int:
        """Blocks of a full shard."""
        return self.shard_rows // self.block_rows

    def words(self, shard: int) -> list[int]:
        """The header of a shard as 64-bit words, without its checksum."""
        raw = MAGIC + bytes.fromhex(self.id)
        return [int.from_bytes(raw[i : i + 8], "little") for i in (0, 8, 16)] + [shard]

    def start(self, shard: int) -> int:
        """Checksum of a shard's header, from which its records' checksums start."""
        return mix_one(self.words(shard), 0)

    def header(self, shard: int) -> bytes:
        """The first bytes of a shard's data file."""
        return b"".join(w.to_bytes(8, "little") for w in [*self.words(shard), self.start(shard)])

    def record(self, shard: int, rows: int, checksum: int, commit: bool) -> bytes:
        """One commit record."""
        words = [rows | (COMMIT if commit else 0), checksum & _MASK, checksum >> 64]
        return b"".join(w.to_bytes(8, "little") for w in [*words, mix_one(words, self.start(shard))])

    def as_json(self) -> dict[str, Any]:
        """The document store.json holds."""
        return {
            "format": FORMAT,
            "version": 1,
            "id": self.id,
            "d": self.d,
            "dtype": self.dtype,
            "block_rows": self.block_rows,
            "shard_rows": self.shard_rows,
            "made_from": self.made_from,
            "name": store_name(self.made_from),
        }


def data_path(root: Path, shard: int) -> Path:
    """File of a shard's rows."""
    return root / f"shard-{shard:06d}.data"


def index_path(root: Path, shard: int) -> Path:
    """File of a shard's commit records."""
    return root / f"shard-{shard:06d}.index"


def read_layout(root: Path, fs: FS = DISK) -> Layout:
    """store.json, checked; Damaged otherwise. A directory named like a store must be named after its made_from."""
    path = root / STORE
    document = read_sealed(path, FORMAT, fs=fs)
    whole: dict[str, Any] = {key: document.get(key) for key in ("d", "block_rows", "shard_rows")}
    if any(type(v) is not int or not 0 < v < 1 << 40 for v in whole.values()):
        raise Damaged(f"{path}: d, block_rows and shard_rows must be whole numbers in 1..2^40, not {str(whole)[:200]}")
    made, ident, dtype = document.get("made_from"), document.get("id"), document.get("dtype")
    if not isinstance(made, dict) or not isinstance(ident, str) or not re.fullmatch(r"[0-9a-f]{32}", ident):
        raise Damaged(f"{path}: made_from must be an object and id 32 hex digits")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise Damaged(f"{path}: unknown dtype {str(dtype)[:20]!r}")
    layout = Layout(ident, whole["d"], dtype, whole["block_rows"], whole["shard_rows"], made)
    if layout.shard_rows % layout.block_rows or layout.shard_rows > MOST_SHARD_ROWS:
        raise Damaged(f"{path}: shard_rows must be a multiple of block_rows, at most {MOST_SHARD_ROWS}")
    if layout.block_rows > 1 and layout.block_rows * layout.row_bytes > MOST_BLOCK_BYTES:
        raise Damaged(f"{path}: a block of {layout.block_rows * layout.row_bytes} bytes is over {MOST_BLOCK_BYTES}")
    name = store_name(made)
    if document.get("name") != name or (_NAME.fullmatch(root.name) and root.name != name):
        raise Damaged(f"{root} is not named after what made it, which gives {name}: renamed or swapped")
    return layout


def read_closed(root: Path, layout: Layout, fs: FS = DISK) -> int | None:
    """Rows of a closed store; None while it is unfinished."""
    path = root / CLOSED
    if not fs.exists(path):
        return None
    document = read_sealed(path, CLOSED_FORMAT, fs=fs)
    if document.get("id") != layout.id or type(document.get("rows")) is not int or document["rows"] < 0:
        raise Damaged(f"{path} belongs to another store")
    return document["rows"]


def shard_numbers(root: Path, fs: FS = DISK) -> int:
    """How many shards there are; Damaged if one before the last lacks a file."""
    found = {(int(m[1]), m[2]) for name in fs.names(root) if (m := _SHARD.fullmatch(name))}
    count = max((number for number, _ in found), default=-1) + 1
    have = {number for number, _ in found}
    gap = next((i for i in range(min(count, len(have) + 1)) if i not in have), None)
    if gap is not None:
        raise Damaged(f"{data_path(root, gap)} is missing")
    for number in range(count):
        for kind in ("data", "index"):
            if (number, kind) not in found and not (number == count - 1 and _fresh(root, number, kind, fs)):
                raise Damaged(f"{root / f'shard-{number:06d}.{kind}'} is missing")
    return count


def _fresh(root: Path, shard: int, lacks: str, fs: FS) -> bool:
    """Whether a shard without this file is one whose making a crash or power cut stopped before it had rows."""
    return size_of(data_path(root, shard), fs) <= HEADER if lacks == "index" else size_of(index_path(root, shard), fs) == 0


def foreign_names(root: Path) -> list[str]:
    """Names in a store's directory that do not belong there; a writer's temporary files and lock do."""
    own = {STORE, CLOSED, ".lock"}
    return [n for n in DISK.names(root) if n not in own and not _SHARD.fullmatch(n) and not n.startswith(".tmp-")]


@dataclass(frozen=True)
class Index:
    """Commit records of one shard, up to the last committed one."""

    rows: int
    records: int
    sums: np.ndarray
    """[blocks, 2] uint64: xxh3_128 of each block's bytes, low word first."""
    torn: bool
    """Bytes follow that no finished append left."""

    def block_rows(self, block: int, size: int) -> int:
        """Rows of a block."""
        return min(size, self.rows - block * size)


def parse_records(data: bytes, layout: Layout, shard: int) -> tuple[np.ndarray, np.ndarray, int, str]:
    """Words [records, 4], rows that each record counts, how many records from the first are sound, and why the next is not."""
    count = len(data) // RECORD
    words = np.frombuffer(data, dtype="<u8", count=4 * count).reshape(count, 4)
    whole = mix(words[:, :3], layout.start(shard)) == words[:, 3]
    rows = (words[:, 0] & np.uint64(COMMIT - 1)).astype(np.int64)
    block = (rows - 1) // layout.block_rows
    before, block_before = np.concatenate([[0], rows[:-1]]), np.concatenate([[-1], block[:-1]])
    steps = block - block_before
    follows = (
        (rows > before)
        & (rows <= layout.shard_rows)
        & (steps <= 1)
        & ((steps == 0) | (before == block * layout.block_rows))
    )
    bad = np.flatnonzero(~(whole & follows))
    if not bad.size:
        return words, rows, count, ""
    first = int(bad[0])
    why = "does not follow from the one before it" if whole[first] else "does not match its checksum: altered or of another shard"
    return words, rows, first, f"record {first} {why}"


def read_index(root: Path, layout: Layout, shard: int, fs: FS = DISK, *, whole: bool = False) -> Index:
    """A shard's records, checked; Damaged unless each is sound and follows from the one before.

    `whole`: a later shard holds committed rows, so this one must be full and all its records count.
    """
    path = index_path(root, shard)
    if not fs.exists(path):
        return Index(0, 0, np.empty((0, 2), np.uint64), False)
    data = read_bounded(path, RECORD * (layout.shard_rows + 1), fs)
    words, rows, sound, why = parse_records(data, layout, shard)
    count = len(words)
    if sound < count:
        raise Damaged(f"{path}: {why}")
    committed = np.flatnonzero(words[:, 0] >= np.uint64(COMMIT))
    kept = int(committed[-1]) + 1 if committed.size else 0
    if whole:
        kept = count
        if not count or rows[-1] != layout.shard_rows or len(data) % RECORD:
            raise Damaged(f"{path} is truncated: it records {rows[-1] if count else 0} of {layout.shard_rows} rows")
    last_of_block = np.flatnonzero(np.diff((rows[:kept] - 1) // layout.block_rows, append=-1))
    total = int(rows[kept - 1]) if kept else 0
    return Index(total, kept, words[last_of_block, 1:3].copy(), kept * RECORD != len(data))


@dataclass(frozen=True)
class Extent:
    """The rows a store holds at one moment."""

    rows: int
    shards: int
    """Shards that hold them, the last perhaps in part."""
    files: int
    """Shards on disk; more than `shards` only after a crash."""
    last: Index | None
    """Records of the last of `shards`."""
    closed: bool


def read_extent(root: Path, layout: Layout, fs: FS = DISK) -> Extent:
    """How many rows there are, found from the last shard; Damaged if a file is missing or its size is wrong."""
    closed = read_closed(root, layout, fs)
    files = shards = shard_numbers(root, fs)
    last: Index | None = None
    while shards:
        last = read_index(root, layout, shards - 1, fs)
        if last.rows or last.records:
            break
        shards -= 1
    rows = 0 if not shards or last is None else (shards - 1) * layout.shard_rows + last.rows
    for shard in range(shards):
        held = layout.shard_rows if shard < shards - 1 else (last.rows if last else 0)
        size, want = size_of(data_path(root, shard), fs), HEADER + held * layout.row_bytes
        if size < want or (size > want and (closed is not None or shard < shards - 1)):
            hint = f"; if the power failed while it was written, {CUT_OFF}" if closed is None and shard == shards - 1 else ""
            raise Damaged(f"{data_path(root, shard)} has {size} bytes; its {held} rows take {want}{hint}")
    if closed is not None and (closed != rows or files != shards or (last is not None and last.torn)):
        raise Damaged(
            f"{root} was closed with {closed} rows; {rows} are found in {files} shards: a shard is truncated or missing"
        )
    return Extent(rows, shards, files, last if shards else None, closed is not None)


def check_made_from(found: Layout, asked: dict[str, Any] | None, root: Path) -> None:
    """BadInput showing what differs, if the store was made from something else than asked."""
    from .checkpoint import diff_meta

    if asked is not None and canonical(asked) != canonical(found.made_from):
        raise BadInput(
            f"{root} was made from something else: {'; '.join(diff_meta(found.made_from, asked))}; use another folder"
        )
