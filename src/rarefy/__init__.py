"""rarefy: one instrument for sparsity in neural networks.

Names are loaded on first use (PEP 562), so that `import rarefy` brings in neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "BadInput": "errors", "Damaged": "errors", "RarefyError": "errors", "Unsupported": "errors",
    "Selection": "selection",
    "Cost": "cost", "timed": "cost",
    "Sparse": "method", "Loss": "method",
    "load": "store.methods", "save": "store.methods",
    "sites": "site", "replaced": "site", "capture": "site",
    "open_model": "hub",
    "entry": "catalogue", "plan": "jobs.build",
    "calibrate": "fit", "train": "fit", "Recipe": "fit",
    "LiveStream": "streams", "StoreStream": "streams", "TensorStream": "streams", "windows": "streams",
    "share": "budget",
    "measure": "frontier", "sweep": "frontier", "pareto": "frontier", "Point": "frontier", "Frontier": "frontier",
    "documents": "builtin.corpus", "text": "builtin.corpus",
    "check_method": "contract",
    "kv_cache": "attention.cache",
}
__all__ = sorted([*_HOME, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"rarefy.{_HOME[name]}"), name)
    raise AttributeError(f"module 'rarefy' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
