"""Two processes on gloo train as one does, and end together whatever happens to either.

Pairs play the scenes below (processes.py); `torchrun` itself plays one, in a slow test.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import rarefy
from processes import main, played_by
from rarefy.errors import BadInput, Halted
from rarefy.fit import Recipe, train
from rarefy.latents.batch_topk import BatchTopK
from rarefy.latents.gated import Gated
from rarefy.latents.jumprelu import JumpReLU
from rarefy.latents.relu import ReLU
from rarefy.latents.topk import TopK
from rarefy.method import Loss, Sparse
from rarefy.store.checkpoint import load_checkpoint
from rarefy.store.lines import read_lines
from rarefy.streams import TensorStream

D, F, B, STEPS = 7, 61, 32, 12


def rows():
    made = torch.Generator().manual_seed(3)
    codes = torch.relu(torch.randn(150, 24, generator=made, dtype=torch.float64) - 0.8)
    return codes @ torch.randn(24, D, generator=made, dtype=torch.float64) + 0.3


def plan(seed=0):
    """TopK with dead latents and AuxK, and one of each other kind."""
    return {
        "topk": TopK(D, F, 2, dead_after=40, aux_k=3, seed=seed).double(), "relu": ReLU(D, F, l1=0.1, warmup=5, seed=seed).double(),
        "gated": Gated(D, F, warmup=5, seed=seed).double(), "jumprelu": JumpReLU(D, F, bandwidth=0.3, theta=0.05, warmup=5, seed=seed).double(),
        "batch_topk": BatchTopK(D, F, 2, dead_after=40, momentum=0.8, seed=seed).double(),
    }


def few(seed=0):
    """Those of `plan` whose buffers do something."""
    return {name: m for name, m in plan(seed).items() if name in ("topk", "batch_topk")}


def recipe(**kw):
    return Recipe(**{"steps": STEPS, "lr": 0.01, "save_every": 4, "log_every": 3, "clip": 0.05, **kw})


def stream(size=B):
    return TensorStream(rows(), size)


def told(methods):
    return {f"{name}/{k}": v.tolist() for name, m in methods.items() for k, v in m.state_dict().items()}


class Touchy(Sparse):
    """Goes wrong on process 1 alone, at step 5: its loss, its gradient, what it raises or what it names."""

    name, unit, fitted = "touchy", "latent", "trained"

    def __init__(self, how: str = ""):
        super().__init__()
        self.w = nn.Parameter(torch.ones(D, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.how = how

    def loss(self, x, y):
        wrong = int(self.calls) == 5 and dist.get_rank() == 1
        self.calls += 1
        if wrong and self.how == "raise":
            raise ValueError("a bug")
        total = (self.w * x - y).pow(2).mean() + self.w.pow(2).mean()
        if wrong and self.how == "nan":
            total = total.detach() * torch.nan + total      # the gradient stays finite
        if wrong and self.how == "grad":
            total = total + _NaN.apply(self.w).sum()
        return Loss(total, {"other" if wrong and self.how == "parts" else "mse": total.detach()})


class _NaN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        return torch.zeros_like(w)

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.nan


# Scenes: what each process does with its rank and the folder of the scene; they return what the tests look at.


def equal(rank, folder, **kw):
    heard, methods = [], plan()
    train(methods, stream(), recipe(**kw), folder / "run", on_log=heard.append)
    return {"weights": told(methods), "heard": [r["methods"] for r in heard], "rows": [r["rows_per_s"] * r["seconds"] / r["step"] for r in heard]}


def pieces(rank, folder):
    return equal(rank, folder, accumulate=2)


def seeds(rank, folder):
    methods = few(seed=rank)
    train(methods, stream(), recipe())
    return {"weights": told(methods)}


def uneven(rank, folder):
    methods = {"topk": TopK(D, F, 2).double()}
    before = told(methods)
    try:
        train(methods, stream(31), recipe())
    finally:
        assert told(methods) == before      # not even initialised


def bad(how):
    def scene(rank, folder):
        methods = {"topk": plan()["topk"], "touchy": Touchy(how), "relu": plan()["relu"]}
        try:
            train(methods, stream(), recipe(log_every=1 if how == "parts" else 3), folder / "run")
        except Exception as error:
            return {"error": type(error).__name__, "text": str(error), "weights": told(methods)}

    return scene


def good(rank, folder):
    """What the scenes above must have left: five whole steps."""
    class Five:
        made_from = {}

        def batches(self, start=0):
            return itertools.islice(stream().batches(start), 5)

    methods = {"topk": plan()["topk"], "touchy": Touchy(), "relu": plan()["relu"]}
    try:
        train(methods, Five(), recipe())
    except BadInput as error:
        return {"text": str(error), "weights": told(methods)}


def data(rank, folder):
    x = rows()
    x[:, 3] = torch.where(torch.arange(150) == 77, torch.nan, x[:, 3])
    train(few(), TensorStream(x, B), recipe())


def signalled(rank, folder):
    """Process 1 alone is told to stop, three times over; a fourth run ends."""
    ends = []
    for at in (2, 5, 8):
        source = stream()
        class Telling:
            made_from = source.made_from

            def batches(self, start=0, source=source, at=at):
                for step, batch in enumerate(source.batches(start), start):
                    if rank == 1 and step == at:
                        os.kill(os.getpid(), signal.SIGTERM)
                    yield batch

        methods = few()
        try:
            train(methods, Telling(), recipe(), folder / "run")
        except Halted as halt:
            ends.append((halt.step, halt.signum))
    methods = few()
    train(methods, stream(), recipe(), folder / "run")
    return {"ends": ends, "weights": told(methods)}


def last_save(rank, folder):
    """The signal comes to process 1 while process 0 writes the last checkpoint."""
    from rarefy import fit

    save = fit.save_checkpoint
    def slow(*args):
        time.sleep(0.3)
        save(*args)

    fit.save_checkpoint = slow
    if rank == 1:
        keep = fit._keep
        fit._keep = lambda *args: (os.kill(os.getpid(), signal.SIGINT), keep(*args))
    train(few(), stream(), recipe(save_every=STEPS), folder / "run")


def full_disk(rank, folder):
    from rarefy import fit

    save = fit.save_checkpoint
    def refuse(root, step, *rest):
        if step == 8:
            raise BadInput("cannot write: No space left on device")
        save(root, step, *rest)

    fit.save_checkpoint = refuse
    train(few(), stream(), recipe(), folder / "run")


def callback(rank, folder):
    def on_log(record):
        raise RuntimeError("the caller's own")

    train(few(), stream(), recipe(), folder / "run", on_log=on_log)


def locked(rank, folder):
    from rarefy.store.lock import RunLock

    if rank == 0:
        with RunLock(folder / "run" / "checkpoints"):
            train(few(), stream(), recipe(), folder / "run")
    else:
        train(few(), stream(), recipe(), folder / "run")


def other_folder(rank, folder):
    """Each process has a disk of its own and only the first one's holds the run."""
    train(few(), stream(), recipe(), folder / "run")
    train(few(), stream(), recipe(), folder / ("run" if rank == 0 else "elsewhere"))


