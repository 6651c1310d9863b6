"""What numba compiled and kept: damaged files, files of another process, constants that changed elsewhere, no folder to write to, no numba."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from rarefy import compiled

pytestmark = pytest.mark.skipif(not compiled.available(), reason="numba is not installed")

LOOP = """
from rarefy.compiled import loop
from .near import MORE

@loop()
def add(x):
    for i in range(len(x)):
        x[i] += MORE
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose loop adds a constant that stands in another file."""
    home = tmp_path / "kept_loops"
    home.mkdir()
    for name, text in (("__init__.py", ""), ("near.py", "MORE = 1\n"), ("loops.py", LOOP)):
        (home / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return home


def fresh() -> ModuleType:
    """The package as a new process would see it."""
    for name in [name for name in sys.modules if name.split(".")[0] == "kept_loops"]:
        del sys.modules[name]
    compiled.digest.cache_clear()
    importlib.invalidate_caches()
    return importlib.import_module("kept_loops.loops")


def added(loops: ModuleType, kind: type = np.float32) -> float:
    x = np.zeros(3, kind)
    loops.add(x)
    assert (x == x[0]).all()
    return float(x[0])


def hits(loops: ModuleType) -> int:
    return sum(loops.add.stats.cache_hits.values())


@pytest.mark.parametrize("ending", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", [b"", b"junk" * 100, None])
def test_damaged_files_count_as_not_there(home: Path, ending: str, damage: bytes | None) -> None:
    assert added(fresh()) == 1
    again = fresh()
    assert added(again) == 1 and hits(again) == 1                       # it was kept at all
    (file,) = home.glob(f"__pycache__/*.{ending}")
    file.write_bytes(file.read_bytes()[:-40] if damage is None else damage)
    mended = fresh()
    assert added(mended) == 1 and hits(mended) == 0
    after = fresh()
    assert added(after) == 1 and hits(after) == 1                       # and is kept again


def test_code_for_other_types_is_not_run(home: Path) -> None:
    """Two processes that compile for different types at once number their files alike, and one finds the other's code."""
    loops = fresh()
    assert added(loops, np.float32) == added(loops, np.int64) == 1
    one, two = sorted(home.glob("__pycache__/*.nbc"))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    swapped = fresh()
    assert added(swapped, np.float32) == added(swapped, np.int64) == 1
    assert len(swapped.add.signatures) == 2


def test_a_constant_that_changed_in_another_file_is_seen(home: Path) -> None:
    assert added(fresh()) == 1
    (home / "near.py").write_text("MORE = 2\n")
    assert added(fresh()) == 2


def test_without_a_folder_to_write_to_it_compiles_and_says_so_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core.caching import FunctionCache

    def nowhere(self: object, function: object) -> None:
        raise RuntimeError("no locator available")

    monkeypatch.setattr(FunctionCache, "__init__", nowhere)
    monkeypatch.setattr(compiled, "_told", [])
    with pytest.warns(RuntimeWarning, match="NUMBA_CACHE_DIR"):
        loops = fresh()
    assert added(loops) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert added(fresh()) == 1


def test_a_folder_that_fills_up_does_no_harm(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core.caching import IndexDataCacheFile

    def full(self: object, *given: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(IndexDataCacheFile, "_save_data", full)
    monkeypatch.setattr(compiled, "_told", [])
    with pytest.warns(RuntimeWarning, match="no space left"):
        assert added(fresh()) == 1
    assert added(fresh()) == 1                                          # the index names a file that is not there


def test_a_numba_that_does_not_load_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(compiled, "find_spec", lambda name: object())
    with pytest.warns(RuntimeWarning, match="does not load"):
        assert not compiled.available.__wrapped__()
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    assert not compiled.available.__wrapped__()


@pytest.mark.slow
def test_without_numba_plain_torch_passes_the_same_tests() -> None:
    here, code = Path(__file__), "import sys; sys.modules['numba'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    files = ["test_fuzz_kernels.py", "test_block_attention.py", "test_block_attention_masks.py", "test_sparse_decode.py", "test_coded_attention.py",
             "test_gather_linear.py", "../maps/test_entmax.py"]
    run = subprocess.run(
        [sys.executable, "-c", code, "-q", "-p", "no:cacheprovider", "-m", "not slow", *(str(here.parent / name) for name in files)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, cwd=here.parents[2])
    assert run.returncode == 0, run.stdout[-3000:]
