"""Hostile stores, tensors and methods fail closed, fast and in little memory (A7, C2, U4)."""

from __future__ import annotations

import hashlib
import json
import os
import struct

import pytest
import torch
from torch import nn

from bounds import Bounds
from rarefy.cost import Cost
from rarefy.errors import BadInput, Damaged, RarefyError
from rarefy.method import Sparse, positive
from rarefy.store.check import check
from rarefy.store.layout import read_layout, store_name
from rarefy.store.methods import load, save
from rarefy.store.sealed import seal, unseal
from rarefy.store.shards import ActivationStore, ActivationWriter
from rarefy.store.tensors import from_bytes, to_bytes


class Toy(Sparse):
    """A method small enough to attack."""

    name, unit, fitted = "test/toy", "weight", "none"

    def __init__(self, d: int, scale: float = 1.0) -> None:
        super().__init__()
        positive("d", d)
        self.weight = nn.Parameter(torch.randn(d, d) * scale)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def cost(self, density=None):
        return Cost(0, 0)


@pytest.fixture
def bounded():
    """One second and 100 MB for the attack inside, without tracing."""
    return Bounds(4, 100e6, 200e6)


def store(root, n=10):
    with ActivationWriter(root, 3, "float32", {"a": 1}, block_bytes=24, shard_bytes=48) as writer:
        writer.append(torch.randn(n, 3))
    return root


def reseal(path, **changes):
    document = {**unseal(path.read_bytes(), path), **changes}
    document.pop("seal", None)
    path.write_bytes(seal(document))


@pytest.mark.parametrize(
    "changes",
    [
        {"d": 2**63},
        {"d": -1},
        {"d": 0},
        {"d": True},
        {"d": "3"},
        {"d": 3.0},
        {"block_rows": 0},
        {"block_rows": 2**63},
        {"block_rows": 3},
        {"shard_rows": 2**62},
        {"shard_rows": -4},
        {"dtype": "object"},
        {"dtype": ["float32"]},
        {"dtype": "float64"},
        {"id": "../../../../etc/passwd"},
        {"id": "0" * 32},
        {"made_from": []},
        {"made_from": {"a": 2}},
        {"version": 2},
        {"format": "x"},
        {"d": 2**39, "block_rows": 1, "shard_rows": 1},
        {"block_rows": 1, "shard_rows": 1},
        {"name": "acts-" + "0" * 32},
    ],
)
def test_hostile_store_header(tmp_path, bounded, changes):
    store(tmp_path / "s")
    reseal(tmp_path / "s" / "store.json", **changes)
    with bounded, pytest.raises(Damaged):
        ActivationStore(tmp_path / "s")[:]
    assert not check(tmp_path / "s").ok


@pytest.mark.parametrize("rows", [-1, 2**63, 2**60, 11, 10**9])
def test_hostile_row_count(tmp_path, bounded, rows):
    store(tmp_path / "s")
    reseal(tmp_path / "s" / "closed.json", rows=rows)
    with bounded, pytest.raises(Damaged, match="closed"):
        ActivationStore(tmp_path / "s")


def test_index_with_forged_records(tmp_path, bounded):
    """Records whose own checksums hold but that go backwards, repeat, skip or claim absent rows."""
    store(tmp_path / "s")
    layout = read_layout(tmp_path / "s")
    path = tmp_path / "s" / "shard-000002.index"
    for rows in ([0], [1, 1], [2, 1], [4], [1, 4], [5], [2**62], [2, 3, 4]):
        path.write_bytes(b"".join(layout.record(2, r, 0, True) for r in rows))
        with bounded, pytest.raises(Damaged):
            ActivationStore(tmp_path / "s")[:]
        assert not check(tmp_path / "s").ok


def test_index_of_a_million_entries_and_sparse_files(tmp_path, bounded):
    store(tmp_path / "s")
    for name, size in (("shard-000002.index", 32 * 10**6), ("shard-000002.index", 2**40), ("store.json", 2**40)):
        good = (tmp_path / "s" / name).read_bytes()
        os.truncate(tmp_path / "s" / name, size)
        with bounded, pytest.raises(Damaged):
            ActivationStore(tmp_path / "s")
        (tmp_path / "s" / name).write_bytes(good)
    (tmp_path / "s" / "shard-999999.data").write_bytes(b"")
    with bounded, pytest.raises(Damaged, match="missing"):
        ActivationStore(tmp_path / "s")


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": 1, "a": 2',
        b'{"a": NaN',
        b'{"a": ' + b"9" * 10_000,
        b"\xff\xfe",
        b'"x"',
        b"",
    ],
)
def test_hostile_json(tmp_path, bounded, text):
    import xxhash

    store(tmp_path / "s")
    data = text + b',\n "seal": "' + xxhash.xxh3_128_hexdigest(text).encode() + b'"\n}\n'
    for bad in (data, text):
        (tmp_path / "s" / "store.json").write_bytes(bad)
        with bounded, pytest.raises(Damaged, match="store.json"):
            ActivationStore(tmp_path / "s")


