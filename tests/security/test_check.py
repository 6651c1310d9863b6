"""`rarefy check` on a run as the commands leave it: clean, and any damaged byte is noticed; hostile folders cost nothing (A2, A7, U4)."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xxhash

import rarefy
from rarefy.errors import BadInput, Damaged, RarefyError
from rarefy.store.check import check
from rarefy.store.checkpoint import load_checkpoint, save_checkpoint
from rarefy.store.lines import append_line, read_lines
from rarefy.store.run import Run, read_run
from rarefy.store.sealed import check_page, seal, seal_page, unseal
from rarefy.store.shards import ActivationStore, ActivationWriter
from rarefy.ui import read_report

sys.path.insert(0, str(Path(__file__).parent))
from real_run import make_run  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("real"))


def files(run):
    return [p for p in sorted(run.rglob("*")) if p.is_file() and p.name != ".lock"]


def test_a_run_of_every_kind_of_file_is_clean(run):
    report = check(run)
    assert report.ok and len(report.checked) >= 9
    kinds = {"run.json", "log.jsonl", "points.jsonl", "report.json", "errors.json", "report.html", "store.json", "closed.json", "manifest.json"}
    kinds |= {"method.json", "tensors.safetensors", "shard-000000.data", "shard-000000.index"}
    assert {p.name for p in files(run)} == kinds  # a new kind of file must be protected too, and named here


def test_a_damaged_byte_anywhere_is_noticed(run):
    lottery, tried = random.Random(3), 0
    for file in files(run):
        good = file.read_bytes()
        ends = [*range(0, min(24, len(good)), 3), *range(max(0, len(good) - 64), len(good), 5), len(good) - 1]
        for at in {*ends, *(lottery.randrange(len(good)) for _ in range(12))}:
            bad = bytearray(good)
            bad[at] ^= 1 << lottery.randrange(8)
            file.write_bytes(bad)
            problems = check(run).problems
            assert problems and str(file.parent) in problems[0], f"byte {at} of {file}"
            tried += 1
        file.write_bytes(good)
    assert tried > 350 and check(run).ok


def test_a_shortened_file_is_noticed(run):
    for file in files(run):
        good = file.read_bytes()
        for size in {0, 1, len(good) // 2, len(good) - 1}:
            file.write_bytes(good[:size])
            # a log may end in a torn line and may be shorter than it was: that is what a crash leaves
            assert not check(run).ok or file.suffix == ".jsonl", f"{file} cut to {size}"
        file.write_bytes(good)


def test_a_missing_file_of_a_store_checkpoint_or_method_is_noticed(run):
    for file in files(run):
        if file.parent == run or file.name == "closed.json":
            continue
        file.rename(file.with_name(".hidden"))
        assert not check(run).ok, file
        file.with_name(".hidden").rename(file)
    assert check(run).ok


def test_what_is_damaged_is_not_used(run, tmp_path):
    """The readers, not only `check`, refuse."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    store = next((copy / "activations").iterdir())
    readers = {
        "run.json": lambda f: read_run(copy),
        "log.jsonl": read_lines,
        "points.jsonl": lambda f: rarefy.Frontier.load(f),
        "report.json": lambda f: read_report(copy),
        "errors.json": lambda f: unseal(f.read_bytes(), f),
        "report.html": check_page,
        "store.json": lambda f: ActivationStore(store),
        "closed.json": lambda f: ActivationStore(store),
        "shard-000000.data": lambda f: ActivationStore(store)[:],
        "shard-000000.index": lambda f: ActivationStore(store),
        "manifest.json": lambda f: load_checkpoint(copy / "checkpoints"),
    }
    for file in files(copy):
        good = file.read_bytes()
        file.write_bytes(good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 4]) + good[len(good) // 2 + 1 :])
        read = readers.get(file.name) or (lambda f: rarefy.load(f.parent) if "methods" in f.parts else load_checkpoint(copy / "checkpoints"))
        with pytest.raises(Damaged):
            read(file)
        file.write_bytes(good)


def test_a_flipped_newline_is_noticed_and_a_torn_line_forgiven(tmp_path):
    log = tmp_path / "log.jsonl"
    for step in range(3):
        append_line(log, {"step": step})
    good = log.read_bytes()
    for at, byte in enumerate(good):
        for bit in range(8):
            log.write_bytes(good[:at] + bytes([byte ^ 1 << bit]) + good[at + 1 :])
            with pytest.raises(Damaged, match="line"):
                read_lines(log)
    for size in range(len(good)):
        log.write_bytes(good[:size])
        assert len(read_lines(log)) == good[:size].count(b"\n")


def test_a_line_can_be_taken_out_by_hand(tmp_path):
    log = tmp_path / "points.jsonl"
    for n in range(3):
        append_line(log, {"n": n})
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(lines[0] + lines[2])
    assert [r["n"] for r in read_lines(log)] == [0, 2]


HANG = """
import sys
from rarefy.errors import RarefyError
from rarefy.store.check import check
from rarefy.store.checkpoint import load_checkpoint
from rarefy.store.methods import load
from rarefy.store.shards import ActivationStore
from pathlib import Path
for folder in sys.argv[1:]:
    print(folder, flush=True)
    assert check(folder).problems, "nothing noticed"
    for use in (load_checkpoint, load, lambda p: ActivationStore(p)[:]):
        for below in ("store", "points", "method"):
            try:
                use(Path(folder) / below)
            except RarefyError:
                pass
print("all")
"""


def bounded(folders, seconds=30, megabytes=3000):
    """Look at hostile folders in a process that may neither hang nor grow; gives the last folder looked at."""
    import resource

    limit = megabytes << 20
    return subprocess.run(
        [sys.executable, "-c", HANG, *map(str, folders)], capture_output=True, text=True, timeout=seconds,
        env={**os.environ, "PYTHONPATH": str(Path(rarefy.__file__).parents[1])},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pipe", "endless", "folder", "huge"])
def test_what_is_no_file_is_refused(tmp_path, kind):
    """A pipe would make the reader wait, a device never ends, a sparse file claims more than there is memory."""

    def put(path):
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "endless":
            path.symlink_to("/dev/zero")
        else:
            path.write_bytes(b"x")
            os.truncate(path, 1 << 42)

    base = tmp_path / "all"
    base.mkdir()
    with ActivationWriter(base / "store", 2, "float32", {"a": 1}) as writer:
        writer.append(torch.ones(2, 2))
    save_checkpoint(base / "points", 1, {"w": torch.ones(3)}, {})
    with Run(base / "run", {"command": "fit"}):
        append_line(base / "run" / "log.jsonl", {"a": 1})
    (base / "run" / "report.json").write_bytes(seal({"schema": 1}))
    (base / "run" / "report.html").write_bytes(seal_page(b"<head><title>t</title></head>"))
    assert check(base).ok
    broken = []
    for file in files(base):
        # a link directly in a run is not followed, and a folder there is none of the run's files
        if file.parent.name != "run" or kind in ("pipe", "huge"):
            broken.append(Path(shutil.copytree(base, tmp_path / f"{len(broken)}")))
            put(broken[-1] / file.relative_to(base))
    done = bounded(broken)
    assert done.returncode == 0 and done.stdout.endswith("all\n"), f"{kind}: {done.stdout[-200:]} {done.stderr[-500:]}"


def test_a_deep_tree_is_walked(tmp_path):
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(1200):
            os.mkdir("d")
            os.chdir("d")
        Path("log.jsonl").write_text("nonsense\n")
    finally:
        os.chdir(here)
    assert any("log.jsonl" in p for p in check(tmp_path).problems)
    subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)


def test_names_and_texts_from_outside_are_printed_harmlessly(tmp_path):
    evil = "\x1b]0;owned\x07\u202eq\n"
    for name in (f"{evil}.jsonl".encode(), b"\xff\xfe.jsonl"):
        (tmp_path / os.fsdecode(name)).write_text("nonsense\n")
    with Run(tmp_path / "r", {}):
        pass
    for name in os.listdir(tmp_path):
        if name.endswith(".jsonl"):
            shutil.copy(tmp_path / name, tmp_path / "r" / name)
    problems = check(tmp_path / "r").problems
    assert len(problems) == 2 and all(p.isprintable() and p.encode("utf-8") for p in problems)
    for kind in (BadInput, Damaged, RarefyError):
        assert str(kind(f"tensor {evil} \ud800")) == "tensor \\x1b]0;owned\\x07\\u202eq\\n \\ud800"


def sealed(body):
    return body + b',\n "seal": "' + xxhash.xxh3_128_hexdigest(body).encode() + b'"\n}\n'


@pytest.mark.parametrize(("old", "new"), [
    (b'"a": 1', b'"a": 1e999'),
    (b'"a": 1', b'"a": -1e400'),
    (b'"rarefy-activations"', b'"' + b"x" * 3_000_000 + b'"'),
    (b'"version": 1', b'"version": "' + b"9" * 3_000_000 + b'"'),
    (b'"rarefy-activations"', b'"\\u001b[2J\\ud800"'),
])
def test_soundly_sealed_nonsense_is_refused_in_one_short_line(tmp_path, old, new):
    with ActivationWriter(tmp_path, 2, "float32", {"a": 1}) as writer:
        writer.append(torch.ones(2, 2))
    body = (tmp_path / "store.json").read_bytes()[:-48]
    assert old in body
    (tmp_path / "store.json").write_bytes(sealed(body.replace(old, new)))
    with pytest.raises(Damaged) as caught:
        ActivationStore(tmp_path)
    assert len(str(caught.value)) < 500 and str(caught.value).isprintable()
