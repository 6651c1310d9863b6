"""The Python source that the built-in model is trained on, and the files it never sees.

Permissively licensed packages as installed on the machine: the standard library (PSF), torch (BSD-3), transformers
(Apache-2.0), numpy, scipy and scikit-learn (BSD-3). A file is held out by a hash of its name, 1 in 20, so the split
does not depend on order, machine or version. Exact copies and vendored copies are dropped once seen.
"""
import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

PACKAGES = {"stdlib": "PSF-2.0", "torch": "BSD-3-Clause", "transformers": "Apache-2.0", "numpy": "BSD-3-Clause",
            "scipy": "BSD-3-Clause", "sklearn": "BSD-3-Clause"}
HELD_OUT_ONE_IN = 20
MAX_BYTES, MIN_BYTES = 200_000, 200
SKIP = {"site-packages", "__pycache__", "lib2to3", "idlelib", "turtledemo", "externals", "_vendor", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class SourceFile:
    name: str          # package/relative/path.py
    text: str


def held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT_ONE_IN == 0


def _root(package: str) -> Path:
    paths = sysconfig.get_paths()
    return Path(paths["stdlib"]) if package == "stdlib" else Path(paths["purelib"]) / package


def read_split() -> tuple[list[SourceFile], list[SourceFile]]:
    """(training files, held-out files), each in a fixed order."""
    train, held, seen = [], [], set()
    for package in PACKAGES:
        root = _root(package)
        if not root.is_dir():
            raise SystemExit(f"{package} is not installed: pip install -c constraints.txt '.[dev]' numpy scipy scikit-learn")
        for path in sorted(root.rglob("*.py")):
            inside = path.relative_to(root)
            if SKIP & set(inside.parts) or not MIN_BYTES <= path.stat().st_size <= MAX_BYTES:
                continue
            data = path.read_bytes()
            digest = hashlib.sha256(data).digest()
            if digest in seen:
                continue
            seen.add(digest)
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError:
                continue
            name = f"{package}/{inside.as_posix()}"
            (held if held_out(name) else train).append(SourceFile(name, text))
    return train, held
