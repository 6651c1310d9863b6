"""What a power cut leaves of a store that was being written, and how much of it a writer may keep."""

from __future__ import annotations

import itertools
import os
import warnings
from pathlib import Path

import numpy as np
import xxhash

from .fs import FS, open_regular, read_bounded
from .layout import COMMIT, HEADER, RECORD, Layout, data_path, index_path, parse_records, shard_numbers


def trim(root: Path, layout: Layout, fs: FS) -> None:
    """Cut the last shard of an unfinished store down to the records that are sound and whose rows are on the disk.

    Shards before it were forced to the disk when they were full; of the last one, what was appended after the last sync
    may be there in any part and order. Damage to the last shard looks the same and is treated the same.
    """
    shard = shard_numbers(root, fs) - 1
    path = index_path(root, shard)
    if shard < 0 or not fs.exists(path) or not fs.exists(data_path(root, shard)):
        return
    data = read_bounded(path, RECORD * (layout.shard_rows + 1), fs)
    kept = _sound(data, layout, shard, data_path(root, shard))
    if kept * RECORD == len(data):
        return
    lost = np.frombuffer(data, "<u8", count=len(data) // RECORD * 4).reshape(-1, 4)[kept:, 0] >= np.uint64(COMMIT)
    if lost.any():
        warnings.warn(
            f"{path}: {int(lost.sum())} appended pieces did not reach the disk whole and are cut off; write them again", stacklevel=4
        )
    fs.truncate(path, kept * RECORD)
    fs.sync(path)


def _sound(index: bytes, layout: Layout, shard: int, path: Path) -> int:
    """How many records of a shard, from the first, are sound and match the rows that are there."""
    words, rows, count, _ = parse_records(index, layout, shard)
    rows = rows[:count]
    block = (rows - 1) // layout.block_rows
    edges = [*np.flatnonzero(np.diff(block, prepend=-1)).tolist(), count]
    with os.fdopen(open_regular(path, follow=False), "rb") as file:
        if file.read(HEADER) != layout.header(shard):
            return 0
        for a, b in itertools.pairwise(edges):
            start = int(block[a]) * layout.block_rows
            data = file.read((int(rows[b - 1]) - start) * layout.row_bytes)
            if xxhash.xxh3_128_intdigest(data) != _sum(words[b - 1]):
                return a + _walk(data, rows[a:b] - start, words[a:b], layout.row_bytes)
    return count


def _walk(data: bytes, rows: np.ndarray, words: np.ndarray, row_bytes: int) -> int:
    """How many records of one block match the data, which grew by an append from each to the next."""
    sofar, at = xxhash.xxh3_128(), 0
    for number, (end, word) in enumerate(zip(rows * row_bytes, words, strict=True)):
        sofar.update(data[at : int(end)])
        at = int(end)
        if at > len(data) or sofar.intdigest() != _sum(word):
            return number
    return len(words)


def _sum(words: np.ndarray) -> int:
    return int(words[1]) | int(words[2]) << 64
