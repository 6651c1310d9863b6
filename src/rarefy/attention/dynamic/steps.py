"""Methods for denoising: the same tokens pass many times, and what one step finds out serves the next.

Between calls nothing may be kept unasked, so a run of steps is a context:

    with method.denoising(steps=50):
        for step in range(50):
            model(...)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..block import BlockAttention


class Stepwise(BlockAttention):
    """An attention method with something kept from step to step, of each layer and padded row."""

    _run: dict[tuple[int, int], dict[str, Any]] | None = None
    _steps = 0

    @contextmanager
    def denoising(self, steps: int) -> Iterator[None]:
        """A run of so many steps, each one call a layer; what was kept is forgotten at its end. Outside, each call is by itself."""
        before = self._run, self._steps
        self._run, self._steps = {}, steps
        try:
            yield
        finally:
            self._run, self._steps = before

    def step(self) -> tuple[int, dict[str, Any]] | None:
        """(number of this layer's step, what is kept for it), counted up at each call; None outside a run."""
        if self._run is None:
            return None
        state = self._run.setdefault((self._layer, self._row), {"next": 0})
        state["next"] += 1
        return state["next"] - 1, state