def test_links_are_not_followed(tmp_path):
    store(tmp_path / "s")
    data = tmp_path / "s" / "shard-000001.data"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Damaged, match="shard-000001"):
        ActivationStore(tmp_path / "s")[:]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "loop").symlink_to(tmp_path / "run")
    (tmp_path / "run" / "out").symlink_to("/")
    with pytest.raises(BadInput, match="nothing"):
        check(tmp_path / "run")


def test_foreign_files_are_reported(tmp_path):
    store(tmp_path / "s")
    (tmp_path / "s" / "evil.pkl").write_bytes(b"x")
    assert any("evil.pkl" in p for p in check(tmp_path / "s").problems)


def tensor_file(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def one(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE_TENSORS = {
    "empty file": b"",
    "short": b"\x01",
    "huge header": struct.pack("<Q", 2**63) + b"{}",
    "header beyond": struct.pack("<Q", 99) + b"{}",
    "2^63 rows": tensor_file({"w": one([2**63], [0, 4])}, b"abcd"),
    "product overflows": tensor_file({"w": one([2**32] * 4, [0, 0])}),
    "negative": tensor_file({"w": one([1], [-4, 0])}),
    "negative shape": tensor_file({"w": one([-1, -1], [0, 4])}, b"abcd"),
    "overlap": tensor_file({"a": one([1], [0, 4]), "b": one([1], [0, 4])}, b"abcd"),
    "gap": tensor_file({"a": one([1], [4, 8])}, b"abcdabcd"),
    "beyond the end": tensor_file({"a": one([2], [0, 8])}, b"abcd"),
    "bytes left over": tensor_file({"a": one([1], [0, 4])}, b"abcde"),
    "bool shape": tensor_file({"a": one([True], [0, 4])}, b"abcd"),
    "unknown dtype": tensor_file({"a": one([1], [0, 4], "OBJ")}, b"abcd"),
    "list dtype": tensor_file({"a": one([1], [0, 4], ["F32"])}, b"abcd"),
    "not an object": tensor_file(b"[1, 2, 3]"),
    "entry not an object": tensor_file({"a": 3}),
    "extra field": tensor_file({"a": {**one([0], [0, 0]), "x": 1}}),
    "deep": tensor_file(b'{"a":' * 200_000),
    "twice": tensor_file(b'{"a":1,"a":2}'),
    "many dims": tensor_file({"a": one([1] * 999, [0, 4])}, b"abcd"),
    "million entries": tensor_file(
        b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(10**6)) + b"}"
    ),
}


@pytest.mark.parametrize("case", HOSTILE_TENSORS)
def test_hostile_tensors(bounded, case):
    with bounded, pytest.raises(Damaged, match=r"x\.safetensors"):
        from_bytes(HOSTILE_TENSORS[case], "x.safetensors")


def test_method_round_trip_is_bit_exact_and_keeps_dtypes(tmp_path):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        method = Toy(5, scale=0.5).to(dtype)
        method.count += 7
        before = torch.get_rng_state()
        save(method, tmp_path / "m")
        found = load(tmp_path / "m", Toy)
        assert torch.equal(before, torch.get_rng_state())
        assert found.arguments == {"d": 5, "scale": 0.5} and not found.training and found.weight.requires_grad
        mine, theirs = method.state_dict(), found.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(mine[k].dtype == theirs[k].dtype and torch.equal(mine[k], theirs[k]) for k in mine)
    assert check(tmp_path).ok and sorted(os.listdir(tmp_path)) == ["m"]


def test_every_flipped_bit_of_a_method_is_detected(tmp_path):
    save(Toy(2), tmp_path / "m")
    for file in sorted((tmp_path / "m").iterdir()):
        good = file.read_bytes()
        for bit in range(0, len(good) * 8, 3):
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            file.write_bytes(bad)
            with pytest.raises(Damaged, match=r"method\.json|tensors"):
                load(tmp_path / "m", Toy)
        assert not check(tmp_path).ok
        file.write_bytes(good)
    (tmp_path / "m" / "tensors.safetensors").unlink()
    with pytest.raises(Damaged, match="missing"):
        load(tmp_path / "m", Toy)
    assert not check(tmp_path).ok


def forge(folder, tensors=None, **changes):
    path = folder / "method.json"
    if tensors is not None:
        data = to_bytes(tensors)
        (folder / "tensors.safetensors").write_bytes(data)
        described = {k: {"shape": list(v.shape), "dtype": str(v.dtype)[6:]} for k, v in tensors.items()}
        changes |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "tensors": described}
    reseal(path, **changes)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tensors": {"weight": torch.ones(2, 2)}}, "missing count"),
        ({"tensors": {"weight": torch.ones(2, 2), "count": torch.tensor(0), "x": torch.ones(1)}}, "extra x"),
        ({"tensors": {"weight": torch.ones(3, 3), "count": torch.tensor(0)}}, r"weight has shape \[3, 3\]"),
        ({"tensors": {"weight": torch.ones(2, 2).int(), "count": torch.tensor(0)}}, "weight is torch.int32"),
        ({"tensors": {"weight": torch.ones(2, 2), "count": torch.tensor(0.5)}}, "count is torch.float32"),
        ({"arguments": {"d": 3}}, r"weight has shape \[2, 2\]"),
        ({"arguments": {"d": -3}}, "d=-3"),
        ({"arguments": {"e": 3}}, "refuses its arguments"),
        ({"arguments": {"d": 2**20}}, "weight has shape"),
        ({"arguments": {"d": 2**62}}, "cannot be built"),
        ({"arguments": {}}, "refuses its arguments"),
        ({"arguments": [2]}, "does not describe"),
        ({"bytes": 2**62}, "altered"),
        ({"bytes": "9"}, "does not describe"),
        ({"sha256": "0"}, "does not"),
        ({"version": 99}, "version 99"),
    ],
)
def test_forged_method(tmp_path, bounded, changes, why):
    save(Toy(2), tmp_path / "m")
    forge(tmp_path / "m", **changes)
    with bounded, pytest.raises(Damaged, match=why):
        load(tmp_path / "m", Toy)


