"""Power cuts (T2 and what FORMAT.md says of `sync`): every legal disk state, put on a real disk and opened with the real code."""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from rarefy.cost import Cost
from rarefy.errors import BadInput, Damaged
from rarefy.method import Sparse
from rarefy.store.atomic import write_atomic
from rarefy.store.check import check
from rarefy.store.fs import FS, make_dirs
from rarefy.store.lines import append_line, read_lines
from rarefy.store.methods import load, save
from rarefy.store.shards import ActivationStore, ActivationWriter

sys.path.insert(0, str(Path(__file__).parent))
from powerloss import Recorder, states  # noqa: E402

X = torch.arange(1.0, 49.0).view(16, 3)
SMALL = {"block_bytes": 24, "shard_bytes": 72}  # 2 rows a block, 6 a shard


class Toy(Sparse):
    """One number."""

    name, unit, fitted = "test/one", "weight", "none"

    def __init__(self, value: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), float(value)))

    def cost(self, density=None):
        return Cost(0, 0)


class Hasty(FS):
    """Does not wait for the disk: what is opened after the cut is thrown away anyway."""

    def sync(self, path):
        pass

    def sync_dir(self, path):
        pass


def written(base, plan, fs=None):
    """Carry out a plan of row counts to append and "sync"; (recorder, [(operations so far, rows safe since)])."""
    fs, safe = fs or Recorder(base), []
    make_dirs(base / "s", fs)  # the lock would make it, past the recorder
    writer = ActivationWriter(base / "s", 3, "float32", {"a": 1}, fs=fs, **SMALL)
    for step in plan:
        if step == "sync":
            writer.sync()
            safe.append((len(fs.ops), writer.rows))
        else:
            writer.append(X[writer.rows : writer.rows + step])
    writer.close()
    safe.append((len(fs.ops), writer.rows))
    return fs, safe


def lost(fs, safe, folder, enough=1000):
    """(states, what went wrong in them) over all cuts, until `enough` went wrong."""
    count, wrong = 0, []
    for cut in range(1, len(fs.ops) + 1):
        must = max((rows for ops, rows in safe if ops <= cut), default=0)
        for state in states(fs.ops[:cut], 3, fs.model.root):
            if len(wrong) == enough:
                return count, wrong
            count += 1
            shutil.rmtree(folder, ignore_errors=True)
            state.dump(folder)
            problem = opened(folder / "s", must)
            if problem:
                wrong.append(f"after {cut} operations: {problem}")
    return count, wrong


def opened(root, must):
    """What is wrong with a store that a cut left; "" if a reader sees right rows or refuses and a writer goes on."""
    if (root / "store.json").exists():
        try:
            with ActivationStore(root) as store:
                if not torch.equal(store[:], X[: len(store)]):
                    return "a reader got wrong rows"
        except Damaged:
            pass
    elif must:
        return "the store is gone"
    try:
        with ActivationWriter(root, 3, "float32", {"a": 1}, fs=Hasty(), **SMALL) as writer:
            if writer.rows < must:
                return f"{writer.rows} rows, {must} were safe"
            writer.append(X[writer.rows :])
        with ActivationStore(root) as store:
            if not torch.equal(store[:], X) or not check(root).ok:
                return "wrong rows after going on"
    except (Damaged, BadInput) as error:
        return f"the writer refuses: {error}"
    return ""


PLANS = [[2, 1, "sync", 3, 5, "sync", 5], [1, "sync", 1, 1, 1, 9, 3], [16], ["sync", 4, 4, "sync", 1]]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_rows_that_were_synced_survive(tmp_path, plan):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pieces cut off
        count, wrong = lost(*written(tmp_path, plan), tmp_path / "after")
    assert wrong == [] and count > 80


class NoSync(Recorder):
    def sync(self, path):
        if path.suffix != self.leaves_out:
            super().sync(path)


class NoDataSync(NoSync):
    leaves_out = ".data"


class NoIndexSync(NoSync):
    leaves_out = ".index"


class NoDirSync(Recorder):
    def sync_dir(self, path):
        pass


@pytest.mark.parametrize("broken", [NoDataSync, NoIndexSync, NoDirSync])
def test_the_harness_notices_a_missing_sync(tmp_path, broken):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, wrong = lost(*written(tmp_path, [4, "sync", 5], broken(tmp_path)), tmp_path / "after", enough=1)
    assert wrong


