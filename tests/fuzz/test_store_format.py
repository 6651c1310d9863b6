"""A reader written from FORMAT.md alone, without rarefy, must read what rarefy writes (promise A5) and the kept fixtures (T10)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import xxhash

FIXTURES = Path(__file__).parent / "fixtures_store_v1"


def unseal(path):
    data = path.read_bytes()
    body, tail = data[:-48], data[-48:]
    assert tail[:12] == b',\n "seal": "' and tail[44:] == b'"\n}\n'
    assert xxhash.xxh3_128(body).hexdigest().encode() == tail[12:44]
    return json.loads(body + b"\n}")


def mix(words, h):
    for w in words:
        h = (h ^ w) * 0x9E3779B97F4A7C15 % 2**64
        h ^= h >> 32
    return h


def words(data):
    return [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]


def read_store(root):
    top = unseal(root / "store.json")
    made = json.dumps(top["made_from"], sort_keys=True, separators=(",", ":")).encode()
    assert top["name"] == "acts-" + hashlib.sha256(made).hexdigest()[:32]
    dtype = getattr(torch, top["dtype"])
    row = top["d"] * torch.empty(0, dtype=dtype).element_size()
    rows, waiting, out = 0, b"", b""
    for shard in range(len(list(root.glob("shard-*.data")))):
        data = (root / f"shard-{shard:06d}.data").read_bytes()
        head = words(data[:40])
        assert (
            data[:8] == b"RAREFYA1"
            and data[8:24].hex() == top["id"]
            and head[3] == shard
            and head[4] == mix(head[:4], 0)
        )
        index = (root / f"shard-{shard:06d}.index").read_bytes()
        for i in range(0, len(index) // 32 * 32, 32):
            w = words(index[i : i + 32])
            assert w[3] == mix(w[:3], head[4])
            many = w[0] % 2**63
            first = (many - 1) // top["block_rows"] * top["block_rows"]
            block = data[40 + first * row : 40 + many * row]
            assert xxhash.xxh3_128(block).intdigest() == w[1] | w[2] << 64
            before = shard * top["shard_rows"] + many
            waiting += block[-(before - rows) * row :]
            rows = before
            if w[0] >> 63:
                out, waiting = out + waiting, b""
    if (root / "closed.json").exists():
        closed = unseal(root / "closed.json")
        assert closed["id"] == top["id"] and closed["rows"] * row == len(out)
    return torch.frombuffer(bytearray(out), dtype=torch.uint8).view(dtype).view(-1, top["d"])


def test_the_reader_is_short():
    lines = Path(__file__).read_text().split("def unseal")[1].split("def test_the_reader_is_short")[0].splitlines()
    assert len(lines) <= 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16])
@pytest.mark.parametrize("sizes", [[1], [63, 1, 111], [200], [1] * 30])
def test_reads_what_the_writer_writes(tmp_path, dtype, sizes):
    from rarefy.store.shards import ActivationWriter

    x = (torch.randn(sum(sizes), 5, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    with ActivationWriter(tmp_path, 5, dtype, {"site": "é", "n": [1, 2.5]}, block_bytes=70, shard_bytes=700) as writer:
        for piece in x.split(sizes):
            writer.append(piece)
    assert torch.equal(read_store(tmp_path), x)


def test_fixtures_of_version_1_are_read_by_both():
    from rarefy.store.check import check
    from rarefy.store.checkpoint import load_checkpoint
    from rarefy.store.shards import ActivationStore

    want = torch.arange(21 * 3).view(21, 3).to(torch.bfloat16)
    assert torch.equal(read_store(FIXTURES / "store"), want)
    assert torch.equal(ActivationStore(FIXTURES / "store")[:], want)
    point = load_checkpoint(FIXTURES / "checkpoints")
    assert (point.step, point.meta) == (7, {"lr": 0.5}) and torch.equal(point.tensors["w"], torch.arange(4.0))
    assert check(FIXTURES).problems == []