@pytest.mark.parametrize("name", ["os:system", "../toy", "test/toy", "", "latents/topk\x00", "__import__"])
def test_unknown_method_names_are_refused(tmp_path, name):
    save(Toy(2), tmp_path / "m")
    forge(tmp_path / "m", name=name)
    with pytest.raises(BadInput, match="unknown method"):
        load(tmp_path / "m")


def test_another_methods_files_are_refused(tmp_path):
    class Other(Toy):
        name = "test/other"

    save(Toy(2), tmp_path / "a")
    save(Toy(2), tmp_path / "b")
    with pytest.raises(BadInput, match="holds a 'test/toy'"):
        load(tmp_path / "a", Other)
    (tmp_path / "a" / "tensors.safetensors").write_bytes((tmp_path / "b" / "tensors.safetensors").read_bytes())
    with pytest.raises(Damaged, match="another method"):
        load(tmp_path / "a", Toy)
    with pytest.raises(BadInput, match="does not exist"):
        load(tmp_path / "none", Toy)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine.txt").write_text("x")
    with pytest.raises(BadInput, match="not a saved method"):
        save(Toy(2), tmp_path / "c")
    assert os.listdir(tmp_path / "c") == ["mine.txt"]


def test_replacing_a_method_cut_anywhere_leaves_the_old_or_the_new(tmp_path):
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1] / "crash"))
    from test_checkpoint_kill import Cut, FailingFS

    old, new = Toy(2), Toy(3)
    for at in range(1, 40):
        save(old, tmp_path / "m")
        fs = FailingFS(at, Cut())
        try:
            save(new, tmp_path / "m", fs=fs)
        except Cut:
            found = load(tmp_path / "m", Toy)
            want = old if found.arguments["d"] == 2 else new
            assert torch.equal(found.weight, want.weight)
            continue
        break
    assert 9 < at < 39 and load(tmp_path / "m", Toy).arguments["d"] == 3


def test_store_name_needs_plain_json():
    assert store_name({"b": 1, "a": [2]}) == store_name({"a": [2], "b": 1}) != store_name({"a": [2], "b": 2})
    for bad in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises(RarefyError):
            store_name(bad)
