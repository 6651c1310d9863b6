"""Random damage to a whole run: whatever a reader returns is what was written, or it raises one of rarefy's own errors (A2, A7, A10, T2)."""

from __future__ import annotations

import os
import random
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch

import rarefy
from rarefy.errors import RarefyError
from rarefy.store.check import check
from rarefy.store.checkpoint import load_checkpoint
from rarefy.store.lines import read_lines
from rarefy.store.run import Run, read_run
from rarefy.store.shards import ActivationStore, ActivationWriter
from rarefy.ui import read_report

sys.path.insert(0, str(Path(__file__).parents[1] / "security"))
from real_run import make_run  # noqa: E402


def flip(path, dice):
    data = bytearray(path.read_bytes() or b"\0")
    for _ in range(dice.choice([1, 1, 3])):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


def zero(path, dice):
    data = bytearray(path.read_bytes())
    at = dice.randrange(len(data) + 1)
    data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    path.write_bytes(data)


def cut(path, dice):
    os.truncate(path, dice.randrange(path.stat().st_size + 1))


def grow(path, dice):
    with open(path, "ab") as file:
        file.write(dice.choice([b"\0", b"\n", path.read_bytes()[-64:], bytes(5000), dice.randbytes(40)]))


def splice(path, dice):
    data = path.read_bytes()
    a, b, n = (dice.randrange(len(data) + 1) for _ in range(3))
    path.write_bytes(data[:a] + data[b : b + n % 200] + data[a:])


def twist(path, dice):
    """Replace one number in a text by another of odd size."""
    data = path.read_bytes()
    digits = [i for i, c in enumerate(data[:4000]) if 48 <= c <= 57]
    if digits:
        at = dice.choice(digits)
        path.write_bytes(data[:at] + dice.choice([b"-1", b"9" * 19, b"1e999", b"NaN", b'"x"', b"[" * 3000]) + data[at + 1 :])


def gone(path, dice):
    path.unlink()


def folder(path, dice):
    path.unlink()
    path.mkdir()


def other(path, dice):
    """Another file of the same kind in its place, from this run or another; a log or report that stands alone is bound to no run."""
    if path.parent.name == "work":
        return gone(path, dice)
    top = next(p for p in path.parents if p.name == "work").parent
    same = [p for p in sorted(top.rglob("*")) if p.is_file() and p.name != ".lock" and p.suffix == path.suffix]
    shutil.copy(dice.choice(same), str(path) + ".new")
    os.replace(str(path) + ".new", path)


DAMAGE = [flip, flip, flip, zero, cut, cut, grow, splice, twist, gone, folder, other]


def readings(run):
    """Name -> what a reader gives, as something that can be compared."""
    (store,) = (run / "activations").glob("acts-*")

    def tensors(held):
        return {k: (v.dtype, v.shape, v.contiguous().flatten().view(torch.uint8).tolist()) for k, v in held.items()}

    def point():
        found = load_checkpoint(run / "checkpoints")
        return found and (found.step, found.meta, tensors(found.tensors))

    return {
        "run": lambda: read_run(run),
        "log": lambda: read_lines(run / "log.jsonl"),
        "points": lambda: rarefy.Frontier.load(run / "points.jsonl").points,
        "report": lambda: read_report(run),
        "store": lambda: ActivationStore(store)[:].view(torch.uint8).tolist(),
        "checkpoint": point,
        "method": lambda: tensors(rarefy.load(run / "methods" / "latents__topk").state_dict()),
    }


def shorter(found, whole):
    """What may be missing without a sign: the end of a log, a finished file that is simply not there."""
    return isinstance(found, list) and found == whole[: len(found)] or found is None


def survives(run, work, wanted, dice):
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(run, work)
    files = [p for p in sorted(work.rglob("*")) if p.is_file() and p.name != ".lock"]
    hit = dice.sample(files, dice.choice([1, 1, 1, 2]))
    done = []
    for path in hit:
        damage = dice.choice(DAMAGE)
        damage(path, dice)
        done.append(f"{damage.__name__} {path.relative_to(work)}")
    for name, read in readings(work).items():
        try:
            found = read()
        except RarefyError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000, (done, name)
            continue
        assert found == wanted[name] or shorter(found, wanted[name]), (done, name)
    report = check(work)
    changed = [p for p in hit if not p.is_file() or p.read_bytes() != (run / p.relative_to(work)).read_bytes()]
    forgiven = [p for p in changed if p.parent == work or p.name == "closed.json"]
    assert not report.ok or len(forgiven) == len(changed), (done, "check saw nothing")
    (store,) = (work / "activations").glob("acts-*")
    try:
        with ActivationWriter(store, 32, "float32", ActivationStore(run / "activations" / store.name).made_from) as writer:
            rows = writer.rows
        assert ActivationStore(store)[:].view(torch.uint8).tolist() == wanted["store"][:rows], (done, "after going on")
    except RarefyError:
        pass
    try:
        with Run(work, read_run(run)["made"]):
            pass
    except RarefyError:
        pass
    return done


@pytest.mark.slow
def test_random_damage(tmp_path):
    run = make_run(tmp_path)
    (tmp_path / "second").mkdir()
    make_run(tmp_path / "second", seed=1)
    wanted = {name: read() for name, read in readings(run).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rows that a writer cuts off
        for seed in range(int(os.environ.get("ROUNDS", "150"))):
            survives(run, tmp_path / "work", wanted, random.Random(seed))
