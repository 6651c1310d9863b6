"""Each mutation applies to today's source, and the tests notice it."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from mutations import MUTATIONS  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", MUTATIONS)
def test_applies(name):
    mutation = MUTATIONS[name]
    text = (ROOT / "src/rarefy" / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1, f"{mutation.file} has this {text.count(mutation.old)} times: {mutation.old}"
    assert mutation.new != mutation.old


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_is_noticed(name, tmp_path):
    mutation = MUTATIONS[name]
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "src/rarefy" / mutation.file
    path.write_text(path.read_text(encoding="utf-8").replace(mutation.old, mutation.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *shlex.split(mutation.tests)]
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "src"), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    for which in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
        env.pop(which, None)
    got = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    # 1: tests ran and some failed. 2, 4, 5 (interrupted, misused, none collected) would prove nothing.
    assert got.returncode == 1, f"exit code {got.returncode}\n{got.stdout[-3000:]}"
    assert "failed" in got.stdout
