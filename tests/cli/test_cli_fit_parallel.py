"""`rarefy fit` under torchrun: processes train one dictionary into one run, and what is refused to the first ends all.

Pairs play the scenes below (processes.py), each with torchrun's variables; `torchrun` itself plays one, in a slow test.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import rarefy
from rarefy import world
from rarefy.cli import main as command
from rarefy.store.lock import RunLock

sys.path.insert(0, str(Path(__file__).parents[1]))
from processes import main, played_by  # noqa: E402


def words(folder: Path, *more: Any) -> list[str]:
    """A small fit of the model and text beside the scenes."""
    root = folder.parent
    given = [
        "fit", "latents/topk", root / "tiny", "--site", "layers.0.resid_post", "--data", root / "text.txt", "--width", 64, "--k", 4, "--steps", 6,
        "--batch", 64, "--tokens", 4000, "--context", 16, "--lr", 0.01, "--out", folder / "run", *more,
    ]
    return [str(w) for w in given]


def told(folder: Path, *more: Any) -> dict[str, Any]:
    """Exit status and what was said."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command(words(folder, *more))
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def fitted(rank: int, folder: Path) -> dict[str, Any]:
    """Once, and again when it is finished."""
    return {"first": told(folder, "--json"), "again": told(folder, "--json")}


def stored(rank: int, folder: Path) -> dict[str, Any]:
    return told(folder, "--store")


def held(rank: int, folder: Path) -> dict[str, Any]:
    """Somebody else writes the folder; only the first process looks."""
    if rank:
        return told(folder)
    with RunLock(folder / "run"):
        return told(folder)


def missing(rank: int, folder: Path) -> dict[str, Any]:
    """The second process does not find the text."""
    return told(folder, *(["--data", folder / "nothing.txt"] if rank else []))


def nested(rank: int, folder: Path) -> dict[str, Any]:
    """Sets of processes last as long as their block, and blocks may lie in one another and follow on a new group."""
    seen = []
    for again in range(2):
        with world.meshed(2) as outer:
            with world.meshed(2) as inner:
                seen.append(inner.count(1))
            seen += [world.share()[1], outer.count(1)]
        seen.append(world.share()[1])
        if not again:
            dist.destroy_process_group()
            dist.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=2)
    return {"seen": seen}


QUICK = {"fitted": fitted, "held": held, "nested": nested}
SCENES = {**QUICK, "stored": stored, "missing": missing}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny: Path, corpus: Path) -> Path:
    out = tmp_path_factory.mktemp("joined")
    (out / "tiny").symlink_to(tiny)
    (out / "text.txt").write_text("\n".join(path.read_text() for path in sorted(corpus.glob("*.txt"))) * 4)
    return out


@pytest.fixture(scope="module")
def played(root: Path) -> Any:
    return played_by(__file__, root, QUICK)


@pytest.fixture(scope="module")
def slowly(root: Path) -> Any:
    return played_by(__file__, root, ("stored", "missing"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "methods").rglob("*.safetensors")
    return load_file(file)


def test_two_processes_fit_what_one_fits(played: Any, root: Path) -> None:
    (a, b), run = played("fitted")
    assert (a["first"]["code"], b["first"]["code"]) == (0, 0), a["first"]["err"] + b["first"]["err"]
    assert b["first"]["out"] == b["again"]["out"] == "" and not json.loads(a["first"]["out"])["finished_before"]
    assert json.loads(a["again"]["out"])["finished_before"] and b["again"]["code"] == 0
    (root / "alone").mkdir(exist_ok=True)
    assert told(root / "alone")["code"] == 0
    for name, tensor in weights(root / "alone" / "run").items():
        torch.testing.assert_close(weights(run)[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert not list(run.rglob("*.tmp*"))


@pytest.mark.slow
def test_activations_are_stored_once_for_both(slowly: Any) -> None:
    (a, b), run = slowly("stored")
    assert (a["code"], b["code"]) == (0, 0), a["err"] + b["err"]
    assert "fitted 1 method" in a["out"] and b["out"] == "" and len(list((run / "activations").iterdir())) == 1


def test_a_folder_that_is_held_is_refused_to_both(played: Any) -> None:
    (a, b), run = played("held")
    assert "is being written by process" in a["err"] and "process 0 of 2 stopped with an error" in b["err"]
    assert a["code"] == b["code"] != 0 and not (run / "run.json").exists()


@pytest.mark.slow
def test_what_the_second_process_lacks_stops_the_first(slowly: Any) -> None:
    (a, b), run = slowly("missing")
    assert "nothing.txt" in b["err"] and "process 1 of 2 stopped with an error" in a["err"]
    assert a["code"] == b["code"] != 0 and not run.exists()


def test_sets_of_processes_end_with_their_block(played: Any) -> None:
    for one in played("nested")[0]:
        assert one["seen"] == [2, 1, 2, 2] * 2


@pytest.mark.slow
def test_torchrun(root: Path) -> None:
    folder = root / "torchrun"
    folder.mkdir()
    env = {**os.environ, "PYTHONPATH": str(Path(rarefy.__file__).parents[1]), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rarefy"]
    done = subprocess.run([*start, *words(folder, "--json")], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["fitted"]                # one result, of one process
    refused = subprocess.run([*start, *words(folder, "--json", "--steps", 7)], env=env, capture_output=True, text=True, timeout=300)
    assert refused.returncode != 0 and "other settings" in refused.stderr


if __name__ == "__main__":
    import rarefy.jobs.fit
    from rarefy.jobs.models import open_for_work

    open_for_work(str(Path(sys.argv[1]) / "tiny"))          # what it imports is imported once, before the forks
    main(SCENES)