def other_settings(rank, folder):
    train(few(), stream(), recipe(), folder / "run")
    train(few(), stream(), recipe(lr=0.02), folder / "run")


SCENES = {
    "equal": equal, "pieces": pieces, "seeds": seeds, "uneven": uneven, **{f"bad_{how}": bad(how) for how in ("nan", "grad", "raise", "parts")},
    "good": good, "data": data, "signalled": signalled, "last_save": last_save, "full_disk": full_disk, "callback": callback, "locked": locked,
    "other_folder": other_folder, "other_settings": other_settings,
}


QUICK = ("equal", "uneven", "bad_nan", "good", "signalled")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return played_by(__file__, tmp_path_factory.mktemp("quick"), QUICK)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return played_by(__file__, tmp_path_factory.mktemp("slow"), SCENES)


def close(got, want):
    assert got.keys() == want.keys()
    for key, value in want.items():
        if key.split("/")[1] in ("idle_F", "steps", "seen"):
            assert got[key] == value, key
        else:
            torch.testing.assert_close(torch.tensor(got[key]), torch.tensor(value), rtol=1e-6, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


def alone(**kw):
    heard, methods = [], plan()
    train(methods, stream(), recipe(**kw), on_log=heard.append)
    return told(methods), [r["methods"] for r in heard]


def test_two_processes_train_as_one(quick):
    """Weights, counters, thresholds and logs."""
    assert_as_one(*quick("equal"), 1)


@pytest.mark.slow
def test_two_processes_with_two_pieces_each_train_as_one(slow):
    assert_as_one(*slow("pieces"), 2)


def assert_as_one(both, run, rank_pieces):
    """What looks at a batch as one (batch top-k) is as in one process with pieces of that size."""
    a, b = both
    assert a["weights"] == b["weights"]      # bit for bit
    assert b["heard"] == [] and len(read_lines(run / "log.jsonl")) == len(a["heard"]) == STEPS // 3
    weights, heard = alone()
    split, split_heard = alone(accumulate=2 * rank_pieces)
    weights = {k: split[k] if k.startswith("batch_topk") else v for k, v in weights.items()}
    close(a["weights"], weights)
    assert max(weights["topk/idle_F"]) > 40      # so that AuxK and the counters it goes by were at work
    for got, want, parts in zip(a["heard"], heard, split_heard, strict=True):
        for name in want:
            for part, value in (parts if name == "batch_topk" else want)[name].items():
                if part in ("fvu", "dead"):      # not means over rows: the mean over the pieces is logged
                    value = parts[name][part]
                assert got[name][part] == pytest.approx(value, rel=1e-6, abs=1e-9), (name, part)
    assert a["rows"][-1] == pytest.approx(B, rel=0.2)      # speed counts the rows of all


@pytest.mark.slow
def test_the_first_processs_methods_are_trained(slow):
    (a, b), _ = slow("seeds")
    assert a["weights"] == b["weights"] == part_of(slow("equal")[0][0]["weights"], a["weights"])


def part_of(weights, names):
    return {name: weights[name] for name in names}


def test_rows_that_do_not_divide_are_refused_by_name(quick):
    for one in quick("uneven")[0]:
        assert one["error"] == "BadInput" and "a batch of 31 rows does not divide over 2 processes; use a multiple of 2 rows" in one["text"]


def test_a_loss_that_is_nan_on_one_process_stops_both_before_any_method_moves(quick):
    assert_stopped(quick, "nan", "touchy: the loss became nan at step 5", "process 1 of 2 stopped")


@pytest.mark.slow
@pytest.mark.parametrize("how, own, others", [
    ("raise", "a bug", "process 1 of 2 stopped"),
    ("grad", "touchy: the norm of its gradient became nan at step 5", "touchy: the norm of its gradient became nan at step 5"),
])
def test_what_goes_wrong_on_one_process_stops_both_before_any_method_moves(slow, how, own, others):
    assert_stopped(slow, how, own, others)


def assert_stopped(played, how, own, others):
    (a, b), run = played(f"bad_{how}")
    good, _ = played("good")
    assert own in b["text"] and others in a["text"]
    assert b["error"] == ("ValueError" if how == "raise" else "BadInput") and a["error"] == "BadInput"
    assert "ended at step 5 of 12" in good[0]["text"]
    assert a["weights"] == b["weights"] == good[0]["weights"]
    assert load_checkpoint(run / "checkpoints").step == 4


@pytest.mark.slow
def test_parts_that_differ_between_processes_are_refused(slow):
    for one, name in zip(slow("bad_parts")[0], ("mse", "other"), strict=True):
        assert one["error"] == "Unsupported" and f"here loss, {name}" in one["text"]


@pytest.mark.slow
def test_bad_data_is_named_on_both(slow):
    a, b = slow("data")[0]
    assert a == b and a["error"] == "BadInput" and "training rows of step" in a["text"]


def test_a_signal_to_one_process_stops_both_and_the_run_goes_on_to_the_same_bits(quick):
    (a, b), run = quick("signalled")
    assert a["ends"] == b["ends"] == [[3, signal.SIGTERM], [6, signal.SIGTERM], [9, signal.SIGTERM]]
    assert a["weights"] == b["weights"] == part_of(quick("equal")[0][0]["weights"], a["weights"])
    assert [r["step"] for r in read_lines(run / "log.jsonl")] == [3, 6, 9, 12]


@pytest.mark.slow
def test_a_signal_during_the_last_save_halts_both(slow):
    (a, b), run = slow("last_save")
    assert (a["error"], b["error"], a["step"], b["step"]) == ("Halted", "Halted", STEPS, STEPS)
    assert load_checkpoint(run / "checkpoints").step == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("scene, kind, text, step", [
    ("full_disk", "BadInput", "No space left on device", 4), ("callback", "RuntimeError", "the caller's own", None),
    ("locked", "BadInput", "is being written by process", None),
])
def test_what_only_the_first_process_meets_stops_the_other_too(slow, scene, kind, text, step):
    (a, b), run = slow(scene)
    assert a["error"] == kind and text in a["text"]
    assert b["error"] == "BadInput" and "process 0 of 2 stopped with an error" in b["text"]
    found = load_checkpoint(run / "checkpoints")
    assert (found.step if found else None) == step


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_noticed(slow):
    for one in slow("other_folder")[0]:
        assert "differ in the step they start at (0 and 12)" in one["text"]


@pytest.mark.slow
def test_other_settings_are_refused_on_both(slow):
    for one in slow("other_settings")[0]:
        assert "recipe.lr: was 0.01, now 0.02" in one["text"]


TORCHRUN = """
import json, sys
import torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_fit_parallel import equal
dist.init_process_group("gloo")
out = equal(dist.get_rank(), Path(sys.argv[2]))
(Path(sys.argv[2]) / f"{dist.get_rank()}.json").write_text(json.dumps(out))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_torchrun(tmp_path):
    script = tmp_path / "go.py"
    script.write_text(TORCHRUN)
    env = {**os.environ, "PYTHONPATH": str(Path(rarefy.__file__).parents[1]), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), Path(__file__).parent, tmp_path]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert a["weights"] == b["weights"]
    whole, parts = alone()[0], alone(accumulate=2)[0]
    close(a["weights"], {k: parts[k] if k.startswith("batch_topk") else v for k, v in whole.items()})


if __name__ == "__main__":
    main(SCENES)
