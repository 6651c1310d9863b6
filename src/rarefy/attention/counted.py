"""What every attention method counts: pairs kept of pairs seen, and the size of its last call, from which its cost follows.

Shape letters: H = query heads, T = queries, S = keys, D = head width.
"""

from __future__ import annotations

from ..cost import Cost
from ..errors import BadInput
from ..method import Sparse


class Counted(Sparse):
    """A method adds to `_kept` and `_seen`, pairs of a query and a key over batch and heads, and sets `_shape` to (H, D, S, T) in every call."""

    unit = "key"

    def __init__(self) -> None:
        super().__init__()
        self._kept = self._seen = 0.0
        self._shape: tuple[int, int, int, int] | None = None

    @property
    def budget(self) -> float:
        """1, unless a method takes one: how much is kept follows from what it is."""
        return 1.0

    def measured_density(self) -> float:
        """Pairs kept of pairs visible, over every call since this was last asked; 1 if there was none."""
        kept, seen = self._kept, self._seen
        self._kept = self._seen = 0.0
        return kept / seen if seen else 1.0

    def dims(self) -> tuple[int, int, float]:
        """(H, D, keys that a query sees on average) of the last call. Raises BadInput before the first."""
        if self._shape is None:
            raise BadInput(f"{self.name}: the cost depends on heads and context; run it once, then ask")
        H, D, S, T = self._shape
        return H, D, S - (T - 1) / 2

    def dense_cost(self) -> Cost:
        """Per query of dense causal attention at the same context; bytes are keys and values in float32."""
        H, D, S = self.dims()
        return Cost(4 * H * D * S, 8 * H * D * S)
