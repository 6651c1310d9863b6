"""A store whose writer was cut off holds exactly the acknowledged rows and goes on (A3)."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rarefy
from rarefy.errors import BadInput
from rarefy.store.check import check
from rarefy.store.shards import ActivationStore, ActivationWriter

sys.path.insert(0, str(Path(__file__).parent))
from test_checkpoint_kill import Cut, FailingFS  # noqa: E402

X = torch.arange(60.0).view(20, 3)
CUTS = [0, 1, 4, 5, 14, 20]
SMALL = {"block_bytes": 24, "shard_bytes": 48}  # 2 rows a block, 4 a shard: appends reach over several shards


def write_until(root, fs):
    acked = 0
    try:
        with ActivationWriter(root, 3, "float32", {"a": 1}, fs=fs, **SMALL) as writer:
            for a, b in zip(CUTS, CUTS[1:], strict=False):
                writer.append(X[a:b])
                acked = b
    except (Cut, BadInput):
        return acked, True
    return acked, False


def go_on(root, rows):
    with ActivationWriter(root, 3, "float32", {"a": 1}, **SMALL) as writer:
        assert writer.rows == rows
        for row in X[rows:]:
            writer.append(row)
    assert torch.equal(ActivationStore(root)[:], X) and check(root).problems == []


def test_cut_at_every_operation(tmp_path):
    at, stopped = 0, True
    while stopped:
        at += 1
        root = tmp_path / str(at)
        fs = FailingFS(at, Cut())
        acked, stopped = write_until(root, fs)
        if (root / "store.json").exists():
            store = ActivationStore(root)
            # an append whose commit record was written but which did not return may be there, whole
            legal = {acked, CUTS[min(CUTS.index(acked) + 1, len(CUTS) - 1)]}
            assert len(store) in legal and torch.equal(store[:], X[: len(store)])
            assert check(root).problems == []
            go_on(root, len(store))
        else:
            go_on(root, 0)
    assert at > 40


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_refusing_disk_loses_nothing_and_the_writer_goes_on(tmp_path, code):
    for at in range(1, 52, 2):
        root = tmp_path / str(at)
        acked, _ = write_until(root, FailingFS(at, OSError(code, os.strerror(code))))
        if (root / "store.json").exists():
            store = ActivationStore(root)
            assert len(store) >= acked and torch.equal(store[:], X[: len(store)])
    fs = FailingFS(-1, OSError(code, os.strerror(code)))
    with ActivationWriter(tmp_path / "s", 3, "float32", {"a": 1}, fs=fs, **SMALL) as writer:
        writer.append(X[:3])
        for offset in range(1, 9):
            fs.at, fs.count = offset, 0
            with pytest.raises(BadInput, match=os.strerror(code)):
                writer.append(X[3:15])
            fs.at = -1
            assert writer.rows == 3 and torch.equal(ActivationStore(tmp_path / "s")[:], X[:3])
        writer.append(X[3:])
    assert torch.equal(ActivationStore(tmp_path / "s")[:], X)


def test_an_interrupt_inside_an_append_leaves_none_of_it(tmp_path):
    fs = FailingFS(-1, KeyboardInterrupt())
    with ActivationWriter(tmp_path, 3, "float32", {"a": 1}, fs=fs, **SMALL) as writer:
        writer.append(X[:3])
        fs.at = fs.count + 2
        with pytest.raises(KeyboardInterrupt):
            writer.append(X[3:9])
        writer.append(X[3:])
    assert torch.equal(ActivationStore(tmp_path)[:], X)


CHILD = """
import os, sys, torch
from rarefy.store.shards import ActivationWriter
x = torch.arange(3000.0).view(1000, 3)
with ActivationWriter(sys.argv[1], 3, "float32", {"a": 1}, block_bytes=24, shard_bytes=600) as writer:
    for i in range(writer.rows, 1000):
        writer.append(x[i])
        os.write(1, b"%d\\n" % (i + 1))
"""


@pytest.mark.slow
def test_sigkill_at_random_moments(tmp_path):
    x, acked, kills = torch.arange(3000.0).view(1000, 3), 0, 0
    for stop_after in (1, 17, 60, 150, 151, 333, 600, 1001):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(rarefy.__file__).parents[1])},
        )
        for line in child.stdout:
            acked = int(line)
            if acked >= stop_after:
                child.send_signal(signal.SIGKILL)
                break
        rest = child.stdout.read().split()
        acked = int(rest[-1]) if rest and rest[-1].isdigit() else acked
        kills += child.wait() == -signal.SIGKILL
        child.stdout.close()
        store = ActivationStore(tmp_path)
        assert acked <= len(store) <= acked + 1 and torch.equal(store[:], x[: len(store)])
    assert kills >= 5 and len(store) == 1000
