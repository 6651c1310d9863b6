"""Activations on disk: rows [N, d] of one dtype, appended by one writer, read at random by any number of readers.

Every block of rows carries a checksum that is verified before a row of it is returned, so that a reader pays only for
what it reads and never returns altered or missing data. FORMAT.md defines the files.

Shape letters: N = rows, B = rows of a batch, d = width.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import xxhash
from torch import Tensor

from ..errors import BadInput, Damaged
from .fs import DISK, open_regular
from .layout import (
    CLOSED,
    HEADER,
    STORE,
    Extent,
    Index,
    Layout,
    check_made_from,
    data_path,
    read_extent,
    read_index,
    read_layout,
    store_name,
)
from .permutation import shuffled
from .writer import ActivationWriter

__all__ = ["ActivationStore", "ActivationWriter", "store_name"]

_OPEN_SHARDS = 64


class ActivationStore:
    """Rows of a store as they stood when it was opened; `refresh` sees what a writer has added since.

    Args:
        root: the store's directory.
        made_from: what the caller expects it was made from; None accepts any.
        cache_bytes: verified blocks kept in memory. Beyond it reading needs one block and the rows asked for.

    Raises:
        BadInput: no store there, or one made from something else.
        Damaged: a file is altered, truncated, missing or foreign; names it.
    """

    def __init__(
        self, root: str | Path, made_from: dict[str, Any] | None = None, *, cache_bytes: int = 1 << 26
    ) -> None:
        self.root = Path(root)
        if not self.root.is_dir() or not DISK.exists(self.root / STORE):
            if any(DISK.names(self.root)):
                raise Damaged(f"{self.root / STORE} is missing: not an activation store, or a damaged one")
            raise BadInput(f"{self.root} holds no activation store; write one with ActivationWriter")
        self._layout: Layout = read_layout(self.root)
        check_made_from(self._layout, made_from, self.root)
        self._cache_bytes = cache_bytes
        self._files: OrderedDict[int, int] = OrderedDict()
        self._indexes: OrderedDict[int, Index] = OrderedDict()
        self._blocks: OrderedDict[int, np.ndarray] = OrderedDict()
        self._held = 0
        self.refresh()

    def refresh(self) -> int:
        """Look again how many rows there are; returns it."""
        for attempt in range(3):
            try:
                self._extent: Extent = read_extent(self.root, self._layout)
                break
            except Damaged:
                # between looking at one file and the next, a writer begins a shard, or reopens a closed store and adds rows
                if attempt == 2 or DISK.exists(self.root / CLOSED):
                    raise
        self._indexes.clear()
        self._blocks.clear()
        self._held = 0
        return self._extent.rows

    def __len__(self) -> int:
        return self._extent.rows

    def __repr__(self) -> str:
        return f"ActivationStore({self.name}, rows={len(self)}, d={self.d}, dtype={self.dtype})"

    @property
    def d(self) -> int:
        """Width of a row."""
        return self._layout.d

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the rows."""
        return getattr(torch, self._layout.dtype)

    @property
    def made_from(self) -> dict[str, Any]:
        """What the writer said it was made from."""
        return self._layout.made_from

    @property
    def name(self) -> str:
        """`store_name(made_from)`."""
        return store_name(self._layout.made_from)

    @property
    def closed(self) -> bool:
        """Whether the writer finished; an unfinished store holds every row whose append returned."""
        return self._extent.closed

    def __getitem__(self, which: int | slice | Tensor) -> Tensor:
        """Rows: [d] for a whole number, [n, d] for a slice or an int64 tensor [n] (negative: from the end)."""
        n = len(self)
        if isinstance(which, int):
            return self._rows(self._checked(np.array([which], np.int64)))[0]
        if isinstance(which, slice):
            return self._rows(np.arange(*which.indices(n), dtype=np.int64))
        if not isinstance(which, Tensor) or which.dtype != torch.int64 or which.ndim != 1:
            raise BadInput("rows are chosen by a whole number, a slice or a one-dimensional int64 tensor")
        return self._rows(self._checked(which.cpu().numpy()))

    def batches(self, size: int, seed: int = 0, start_step: int = 0) -> Iterator[Tensor]:
        """Shuffled rows [size, d] without end; batch number `step` is a function of (seed, step) and the rows alone.

        Each row comes once in every N consecutive rows; a batch may reach from one epoch into the next.

        Raises:
            BadInput: the store is empty, or size or start_step is out of range.
        """
        n = len(self)
        if not n:
            raise BadInput(f"{self.root} holds no rows")
        if size < 1 or start_step < 0:
            raise BadInput(f"size={size} must be at least 1 and start_step={start_step} at least 0")
        return self._batches(n, size, seed, start_step)

    def _batches(self, n: int, size: int, seed: int, step: int) -> Iterator[Tensor]:
        while True:
            place = np.arange(size, dtype=np.int64) + step * size
            epoch = place // n
            row = np.empty(size, np.int64)
            for e in range(int(epoch[0]), int(epoch[-1]) + 1):
                row[epoch == e] = shuffled(place[epoch == e] - e * n, n, seed, e)
            yield self._rows(row)
            step += 1

    def _checked(self, rows: np.ndarray) -> np.ndarray:
        n = len(self)
        if rows.size and (rows.min() < -n or rows.max() >= n):
            raise BadInput(f"row {rows[(rows < -n) | (rows >= n)][0]} is not among the {n} rows of {self.root}")
        return np.where(rows < 0, rows + n, rows)

    def _rows(self, rows: np.ndarray) -> Tensor:
        """Rows [n] -> [n, d]; each block they lie in is read and verified once."""
        out = torch.empty((len(rows), self.d), dtype=self.dtype)
        if not len(rows):
            return out
        bytes_ND = out.view(torch.uint8).numpy()
        block, inside = np.divmod(rows, self._layout.block_rows)
        order = np.argsort(block, kind="stable")
        edges = np.flatnonzero(np.diff(block[order], prepend=-1, append=-1))
        for a, b in zip(edges[:-1], edges[1:], strict=True):
            at = order[a:b]
            bytes_ND[at] = self._block(int(block[at[0]]))[inside[at]]
        return out

    def _block(self, block: int) -> np.ndarray:
        """Verified bytes [rows, row_bytes] of a block of the whole store."""
        if block in self._blocks:
            self._blocks.move_to_end(block)
            return self._blocks[block]
        layout = self._layout
        shard, inner = divmod(block, layout.shard_blocks)
        index = self._index(shard)
        rows = index.block_rows(inner, layout.block_rows)
        want, place = rows * layout.row_bytes, HEADER + inner * layout.block_rows * layout.row_bytes
        data = os.pread(self._file(shard), want, place)
        if len(data) != want:
            raise Damaged(f"{data_path(self.root, shard)} is truncated: block {inner} has {len(data)} of {want} bytes")
        if xxhash.xxh3_128_intdigest(data) != int(index.sums[inner, 0]) | int(index.sums[inner, 1]) << 64:
            raise Damaged(f"{data_path(self.root, shard)} is altered: block {inner} does not match its checksum")
        out = np.frombuffer(data, np.uint8).reshape(rows, layout.row_bytes)
        self._blocks[block] = out
        self._held += want
        while self._held > self._cache_bytes and self._blocks:
            self._held -= self._blocks.popitem(last=False)[1].nbytes
        return out

    def _index(self, shard: int) -> Index:
        if shard not in self._indexes:
            at_end = shard == self._extent.shards - 1
            last = self._extent.last
            self._indexes[shard] = last if at_end and last else read_index(self.root, self._layout, shard, whole=True)
            if len(self._indexes) > _OPEN_SHARDS:
                self._indexes.popitem(last=False)
        return self._indexes[shard]

    def _file(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        path = data_path(self.root, shard)
        try:
            fd = open_regular(path, follow=False)
        except OSError as error:
            raise Damaged(f"{path} cannot be read: {error.strerror}") from error
        if os.pread(fd, HEADER, 0) != self._layout.header(shard):
            os.close(fd)
            raise Damaged(f"{path} does not begin as this store's shard {shard}: altered, swapped or foreign")
        self._files[shard] = fd
        if len(self._files) > _OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        return fd

    def verify(self) -> Iterator[tuple[Path, str]]:
        """Read and verify every block; yields each shard's file with what is wrong with it, or ""."""
        for shard in range(self._extent.shards):
            problem = ""
            try:
                rows = self._index(shard).rows
                for block in range(-(-rows // self._layout.block_rows)):
                    self._block(shard * self._layout.shard_blocks + block)
            except Damaged as error:
                problem = str(error)
            yield data_path(self.root, shard), problem

    def close(self) -> None:
        """Close the files; they are opened again when needed."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()
