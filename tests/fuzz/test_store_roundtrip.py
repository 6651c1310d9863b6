"""Shards: any shape and dtype comes back bit for bit (A1), random access equals sequential (A6), nothing altered is read (A2)."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rarefy
from rarefy.errors import BadInput, Damaged, Unsupported
from rarefy.store.check import check
from rarefy.store.permutation import shuffled
from rarefy.store.shards import ActivationStore, ActivationWriter, store_name

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def raw(x):
    return x.contiguous().view(torch.uint8) if x.dtype != torch.bool else x.to(torch.uint8)


def random_bits(n, d, dtype, seed):
    size = torch.empty(0, dtype=dtype).element_size()
    bits = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, d * size), dtype=np.uint8))
    if not n:
        return torch.empty(0, d, dtype=dtype)
    return bits > 127 if dtype == torch.bool else bits.view(dtype)  # NaN payloads and infinities included


def write(root, x, cuts=(), **kw):
    with ActivationWriter(root, x.shape[1], x.dtype, {"a": 1}, **kw) as writer:
        for a, b in itertools.pairwise([0, *sorted(cuts), len(x)]):
            writer.append(x[a:b])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_round_trip(data):
    n, d = data.draw(st.integers(0, 120)), data.draw(st.integers(1, 20))
    dtype = data.draw(st.sampled_from(DTYPES))
    cuts = data.draw(st.lists(st.integers(0, n), max_size=5))
    x = random_bits(n, d, dtype, data.draw(st.integers(0, 99)))
    with tempfile.TemporaryDirectory() as folder:
        block, shard = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 2000))
        write(folder, x, cuts, block_bytes=block, shard_bytes=shard)
        store = ActivationStore(folder, cache_bytes=data.draw(st.sampled_from([0, 50, 1 << 20])))
        assert (len(store), store.d, store.dtype, store.closed) == (n, d, dtype, True)
        assert torch.equal(raw(store[:]), raw(x))
        at = torch.tensor(
            data.draw(st.lists(st.integers(-n, n - 1), max_size=30) if n else st.just([])), dtype=torch.int64
        )
        assert torch.equal(raw(store[at]), raw(x[at]))
        a, b, step = data.draw(st.integers(-n, n)), data.draw(st.integers(-n, n)), data.draw(st.integers(1, 4))
        assert torch.equal(raw(store[a:b:step]), raw(x[a:b:step]))
        assert check(folder).ok
        store.close()


def test_append_takes_any_leading_shape_and_strides(tmp_path):
    x = torch.randn(2, 3, 4, 5)
    with ActivationWriter(tmp_path, 5, "float32", {}, block_bytes=60) as writer:
        writer.append(x)
        writer.append(x[0, 0, 0])
        writer.append(x.transpose(0, 2))
        writer.append(x[:0])
        assert writer.rows == 49
    want = torch.cat([x.reshape(-1, 5), x[0, 0, :1], x.transpose(0, 2).reshape(-1, 5)])
    assert torch.equal(ActivationStore(tmp_path)[:], want)


@pytest.mark.parametrize("n", [1, 2, 3, 63, 111, 1000, 4097])
def test_shuffle_is_a_permutation(n):
    seen = [shuffled(np.arange(n), n, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in seen:
        assert np.array_equal(np.sort(order), np.arange(n))
    if n > 60:
        assert all(not np.array_equal(a, b) for a, b in itertools.combinations(seen, 2))


def test_shuffle_looks_random():
    n = 1 << 14
    order = shuffled(np.arange(n), n, 3, 0)
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.03
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    # 64 bins of places against 64 bins of rows: chi-square with about 63^2 degrees of freedom, 6 sigma
    table = np.histogram2d(np.arange(n), order, bins=64)[0]
    expected = n / 64**2
    assert abs(((table - expected) ** 2 / expected).sum() - 63**2) < 6 * np.sqrt(2 * 63**2)


@pytest.mark.parametrize("size", [1, 7, 64, 150])
def test_batches_visit_each_row_once_an_epoch_and_resume_anywhere(tmp_path, size):
    n = 100
    write(tmp_path, torch.arange(n)[:, None], block_bytes=64, shard_bytes=256)
    store = ActivationStore(tmp_path)
    steps = 3 * n // size + 2
    whole = list(itertools.islice(store.batches(size, seed=5), steps))
    rows = torch.cat(whole)[:, 0]
    for epoch in range(3):
        assert torch.equal(rows[epoch * n : (epoch + 1) * n].sort()[0], torch.arange(n))
    for step in (0, 1, steps - 1):
        again = next(ActivationStore(tmp_path).batches(size, 5, step))
        assert torch.equal(again, whole[step])
    assert not torch.equal(torch.cat(list(itertools.islice(store.batches(size, 6), steps)))[:, 0], rows)


def test_every_flipped_bit_is_detected(tmp_path):
    x = random_bits(3, 1, torch.bfloat16, 0)
    write(tmp_path / "s", x, [1], block_bytes=2, shard_bytes=4)
    for file in sorted(f for f in (tmp_path / "s").iterdir() if f.name != ".lock"):
        good = file.read_bytes()
        # every bit of rows and records; of the JSON files, whose seal covers each byte alike, every fifth
        for bit in range(0, len(good) * 8, 5 if file.suffix == ".json" else 1):
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            file.write_bytes(bad)
            with pytest.raises(Damaged, match=r"store\.json|closed|shard-"):
                ActivationStore(tmp_path / "s")[:]
        report = check(tmp_path)
        assert file.name.split(".")[0] in " ".join(report.problems)
        file.write_bytes(good)
    assert check(tmp_path).ok


def test_every_truncation_missing_and_swapped_file_is_detected(tmp_path):
    x = random_bits(11, 3, torch.float32, 1)
    write(tmp_path / "s", x, block_bytes=24, shard_bytes=48)
    write(tmp_path / "other", x, block_bytes=24, shard_bytes=48)
    files = [f for f in sorted((tmp_path / "s").iterdir()) if f.name not in (".lock", "closed.json")]
    for file in files:
        good = file.read_bytes()
        for size in range(len(good)):
            file.write_bytes(good[:size])
            with pytest.raises(Damaged):
                ActivationStore(tmp_path / "s")[:]
        file.unlink()
        with pytest.raises(Damaged, match="missing|closed"):
            ActivationStore(tmp_path / "s")[:]
        assert not check(tmp_path / "s").ok
        for stranger in [tmp_path / "other" / file.name, *(f for f in files if f.suffix == file.suffix and f != file)]:
            if stranger.exists():
                shutil.copy(stranger, file)
                with pytest.raises(Damaged):
                    ActivationStore(tmp_path / "s")[:]
        file.write_bytes(good)
    assert torch.equal(raw(ActivationStore(tmp_path / "s")[:]), raw(x))


def test_bits_that_flip_after_opening_are_detected_before_they_are_returned(tmp_path):
    write(tmp_path, torch.randn(100, 8), block_bytes=256)
    store = ActivationStore(tmp_path)
    assert store[3].shape == (8,)
    file = tmp_path / "shard-000000.data"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert store[50].shape == (8,)
    with pytest.raises(Damaged, match="shard-000000.data"):
        store[99]


def test_name_binds_what_made_it(tmp_path):
    made = {"model": "m@1", "site": "layers.0", "tokens": "ab"}
    root = tmp_path / store_name(made)
    with ActivationWriter(root, 2, "float32", made) as writer:
        writer.append(torch.ones(3, 2))
    assert ActivationStore(root, made_from=dict(reversed(made.items()))).name == root.name
    with pytest.raises(BadInput, match="not named after"):
        ActivationWriter(root, 2, "float32", {**made, "site": "layers.1"})
    with pytest.raises(BadInput, match=r"site: was 'layers.0', now 'layers.1'"):
        ActivationStore(root, made_from={**made, "site": "layers.1"})
    moved = tmp_path / store_name({"model": "other"})
    root.rename(moved)
    with pytest.raises(Damaged, match="renamed or swapped"):
        ActivationStore(moved)


def test_bad_input(tmp_path):
    with ActivationWriter(tmp_path / "s", 4, torch.float32, {"a": 1}) as writer:
        bad_rows = {
            "width 4": torch.ones(2, 3),
            "convert": torch.ones(2, 4).double(),
            "list": [1],
            "shape": torch.tensor(1.0),
        }
        for why, bad in bad_rows.items():
            with pytest.raises(BadInput, match=why):
                writer.append(bad)
        writer.append(torch.ones(2, 4))
        with pytest.raises(BadInput, match="process"):
            ActivationWriter(tmp_path / "s", 4, torch.float32, {"a": 1})
    with pytest.raises(BadInput, match="closed"):
        writer.append(torch.ones(1, 4))
    with pytest.raises(BadInput, match="keeps rows of 4 float32"):
        ActivationWriter(tmp_path / "s", 5, torch.float32, {"a": 1})
    with pytest.raises(BadInput, match="a: was 1, now 2"):
        ActivationWriter(tmp_path / "s", 4, torch.float32, {"a": 2})
    with pytest.raises(Unsupported, match="complex64"):
        ActivationWriter(tmp_path / "c", 4, torch.complex64, {})
    with pytest.raises(BadInput, match="d=0"):
        ActivationWriter(tmp_path / "c", 0, torch.float32, {})
    with pytest.raises(BadInput, match="JSON"):
        ActivationWriter(tmp_path / "c", 1, torch.float32, {"x": torch})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(BadInput, match="thesis.tex"):
        ActivationWriter(tmp_path / "mine", 4, torch.float32, {})
    store = ActivationStore(tmp_path / "s")
    for bad in (2, torch.tensor([0, 5]), torch.tensor([-3])):
        with pytest.raises(BadInput, match="not among the 2 rows"):
            store[bad]
    with pytest.raises(BadInput, match="int64"):
        store[torch.ones(2)]
    with pytest.raises(BadInput, match="start_step"):
        store.batches(1, 0, -1)
    with pytest.raises(BadInput, match="no activation store"):
        ActivationStore(tmp_path / "nowhere")


def test_a_closed_store_can_be_continued(tmp_path):
    x = torch.randn(30, 3)
    for a, b in itertools.pairwise([0, 5, 5, 17, 30]):
        write(tmp_path, x[a:b], block_bytes=48, shard_bytes=96)
    assert torch.equal(ActivationStore(tmp_path)[:], x) and check(tmp_path).ok


def test_readers_see_a_consistent_prefix_while_a_writer_writes(tmp_path):
    x = torch.randn(200, 3)
    with ActivationWriter(tmp_path, 3, "float32", {}, block_bytes=60, shard_bytes=240) as writer:
        early = None
        for i, row in enumerate(x):
            writer.append(row)
            if i % 7 == 0:
                store = ActivationStore(tmp_path)
                assert not store.closed and torch.equal(store[:], x[: i + 1])
                early = early or store
        assert torch.equal(early[:], x[:1])
        assert early.refresh() == 200 and torch.equal(early[:], x)


WRITER = """
import sys, time, torch
from rarefy.store.fs import FS
from rarefy.store.shards import ActivationWriter
class Slow(FS):                                     # so that the reader looks between any two operations
    pass
