"""Training that is killed, told to stop, met by a second process or refused by the disk (T1, T3, T5, T6).

`test_checkpoint_kill` cuts the writing of checkpoints; here the whole of `train` is cut, and what a run taken up again
ends with must be what an untroubled run ends with, bit for bit.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rarefy
from rarefy.errors import BadInput
from rarefy.fit import Recipe, train
from rarefy.latents.batch_topk import BatchTopK
from rarefy.latents.topk import TopK
from rarefy.store.check import check
from rarefy.store.checkpoint import load_checkpoint
from rarefy.store.fs import DISK, FS
from rarefy.store.lines import read_lines
from rarefy.streams import TensorStream

sys.path.insert(0, str(Path(__file__).parent))
from test_checkpoint_kill import Cut, FailingFS  # noqa: E402

STEPS, EVERY = 5, 2


def fresh():
    return {"topk": TopK(6, 24, 3, dead_after=16), "batch_topk": BatchTopK(6, 24, 3, dead_after=16)}


def stream():
    return TensorStream(torch.randn(40, 6, generator=torch.Generator().manual_seed(1)), 8)


def work(run, steps=STEPS, on_log=None):
    plan = fresh()
    train(plan, stream(), Recipe(steps=steps, lr=0.01, save_every=EVERY, log_every=1), run, on_log=on_log)
    return {f"{name}/{k}": v for name, m in plan.items() for k, v in m.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys() and [k for k in a if not torch.equal(a[k], b[k])] == []


@contextlib.contextmanager
def failing(at, error):
    """The disk that everything writes to, stopping at its operation number `at`."""
    DISK.__class__ = FailingFS
    DISK.__init__(at, error)
    try:
        yield DISK
    finally:
        DISK.__class__ = FS


def disturbed(tmp_path, error, stops, stride=1):
    """Cut training at every operation (or every `stride`th) in turn, look at what is left, take it up again; the last one cut."""
    whole, at = work(None), 1 - stride
    while True:
        at += stride
        run, heard, done = tmp_path / str(at), [], False
        with failing(at, error):
            try:
                work(run, on_log=lambda r, heard=heard: heard.append(r["step"]))
                done = True
            except stops as caught:
                assert error.__class__ is Cut or os.strerror(error.errno) in str(caught), caught
        found = load_checkpoint(run / "checkpoints")
        acknowledged = max(0, (heard[-1] - 1) // EVERY * EVERY) if heard else 0      # a record of step n comes before its checkpoint
        assert (found.step if found else 0) >= acknowledged and not (found and found.skipped)
        if found:
            assert check(run).problems == []
        assert_same(whole, work(run))
        assert [r["step"] for r in read_lines(run / "log.jsonl")] == list(range(1, STEPS + 1))
        if not found or found.step < STEPS:      # the next save clears away what a cut one left; after the last there is none
            assert not [n for n in os.listdir(run / "checkpoints") if n.startswith((".tmp-", ".gone-"))]
        if done:
            return at


def test_death_at_every_operation_of_training(tmp_path):
    assert disturbed(tmp_path, Cut(), Cut) > 30


@pytest.mark.parametrize("code, stride", [(errno.ENOSPC, 1), (errno.EROFS, 5)])
def test_a_refusing_disk_stops_training_with_one_line_and_costs_no_checkpoint(tmp_path, code, stride):
    assert disturbed(tmp_path, OSError(code, os.strerror(code)), BadInput, stride) > 30


# What follows happens to real processes. One process imports torch once and forks those that train and die.

ZYGOTE = """
import json, os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_train_kill import EVERY, work
from rarefy.errors import BadInput, Halted
from rarefy.store.checkpoint import load_checkpoint

root, kills, steps = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.optim.Adam([torch.zeros(1)])      # imports much; once is enough

def start(run, hold=None):
    # returns the child's process id and a pipe that gives a line for each step it has logged
    out, into = os.pipe()
    pid = os.fork()
    if pid:
        os.close(into)
        return pid, os.fdopen(out, "rb")
    def on_log(record):
        os.write(into, b"%d\\n" % record["step"])
        if hold == record["step"]:
            time.sleep(60)
    try:
        result = work(run, steps, on_log)
        with open(f"{run}.weights", "w") as file:
            json.dump({k: v.flatten().tolist() for k, v in result.items()}, file)     # a float32 in full
        os._exit(0)
    except Halted:
        os._exit(75)
    except BadInput as error:
        os.write(into, str(error).encode())
        os._exit(2)
    except BaseException as error:
        os.write(into, repr(error).encode())
        os._exit(1)

