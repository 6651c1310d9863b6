"""Key-value caches: one that grows in place, and policies that keep, compress or choose among its entries.

`Cache()` is a drop-in for transformers' DynamicCache that attention methods can hang derived data on. `make(name, ...)`
gives a policy by its catalogue name below cache/.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from ...catalogue import card
from ...errors import BadInput
from .base import Cache, Layer
from .policy import Policy, PolicyLayer

__all__ = ["Cache", "Layer", "Policy", "PolicyLayer", "kv_cache", "make"]


def make(name: str, **arguments: Any) -> Policy:
    """A policy by its catalogue name below cache/: `make("snapkv", budget=0.25)`.

    Raises:
        BadInput: unknown names, with the nearest ones; arguments out of range.
    """
    found = card(f"cache/{name.removeprefix('cache/')}")
    if found.kind != "cache":
        raise BadInput(f"{found.name} is a {found.kind}, not a cache")
    return found.object()(**arguments)


@contextlib.contextmanager
def kv_cache(model: nn.Module, name: str, **arguments: Any) -> Iterator[Policy]:
    """A policy at work in a model: `with kv_cache(model, "h2o", budget=0.2) as cache: model.generate(..., past_key_values=cache)`."""
    with make(name, **arguments).on(model) as cache:
        yield cache
