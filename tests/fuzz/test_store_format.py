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


def read_tensors(path):
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    names, out, end = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64, "BOOL": torch.bool}, {}, 0
    for name, entry in sorted(json.loads(data[8 : 8 + n]).items(), key=lambda item: item[1]["data_offsets"]):
        assert entry["data_offsets"][0] == end
        end = entry["data_offsets"][1]
        raw = data[8 + n + entry["data_offsets"][0] : 8 + n + end]
        values = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
        out[name] = values.view(names[entry["dtype"]]).view(entry["shape"])
    assert 8 + n + end == len(data)
    return out


def read_checkpoint(folder):
    manifest = unseal(folder / "manifest.json")
    listed = manifest["files"]["tensors.safetensors"]
    data = (folder / "tensors.safetensors").read_bytes()
    assert len(data) == listed["bytes"] and xxhash.xxh3_128(data).hexdigest() == listed["xxh3_128"]
    assert folder.name[:17] == f"step-{manifest['step']:012d}"
    return manifest["step"], manifest["meta"], read_tensors(folder / "tensors.safetensors")


def read_method(folder):
    card, data = unseal(folder / "method.json"), (folder / "tensors.safetensors").read_bytes()
    assert len(data) == card["bytes"] and hashlib.sha256(data).hexdigest() == card["sha256"]
    tensors = read_tensors(folder / "tensors.safetensors")
    assert {k: {"shape": list(v.shape), "dtype": str(v.dtype)[6:]} for k, v in tensors.items()} == card["tensors"]
    return card["name"], card["arguments"], tensors


def read_log(path):
    out = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        assert line[-29:-18] == b', "seal": "' and line[-2:] == b'"}'
        assert xxhash.xxh3_64(line[:-29]).hexdigest().encode() == line[-18:-2]
        out.append(json.loads(line[:-29] + b"}"))
    return out


def check_page(path):
    before, rest = path.read_bytes().split(b'<meta name="rarefy-seal" content="', 1)
    assert rest[32:35] == b'">\n' and xxhash.xxh3_128(before + rest[35:]).hexdigest().encode() == rest[:32]


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


def test_fixtures_of_a_run_of_version_1_are_read_by_both():
    import rarefy
    from rarefy.store.lines import read_lines
    from rarefy.store.run import read_run
    from rarefy.store.sealed import check_page as checked
    from rarefy.ui import read_report

    run = FIXTURES / "run"
    name, arguments, tensors = read_method(run / "methods" / "latents__topk")
    method = rarefy.load(run / "methods" / "latents__topk")
    assert method.name == name and arguments.items() <= method.arguments.items() and method.arguments["width"] == 5     # later ones have defaults
    assert method.state_dict().keys() == tensors.keys()
    assert all(torch.equal(v, tensors[k]) and v.dtype == tensors[k].dtype for k, v in method.state_dict().items())
    assert torch.equal(method(torch.ones(1, 3)), method.reference(torch.ones(1, 3)))
    wanted = [{"step": i, "loss": 1 / (i + 1), "name": 'é "quoted"'} for i in range(3)]
    assert read_log(run / "log.jsonl") == read_lines(run / "log.jsonl") == wanted
    assert unseal(run / "run.json")["made"] == read_run(run)["made"] == {"command": "fit", "seed": 0}
    assert unseal(run / "report.json") == read_report(run) and read_report(run)["title"] == "v1 <b>"
    check_page(run / "report.html")
    checked(run / "report.html")
    step, meta, held = read_checkpoint(FIXTURES / "checkpoints" / "step-000000000007")
    assert (step, meta) == (7, {"lr": 0.5}) and torch.equal(held["w"], torch.arange(4.0))


def test_reads_what_else_is_written(tmp_path):
    """Checkpoints, methods, logs, reports and pages of today, by the readers written from the document."""
    import sys

    from rarefy.latents.topk import TopK
    from rarefy.store.checkpoint import save_checkpoint
    from rarefy.store.lines import append_line
    from rarefy.store.methods import save
    from rarefy.ui import export, write_report

    sys.path.insert(0, str(Path(__file__).parents[1] / "ui"))
    from sample import sample_report

    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "c": torch.tensor(7), "d": torch.randn(2) > 0, "e": torch.empty(0, 2)}
    save_checkpoint(tmp_path, 3, tensors, {"x": [1, None]})
    step, meta, held = read_checkpoint(tmp_path / "step-000000000003")
    assert (step, meta) == (3, {"x": [1, None]}) and all(torch.equal(held[k], v) for k, v in tensors.items() if v.numel())
    method = TopK(d_in=6, width=9, k=2)
    save(method, tmp_path / "m")
    assert all(torch.equal(read_method(tmp_path / "m")[2][k], v) for k, v in method.state_dict().items())
    append_line(tmp_path / "l.jsonl", {"a": "\u2028", "b": 1e300})
    append_line(tmp_path / "l.jsonl", {"seal of": ', "seal": "0123456789abcdef"}'})
    assert read_log(tmp_path / "l.jsonl") == [{"a": "\u2028", "b": 1e300}, {"seal of": ', "seal": "0123456789abcdef"}'}]
    report = sample_report(7)
    write_report(tmp_path, report)
    assert unseal(tmp_path / "report.json") == report
    check_page(export(report, tmp_path / "p.html"))
