"""Loops compiled by numba, kept on disk between processes, and what happens where numba or a folder to keep them in is missing."""

from __future__ import annotations

import ast
import hashlib
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@cache
def available() -> bool:
    """Whether numba can be imported; it refuses versions of numpy and Python that it does not know, which a warning tells once."""
    if find_spec("numba") is None:
        return False
    try:
        import numba  # noqa: F401
    except Exception as error:
        warnings.warn(f"numba is installed but does not load ({error}); slower paths of torch serve in its place", RuntimeWarning, stacklevel=2)
        return False
    return True


def loop(**how: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: numba.njit without the interpreter's lock, whose result later processes read from disk.

    What is kept holds for the text of the file and of all that it imports from here: numba itself looks at the file's date alone, and
    would go on with constants and inner loops that were changed elsewhere. Kept files that are damaged, or that another process put under the
    same number, count as not there. Where no folder can be written, each process compiles for itself, and a warning says so once.
    """
    import numba

    def make(function: Callable[..., Any]) -> Any:
        made: Any = numba.njit(nogil=True, **how)(function)
        if hasattr(made, "enable_caching"):                 # a plain function under NUMBA_DISABLE_JIT
            try:
                made._cache = _kept()(function)
            except RuntimeError as error:
                _nowhere(str(error))
        return made

    return make


@cache
def _kept() -> Any:
    from numba.core.caching import FunctionCache
    from numba.core.sigutils import normalize_signature

    class Kept(FunctionCache):
        def __init__(self, function: Any) -> None:
            super().__init__(function)
            if Path(function.__code__.co_filename).is_file():
                self._cache_file._source_stamp = digest(function.__code__.co_filename)

        def load_overload(self, sig: Any, target_context: Any) -> Any:
            try:
                found = super().load_overload(sig, target_context)
                # Two processes that compile for different types at once may take one file: its signature tells whose it is.
                if found is None or tuple(found.signature.args) == tuple(normalize_signature(sig)[0]):
                    return found
            except Exception:                               # unpickling what is damaged raises anything
                pass
            self._try(self.flush)
            return None

        def save_overload(self, sig: Any, data: Any) -> None:
            self._try(super().save_overload, sig, data)

        @staticmethod
        def _try(write: Callable[..., Any], *given: Any) -> None:
            try:
                write(*given)
            except Exception as error:
                _nowhere(str(error))

    return Kept


@cache
def digest(file: str) -> str:
    """Of the text of a file and of all that it imports by relative imports, and they in turn."""
    todo, seen = [Path(file).resolve()], {}
    while todo:
        path = todo.pop()
        if path in seen or not path.is_file():
            continue
        text = seen[path] = path.read_bytes()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                home = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                todo += [home.with_suffix(".py"), *(home / f"{name.name}.py" for name in node.names)]
    return hashlib.sha256(b"\0".join(seen[path] for path in sorted(seen))).hexdigest()


_told: list[str] = []


def _nowhere(why: str) -> None:
    if not _told:
        _told.append(why)
        warnings.warn(
            f"compiled loops cannot be kept on disk ({why}): each process compiles them anew, a few seconds each at first use; "
            "set NUMBA_CACHE_DIR to a folder that can be written", RuntimeWarning, stacklevel=3)
