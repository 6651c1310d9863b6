"""Checkpoints, logs, methods and locks when the process dies or the disk refuses (T1, T3, T4, T5)."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import rarefy
from rarefy.errors import BadInput, Damaged, Unsupported
from rarefy.store.atomic import write_atomic
from rarefy.store.check import check
from rarefy.store.checkpoint import checkpoints, diff_meta, load_checkpoint, save_checkpoint
from rarefy.store.fs import FS
from rarefy.store.lines import append_line, read_lines, to_lines
from rarefy.store.lock import RunLock
from rarefy.store.run import Run, read_run

SOURCE = str(Path(rarefy.__file__).parents[1])
OPERATIONS = ("write", "append", "truncate", "sync", "sync_dir", "mkdir", "rename", "remove", "rmtree")


class Cut(BaseException):
    """The death of the process: no handler of the code under test may run its repairs."""


class FailingFS(FS):
    """Does the operation number `at` half (writes) or not at all, then stops with `error`."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.at, self.error, self.count = at, error, 0


def _failing(name):
    def operation(self, path, *rest):
        self.count += 1
        dead = isinstance(self.error, Cut) and self.count > self.at
        if self.count == self.at or dead:
            if name in ("write", "append") and self.count == self.at:
                getattr(FS, name)(self, path, bytes(rest[0])[: len(rest[0]) // 2])
            if name == "rmtree" and self.count == self.at and os.listdir(path):
                os.unlink(Path(path) / sorted(os.listdir(path))[0])
            raise self.error
        return getattr(FS, name)(self, path, *rest)

    return operation


for _name in OPERATIONS:
    setattr(FailingFS, _name, _failing(_name))


def value(step):
    return {"w": torch.full((3,), float(step)), "n": torch.tensor(step)}


def run_until_cut(root, at, error):
    """Save 10, 20, 30, 40 until the disk stops; the last acknowledged step, and whether it stopped."""
    fs, acked = FailingFS(at, error), None
    try:
        for step in (10, 20, 30, 40):
            save_checkpoint(root, step, value(step), {"s": step}, fs=fs)
            acked = step
    except (Cut, BadInput):
        return acked, True
    return acked, False


def assert_whole(found, at_least):
    if found is None:
        assert at_least is None
        return
    assert at_least is None or found.step >= at_least
    assert found.meta == {"s": found.step} and torch.equal(found.tensors["w"], value(found.step)["w"])


def test_cut_at_every_operation_keeps_the_last_acknowledged_checkpoint(tmp_path):
    at, stopped = 0, True
    while stopped:
        at += 1
        root = tmp_path / str(at)
        acked, stopped = run_until_cut(root, at, Cut())
        found = load_checkpoint(root)
        assert_whole(found, acked)
        assert not found or not found.skipped
        save_checkpoint(root, 50, value(50), {"s": 50})
        assert load_checkpoint(root).step == 50
        assert not [n for n in os.listdir(root) if n.startswith(".")]
    assert at > 35


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
def test_a_refusing_disk_gives_one_clear_line_and_keeps_what_was_there(tmp_path, code):
    at, stopped = 0, True
    while stopped:
        at += 1
        root = tmp_path / str(at)
        acked, stopped = run_until_cut(root, at, OSError(code, os.strerror(code)))
        assert_whole(load_checkpoint(root), acked)
    fs = FailingFS(3, OSError(code, os.strerror(code)))
    with pytest.raises(BadInput, match=os.strerror(code)) as caught:
        save_checkpoint(tmp_path / "1", 60, value(60), {}, fs=fs)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


CHILD = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv[3])
from test_checkpoint_kill import FailingFS, save_checkpoint, value
class Killer(BaseException):
    pass
fs = FailingFS(int(sys.argv[2]), Killer())
try:
    for step in (10, 20, 30):
        save_checkpoint(sys.argv[1], step, value(step), {"s": step}, fs=fs)
        os.write(1, f"{step} ".encode())
except Killer:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_sigkill_at_every_operation(tmp_path):
    at = 0
    while True:
        at += 1
        command = [sys.executable, "-c", CHILD, str(tmp_path / str(at)), str(at), str(Path(__file__).parent)]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": SOURCE}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        acked = [int(s) for s in done.stdout.split()]
        assert_whole(load_checkpoint(tmp_path / str(at)), acked[-1] if acked else None)
        if done.returncode == 0:
            break
    assert at > 25


def test_keeps_two_skips_damaged_and_says_so(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, value(step), {"s": step})
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000000000002", "step-000000000003"]
    file = tmp_path / "step-000000000003" / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    found = load_checkpoint(tmp_path)
    assert found.step == 2 and len(found.skipped) == 1 and "step-000000000003" in found.skipped[0]
    assert any("step-000000000003" in p for p in check(tmp_path).problems)
    save_checkpoint(tmp_path, 3, value(3), {"s": 3})
    found = load_checkpoint(tmp_path)
    assert found.step == 3 and found.skipped == []
    for folder in checkpoints(tmp_path):
        (folder / "manifest.json").unlink()
    with pytest.raises(Damaged, match="no readable checkpoint"):
        load_checkpoint(tmp_path)


def test_every_flipped_bit_of_a_checkpoint_is_detected(tmp_path):
    save_checkpoint(tmp_path, 1, value(1), {"s": 1})
    for file in sorted((tmp_path / "step-000000000001").iterdir()):
        good = file.read_bytes()
        for bit in range(0, len(good) * 8, 3):
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            file.write_bytes(bad)
            with pytest.raises(Damaged):
                load_checkpoint(tmp_path)
        file.write_bytes(good)
    assert load_checkpoint(tmp_path).step == 1


def test_any_tensor_state_round_trips(tmp_path):
    base = torch.randn(4, 6)
    tensors = {
        "shared a": base,
        "shared/b": base,
        "transposed": base.T,
        "view": base[1:, ::2],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "bf16": base.bfloat16(),
        "half": base.half(),
        "bool": base > 0,
        "rng": torch.get_rng_state(),
        "nan": torch.tensor([float("nan"), float("inf")]),
        "parameter": torch.nn.Parameter(base),
        "i64": torch.tensor([2**62]),
    }
    save_checkpoint(tmp_path, 0, tensors, {"nested": {"x": [1, None, "é"]}})
    found = load_checkpoint(tmp_path)
    assert found.tensors.keys() == tensors.keys() and found.meta == {"nested": {"x": [1, None, "é"]}}
    for name, tensor in tensors.items():
        got = found.tensors[name]
        assert got.dtype == tensor.dtype and got.shape == tensor.shape
        assert torch.equal(torch.nan_to_num(got.double()), torch.nan_to_num(tensor.detach().double()))
    safetensors = pytest.importorskip("safetensors.torch")
    peer = safetensors.load_file(tmp_path / "step-000000000000" / "tensors.safetensors")
    assert all(torch.equal(peer[k].nan_to_num(), v.detach().nan_to_num()) for k, v in tensors.items())


def test_checkpoint_refuses_bad_input(tmp_path):
    assert load_checkpoint(tmp_path / "none") is None
    for bad in ({"step": -1}, {"step": 1.0}, {"keep": 0}):
        with pytest.raises(BadInput, match="step="):
            save_checkpoint(tmp_path, **{"step": 1, "tensors": {}, "meta": {}, **bad})
    with pytest.raises(BadInput, match="JSON"):
        save_checkpoint(tmp_path, 1, {}, {"x": torch.ones(1)})
    with pytest.raises(BadInput, match="w is a list"):
        save_checkpoint(tmp_path, 1, {"w": [1]}, {})
    with pytest.raises(Unsupported, match="complex"):
        save_checkpoint(tmp_path, 1, {"w": torch.ones(1, dtype=torch.complex64)}, {})


def test_diff_meta_names_each_difference():
    old = {"recipe": {"lr": 0.1, "betas": [0.9, 0.99]}, "gone": 1, "flag": True, "same": (1, 2)}
    new = {"recipe": {"lr": 0.2, "betas": [0.9, 0.999]}, "new": 2, "flag": 1, "same": [1, 2]}
    assert diff_meta(old, new) == [
        "flag: was True, now 1",
        "gone: was 1, now absent",
        "new: was absent, now 2",
        "recipe.betas[1]: was 0.99, now 0.999",
        "recipe.lr: was 0.1, now 0.2",
    ]
    assert diff_meta(old, old) == []


def test_lines_drop_a_torn_end_and_go_on(tmp_path):
    path = tmp_path / "log.jsonl"
    for i in range(3):
        append_line(path, {"i": i, "bad": float("nan")})
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        kept = whole[:size].count(b"\n")
        assert [r["i"] for r in read_lines(path)] == list(range(kept))
        append_line(path, {"i": 9})
        assert [r["i"] for r in read_lines(path)] == [*range(kept), 9]
    path.write_bytes(to_lines([{"a": 1}]) + b"not json\n" + to_lines([{"a": 2}]))
    with pytest.raises(Damaged, match="line 2"):
        read_lines(path)
    assert "line 2" in check(path).problems[0]
    assert json.loads(to_lines([{"x": float("inf")}]))["x"] is None
    for bad in ({}, {"seal": 1}):
        with pytest.raises(BadInput, match="seal"):
            append_line(path, bad)
    with pytest.raises(BadInput):
        append_line(path, {"x": object()})
    with pytest.raises(BadInput, match="not exist"):
        read_lines(tmp_path / "none.jsonl")


def test_atomic_write_is_old_or_new(tmp_path):
    path = tmp_path / "f"
    write_atomic(path, b"old")
    for at in range(1, 5):
        for error in (Cut(), OSError(errno.ENOSPC, "No space left on device")):
            with pytest.raises((Cut, BadInput)):
                write_atomic(path, b"new!", FailingFS(at, error))
            assert path.read_bytes() in (b"old", b"new!")
            path.write_bytes(b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_second_process_is_refused_and_death_frees_the_lock(tmp_path):
    held = "import sys,time; from rarefy.store.lock import RunLock; RunLock(sys.argv[1]).__enter__(); print('held', flush=True); time.sleep(60)"
    child = subprocess.Popen(
        [sys.executable, "-c", held, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": SOURCE},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout.readline().strip() == "held"
        with pytest.raises(BadInput, match=f"process {child.pid}"), RunLock(tmp_path):
            pass
        with pytest.raises(BadInput, match="being written"), Run(tmp_path, {}):
            pass
    finally:
        child.kill()
        child.communicate()
    with RunLock(tmp_path), pytest.raises(BadInput, match="being written"), RunLock(tmp_path):
        pass
    with RunLock(tmp_path):
        pass


def test_run_is_taken_up_and_foreign_or_changed_ones_are_refused(tmp_path):
    made = {"command": "fit", "request": {"steps": 5, "lr": 0.1}, "seed": 0}
    with Run(tmp_path / "r", made) as run:
        assert not run.resumed
    assert check(tmp_path / "r").checked == [str(tmp_path / "r" / "run.json")]
    manifest = read_run(tmp_path / "r")
    assert manifest["made"] == made and manifest["versions"]["torch"] and manifest["hardware"]["cores"]
    with Run(tmp_path / "r", made) as run:
        assert run.resumed
    changed = {**made, "request": {"steps": 9, "lr": 0.1}}
    with pytest.raises(BadInput, match=r"request.steps: was 5, now 9"), Run(tmp_path / "r", changed):
        pass
    with Run(tmp_path / "r", changed, may_change=["request.steps"]):
        pass
    assert read_run(tmp_path / "r")["made"] == changed
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_text("x")
    with pytest.raises(BadInput, match="photo.jpg"), Run(tmp_path / "mine", made):
        pass
    assert os.listdir(tmp_path / "mine") == ["photo.jpg"]
    with pytest.raises(BadInput, match="is a file"), Run(tmp_path / "mine" / "photo.jpg", made):
        pass
    with pytest.raises(BadInput, match="nothing that rarefy wrote"):
        check(tmp_path / "mine")
    (tmp_path / "r" / "run.json").write_text(textwrap.dedent("{}"))
    with pytest.raises(Damaged, match="run.json"), Run(tmp_path / "r", made):
        pass
