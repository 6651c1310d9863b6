"""The one writer of an activation store: an append that has returned survives the death of the process."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import xxhash
from torch import Tensor

from ..errors import BadInput, Damaged
from .atomic import write_atomic
from .fs import DISK, FS, make_dirs, open_regular, writing
from .layout import (
    CLOSED,
    CLOSED_FORMAT,
    HEADER,
    MOST_BLOCK_BYTES,
    MOST_SHARD_ROWS,
    RECORD,
    STORE,
    Layout,
    check_made_from,
    data_path,
    foreign_names,
    index_path,
    read_extent,
    read_layout,
    store_name,
)
from .lock import RunLock
from .recover import trim
from .sealed import canonical, seal
from .tensors import ITEM_BYTES, dtype_name, raw_bytes


class ActivationWriter:
    """Appends rows to a store; makes it if missing, and goes on after the last acknowledged row if there is one.

    Args:
        root: directory of the store; `parent / store_name(made_from)` by custom. A directory that is named like a store
            but after something else is refused.
        d: width of a row.
        dtype: of the rows kept, such as torch.bfloat16 or "bfloat16".
        made_from: plain JSON that tells what the rows are: model revision, site, hash of the tokens, ...
        block_bytes: bytes a checksum covers; a reader reads at least this much.
        shard_bytes: bytes of a file.

    Raises:
        BadInput: another process writes there; the store there has another d, dtype or made_from; the disk refuses.
        Damaged: the store there is.
    """

    def __init__(
        self,
        root: str | Path,
        d: int,
        dtype: torch.dtype | str,
        made_from: dict[str, Any],
        *,
        block_bytes: int = 1 << 14,
        shard_bytes: int = 1 << 28,
        fs: FS = DISK,
    ) -> None:
        self.root, self._fs, self._made_from = Path(root), fs, made_from
        name = dtype_name(dtype)
        if type(d) is not int or not 1 <= d <= 1 << 24:
            raise BadInput(f"d={d!r} must be a whole number in 1..2^24")
        if not isinstance(made_from, dict):
            raise BadInput("made_from must be a dict of plain JSON values")
        if re.fullmatch(r"acts-[0-9a-f]{32}", self.root.name) and self.root.name != store_name(made_from):
            raise BadInput(
                f"{self.root} is not named after made_from, which gives {store_name(made_from)}; use that name"
            )
        row_bytes = d * ITEM_BYTES[name]
        if not 1 <= block_bytes <= MOST_BLOCK_BYTES or shard_bytes < 1:
            raise BadInput(
                f"block_bytes={block_bytes} must be in 1..{MOST_BLOCK_BYTES} and shard_bytes={shard_bytes} at least 1"
            )
        block = max(1, min(block_bytes // row_bytes, MOST_SHARD_ROWS))
        shard = max(1, min(shard_bytes // row_bytes, MOST_SHARD_ROWS) // block) * block
        canonical(made_from)
        self._layout = Layout(secrets.token_hex(16), d, name, block, shard, made_from)
        self._lock = RunLock(self.root)
        self._lock.__enter__()
        try:
            self._begin()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        self._open = True

    @property
    def rows(self) -> int:
        """Acknowledged rows; a caller that goes on after a crash skips as many."""
        return self._rows

    def append(self, rows: Tensor) -> None:
        """Add rows [..., d]; once this returns they are the store's, whatever happens to the process.

        Raises:
            BadInput: wrong width or dtype, closed, or the disk refuses; none of the rows is then in the store.
        """
        if not self._open:
            raise BadInput(f"{self.root} is closed; open another ActivationWriter to add rows")
        layout = self._layout
        if not isinstance(rows, Tensor) or rows.ndim < 1 or rows.shape[-1] != layout.d:
            shape = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise BadInput(f"rows of shape {shape} do not fit a store of width {layout.d}")
        if dtype_name(rows.dtype) != layout.dtype:
            raise BadInput(f"rows are {rows.dtype} but the store keeps {layout.dtype}; convert them with .to()")
        if not rows.numel():
            return
        if self._dirty:
            self._recover()
        data = raw_bytes(rows)
        self._dirty = True
        with writing(self.root):
            try:
                self._put(data, len(data) // layout.row_bytes)
            except OSError:
                self._recover()
                raise
        self._dirty = False

    def sync(self) -> None:
        """Make what was acknowledged survive a power cut too; `close` and every finished shard do so themselves."""
        if self._rows % self._layout.shard_rows:
            with writing(self.root):
                self._sync(self._rows // self._layout.shard_rows)

    def close(self) -> None:
        """Finish: everything is durable, and from now on a missing row is noticed."""
        if not self._open:
            return
        try:
            if self._dirty:
                self._recover()
            self.sync()
            done = {"format": CLOSED_FORMAT, "version": 1, "id": self._layout.id, "rows": self._rows}
            write_atomic(self.root / CLOSED, seal(done), self._fs)
        finally:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:  # an interrupted store stays unfinished, so that it can be told from a whole one
            self._release()

    def __del__(self) -> None:
        if getattr(self, "_open", False):
            self._release()

    def _release(self) -> None:
        self._open = False
        self._lock.__exit__(None, None, None)

    def _begin(self) -> None:
        fs, asked = self._fs, self._layout
        with writing(self.root):
            make_dirs(self.root, fs)
            for name in fs.names(self.root):
                if name.startswith(".tmp-"):
                    fs.remove(self.root / name)
        if fs.exists(self.root / STORE):
            found = read_layout(self.root, fs)
            check_made_from(found, self._made_from, self.root)
            if (found.d, found.dtype) != (asked.d, asked.dtype):
                raise BadInput(
                    f"{self.root} keeps rows of {found.d} {found.dtype}, not {asked.d} {asked.dtype}; use another folder"
                )
            self._layout = found
        else:
            other = [n for n in fs.names(self.root) if n != ".lock"]
            if other:
                raise BadInput(f"{self.root} holds {other[0]!r} but no store; use an empty folder")
            write_atomic(self.root / STORE, seal(asked.as_json()), fs)
        foreign = foreign_names(self.root)
        if foreign:
            raise Damaged(f"{self.root / foreign[0]} does not belong in a store")
        if not fs.exists(self.root / CLOSED):
            with writing(self.root):
                trim(self.root, self._layout, fs)
        self._recover()
        if fs.exists(self.root / CLOSED):
            with writing(self.root):
                fs.remove(self.root / CLOSED)
                fs.sync_dir(self.root)

    def _recover(self) -> None:
        """Cut off what no finished append left, and take up the last block's checksum."""
        fs, layout = self._fs, self._layout
        extent = read_extent(self.root, layout, fs)
        with writing(self.root):
            for shard in reversed(range(extent.shards, extent.files)):
                for path in (index_path(self.root, shard), data_path(self.root, shard)):
                    if fs.exists(path):
                        fs.remove(path)
            if extent.files > extent.shards:
                fs.sync_dir(self.root)
            self._rows, self._block = extent.rows, xxhash.xxh3_128()
            if extent.last is not None:
                shard, index = extent.shards - 1, extent.last
                if index.torn:
                    self._cut(index_path(self.root, shard), index.records * RECORD)
                path = data_path(self.root, shard)
                if fs.size(path) != HEADER + index.rows * layout.row_bytes:
                    self._cut(path, HEADER + index.rows * layout.row_bytes)
                self._take_up_block(path, index.rows % layout.block_rows, index.sums)
        self._dirty = False

    def _cut(self, path: Path, size: int) -> None:
        """Cut a file short, durably, so that no later power cut brings back what followed."""
        self._fs.truncate(path, size)
        self._fs.sync(path)

    def _take_up_block(self, path: Path, rows: int, sums: Any) -> None:
        if not rows:
            return
        with os.fdopen(open_regular(path, follow=False), "rb") as file:
            file.seek(-rows * self._layout.row_bytes, 2)
            self._block.update(file.read())
        if self._block.intdigest() != int(sums[-1, 0]) | int(sums[-1, 1]) << 64:
            raise Damaged(
                f"{path} is altered: its last block does not match its checksum; delete {self.root} and write it again"
            )

    def _put(self, data: memoryview, count: int) -> None:
        """Data first, then the records that make it count; only the last record commits."""
        layout, at, fs = self._layout, 0, self._fs
        rows = self._rows
        while at < count:
            shard, inside = divmod(rows, layout.shard_rows)
            take = min(count - at, layout.shard_rows - inside)
            if not inside:
                fs.write(data_path(self.root, shard), layout.header(shard))
                fs.write(index_path(self.root, shard), b"")
                fs.sync_dir(self.root)
            piece = data[at * layout.row_bytes : (at + take) * layout.row_bytes]
            fs.append(data_path(self.root, shard), piece)
            fs.append(index_path(self.root, shard), self._records(shard, inside, piece, take, at + take == count))
            at, rows = at + take, rows + take
            if not rows % layout.shard_rows:
                self._sync(shard)
        self._rows = rows

    def _records(self, shard: int, inside: int, piece: memoryview, take: int, commits: bool) -> bytes:
        layout, out, at = self._layout, [], 0
        while at < take:
            step = min(take - at, layout.block_rows - (inside + at) % layout.block_rows)
            self._block.update(piece[at * layout.row_bytes : (at + step) * layout.row_bytes])
            at += step
            out.append(layout.record(shard, inside + at, self._block.intdigest(), commits and at == take))
            if not (inside + at) % layout.block_rows:
                self._block.reset()
        return b"".join(out)

    def _sync(self, shard: int) -> None:
        self._fs.sync(data_path(self.root, shard))
        self._fs.sync(index_path(self.root, shard))