def test_what_did_not_reach_the_disk_is_said_and_never_read(tmp_path):
    with ActivationWriter(tmp_path, 3, "float32", {"a": 1}, **SMALL) as writer:
        for row in X[:5]:
            writer.append(row)
    (tmp_path / "closed.json").unlink()
    data = tmp_path / "shard-000000.data"
    data.write_bytes(data.read_bytes()[:-24] + bytes(24))  # the size is there, the last two rows are zeros
    with pytest.raises(Damaged, match="altered"):
        ActivationStore(tmp_path)[:]
    with pytest.warns(UserWarning, match="2 appended pieces"), ActivationWriter(tmp_path, 3, "float32", {"a": 1}) as writer:
        assert writer.rows == 3
    assert torch.equal(ActivationStore(tmp_path)[:], X[:3])


def test_a_closed_store_is_never_cut(tmp_path):
    with ActivationWriter(tmp_path, 3, "float32", {"a": 1}, **SMALL) as writer:
        writer.append(X[:5])
    data = tmp_path / "shard-000000.data"
    for bad in (data.read_bytes()[:-1], data.read_bytes()[:-1] + b"\1"):
        data.write_bytes(bad)
        with pytest.raises(Damaged, match="shard-000000"):
            ActivationWriter(tmp_path, 3, "float32", {"a": 1})
        assert data.read_bytes() == bad


def cuts(fs, base, folder):
    for cut in range(1, len(fs.ops) + 1):
        for state in states(fs.ops[:cut], 6, fs.model.root):
            shutil.rmtree(folder, ignore_errors=True)
            state.dump(folder)
            yield cut


def test_an_atomic_write_is_the_old_or_the_new(tmp_path):
    fs, base = Recorder(tmp_path), tmp_path / "after"
    write_atomic(tmp_path / "f", b"old!", fs)
    first = len(fs.ops)
    write_atomic(tmp_path / "f", b"new!!", fs)
    seen = set()
    for cut in cuts(fs, tmp_path, base):
        found = (base / "f").read_bytes() if (base / "f").exists() else None
        seen.add(found)
        assert found in (None, b"old!", b"new!!") and (found is not None or cut < first)
        assert found == b"new!!" or cut < len(fs.ops)
    assert seen == {None, b"old!", b"new!!"}


def test_lines_of_a_log_survive_and_it_goes_on(tmp_path):
    fs, base, acked = Recorder(tmp_path), tmp_path / "after", []
    for number in range(4):
        append_line(tmp_path / "log.jsonl", {"n": number}, fs)
        acked.append(len(fs.ops))
    for cut in cuts(fs, tmp_path, base):
        must = sum(ops <= cut for ops in acked)
        found = read_lines(base / "log.jsonl") if (base / "log.jsonl").exists() else []
        assert len(found) >= must and [r["n"] for r in found] == list(range(len(found)))
        append_line(base / "log.jsonl", {"n": len(found)}, Hasty())
        assert [r["n"] for r in read_lines(base / "log.jsonl")] == list(range(len(found) + 1))


def test_a_method_saved_over_another_is_the_old_or_the_new(tmp_path):
    fs, base = Recorder(tmp_path), tmp_path / "after"
    save(Toy(1), tmp_path / "m", fs=fs)
    first = len(fs.ops)
    save(Toy(2), tmp_path / "m", fs=fs)
    count = 0
    for cut in cuts(fs, tmp_path, base):
        count += 1
        if cut >= first:
            value = load(base / "m", Toy).weight[0].item()
            assert value in (1.0, 2.0) and (value == 2.0 or cut < len(fs.ops))
    assert count > 60


def test_the_recorder_does_what_the_disk_does(tmp_path):
    """The model beside the real disk ends with the same bytes."""
    fs, _ = written(tmp_path, PLANS[0])
    fs.model.dump(tmp_path / "twin")
    for path in sorted((tmp_path / "s").iterdir()):
        assert path.name == ".lock" or (tmp_path / "twin" / "s" / path.name).read_bytes() == path.read_bytes()
    assert isinstance(fs, FS)