def end(pid, pipe):
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with pipe:
        return code, pipe.read()

def say(**what):
    print(json.dumps(what), flush=True)

random.seed(0)
code, said = end(*start(f"{root}/whole"))
say(what="whole", code=code, said=said[-200:].decode())

run = f"{root}/killed"
for n in range(kills):
    pid, pipe = start(run)
    read = [pipe.readline() for _ in range(random.randrange(1, 2 + 2 * steps // kills))] if n % 4 else []
    time.sleep(random.uniform(0, 0.006))
    os.kill(pid, signal.SIGKILL)
    code, said = end(pid, pipe)
    logged = [int(s) for s in (b"".join(read) + said).split(b"\\n")[:-1]]
    found = load_checkpoint(f"{run}/checkpoints")
    say(what="kill", code=code, logged=logged[-1:], step=found.step if found else 0, skipped=found.skipped if found else [])
code, said = end(*start(run))
say(what="killed", code=code, said=said[-200:].decode())

run = f"{root}/told"
for n in range(kills):
    pid, pipe = start(run)
    pipe.readline()
    time.sleep(random.uniform(0, 0.01))
    for which in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        try:
            os.kill(pid, which)
        except ProcessLookupError:
            break
        time.sleep(random.choice((0, 0.0005, 0.003)))
    code, said = end(pid, pipe)
    found = load_checkpoint(f"{run}/checkpoints")
    say(what="told", code=code, step=found.step if found else 0, skipped=found.skipped if found else [])
code, said = end(*start(run))
say(what="told_end", code=code, said=said[-200:].decode())

run = f"{root}/two"
pid, pipe = start(run, hold=3)
while (line := pipe.readline()) != b"3\\n":
    assert line
code, said = end(*start(run))
say(what="second", code=code, said=said.decode(), holder=pid)
os.kill(pid, signal.SIGKILL)
end(pid, pipe)
code, said = end(*start(run))
say(what="after", code=code, said=said[-200:].decode())
"""


def processes(tmp_path, kills, steps):
    command = [sys.executable, "-c", ZYGOTE, str(Path(__file__).parent), str(tmp_path), str(kills), str(steps)]
    source = str(Path(rarefy.__file__).parents[1])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    said = {}
    for line in done.stdout.splitlines():
        record = json.loads(line)
        said.setdefault(record["what"], []).append(record)
    return said, {name: (tmp_path / f"{name}.weights").read_text() for name in ("whole", "killed", "told", "two")}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return processes(tmp_path_factory.mktemp("few"), 8, 60)


def assert_kills(said, weights, at_least):
    assert said["whole"][0]["code"] == said["killed"][0]["code"] == 0, said
    before = 0
    for one in said["kill"]:
        assert one["skipped"] == [] and one["step"] >= before
        if one["logged"]:      # at most EVERY steps are lost
            assert one["step"] >= (one["logged"][0] - 1) // EVERY * EVERY
        before = one["step"]
    assert sum(one["code"] == -signal.SIGKILL for one in said["kill"]) >= at_least
    assert weights["killed"] == weights["whole"]


def test_kill_9_at_random_moments_changes_no_bit(few):
    said, weights = few
    assert_kills(said, weights, 4)


def test_sigterm_and_sigint_save_and_exit_and_change_no_bit(few):
    said, weights = few
    codes = [one["code"] for one in said["told"]]
    assert set(codes) <= {75, 0} and codes.count(75) >= 3, codes      # 0: it was done before it was told
    steps = [one["step"] for one in said["told"]]
    assert steps == sorted(steps) and all(one["skipped"] == [] for one in said["told"])
    assert said["told_end"][0]["code"] == 0 and weights["told"] == weights["whole"]


def test_a_second_process_is_refused_and_the_death_of_the_first_frees_the_run(few):
    said, weights = few
    second = said["second"][0]
    assert second["code"] == 2 and f"is being written by process {second['holder']}" in second["said"], second
    assert said["after"][0]["code"] == 0 and weights["two"] == weights["whole"]


@pytest.mark.slow
def test_kill_9_sweep(tmp_path):
    said, weights = processes(tmp_path, 80, 600)
    assert_kills(said, weights, 50)
    assert weights["told"] == weights["two"] == weights["whole"]
