"""Scenes played by processes of torch.distributed: one process imports torch and forks the players.

Players that wait for each other for ever are killed and reported as a hang. A test file calls `main(scenes)` when it is run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import rarefy
from rarefy.errors import Halted, RarefyError

Scene = Callable[[int, Path], Any]


def play(scene: Scene, rank: int, size: int, folder: Path) -> None:
    """One process: the scene's result or its error, as JSON."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    try:
        out = scene(rank, folder) or {}
    except (RarefyError, Halted, RuntimeError) as error:
        out = {"error": type(error).__name__, "text": str(error), "step": getattr(error, "step", None)}
    (folder / f"{rank}.json").write_text(json.dumps(out))
    dist.destroy_process_group()


def fork(name: str, scene: Scene, size: int, folder: Path, most: float = 60) -> None:
    """`size` processes, for at most so many seconds."""
    folder.mkdir()
    left, end = set(), time.monotonic() + most
    for rank in range(size):
        pid = os.fork()
        if not pid:
            try:
                play(scene, rank, size, folder)
                os._exit(0)
            except BaseException as error:
                sys.stderr.write(f"{name} {rank}: {error!r}\n")
                os._exit(1)
        left.add(pid)
    while left and time.monotonic() < end:
        left -= {pid for pid in left if os.waitpid(pid, os.WNOHANG)[0]}
        time.sleep(0.005)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if left:
        (folder / "hang").touch()


def main(scenes: Mapping[str, Scene], size: Callable[[str], int] = lambda name: 2) -> None:
    """argv: a folder and the names of scenes to play in it."""
    root, *names = sys.argv[1:]
    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1)])      # what it imports is imported once, before the forks
    for name in names:
        fork(name, scenes[name], size(name), Path(root) / name)


def played_by(file: str, root: Path, names: Any) -> Callable[[str], tuple[list[Any], Path]]:
    """Play scenes of a test file; name -> (results by rank, run folder)."""
    env = {**os.environ, "PYTHONPATH": str(Path(rarefy.__file__).parents[1]), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([sys.executable, file, str(root), *names], env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]

    def get(name: str) -> tuple[list[Any], Path]:
        assert not (root / name / "hang").exists(), f"{name}: the processes wait for each other"
        found = sorted((root / name).glob("[0-9].json"))
        assert len(found) >= 2, done.stderr[-3000:]
        return [json.loads(f.read_text()) for f in found], root / name / "run"

    return get