for name in ("append", "write", "rename", "remove", "truncate", "sync", "sync_dir"):
    def operation(self, path, *rest, name=name):
        getattr(FS, name)(self, path, *rest)
        time.sleep(0.001)
    setattr(Slow, name, operation)
x = torch.arange(9000.0).view(3000, 3)
for stop in (1000, 2000, 3000):                     # closed and taken up again twice
    with ActivationWriter(sys.argv[1], 3, "float32", {"a": 1}, block_bytes=60, shard_bytes=1200, fs=Slow()) as writer:
        while writer.rows < stop:
            writer.append(x[writer.rows : min(stop, writer.rows + 1 + writer.rows % 7 + 150 * (writer.rows % 5 == 0))])
"""


@pytest.mark.slow
def test_readers_beside_a_writing_process_see_a_growing_prefix(tmp_path):
    """A9 with a real second process: opening, refreshing and reading as fast as can be while rows, shards and closed.json come and go."""
    root, x = tmp_path / "s", torch.arange(9000.0).view(3000, 3)
    with ActivationWriter(root, 3, "float32", {"a": 1}, block_bytes=60, shard_bytes=1200) as writer:
        writer.append(x[:1])
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(root)], env={**os.environ, "PYTHONPATH": str(Path(rarefy.__file__).parents[1])})
    try:
        kept, seen, sizes = ActivationStore(root), 1, set()
        while child.poll() is None:
            with ActivationStore(root) as store:
                assert len(store) >= seen and torch.equal(store[:], x[: len(store)])
                seen = len(store)
            assert torch.equal(kept[:], x[: len(kept)])
            assert kept.refresh() >= seen
            seen = len(kept)
            sizes.add(seen)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 0 and len(sizes) > 20
    assert kept.refresh() == 3000 and torch.equal(kept[:], x) and kept.closed


def test_reading_memory_is_bounded_by_block_and_cache(tmp_path):
    """Measured, not only counted: a pass over 40 MB in a cache of 256 kB."""
    write(tmp_path, torch.zeros(160_000, 64), block_bytes=4096)
    store = ActivationStore(tmp_path, cache_bytes=1 << 18)
    tracemalloc.start()
    try:
        for start in range(0, 160_000, 100):
            store[start : start + 100]
            assert store._held <= 1 << 18 and sum(b.nbytes for b in store._blocks.values()) == store._held
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 << 20  # the cache, one block and the shard's checksums (16 bytes a block)
