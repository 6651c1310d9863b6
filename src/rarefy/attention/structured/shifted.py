"""Patterns that a model is trained under and served without: cheap long contexts in fine-tuning, dense attention at inference.

    LongLoRA (Chen et al. 2023, arXiv 2309.12307): groups of keys; half the heads have groups moved by half a group, the ends wrapped into one
    SinkLoRA (Zhang 2024, arXiv 2406.05678): the same, a share of the moved heads put back, and sinks that all see
    SCCA (Guo et al. 2023, arXiv 2312.07305): queries of a chunk see keys of a chunk moved by a part of it, another part in other heads
The masks are those of the zoo. In training mode attention is by the mask; in eval mode (`model.eval()`, `method.eval()`) it is dense.
"""

from __future__ import annotations

from ...method import positive
from ..pattern import PatternAttention
from ..patterns import full
from ..patterns.zoo import text

_DENSE = full()


class Trainable(PatternAttention):
    """Its pattern while `training`, dense otherwise. Padding, blocks and densities as in PatternAttention."""

    def __init__(self, pattern: str, block: int, query_block: int) -> None:
        super().__init__(pattern, block, query_block)
        self._mine = self.pattern

    def train(self, mode: bool = True) -> Trainable:
        """Into training (the pattern) or out of it (dense)."""
        super().train(mode)
        self.pattern = self._mine if mode else _DENSE
        return self


class LongLoRA(Trainable):
    """Shifted sparse attention (S2-Attn).

    Args:
        group: keys in a group, the paper's default a quarter of the context.
    """

    name = "attention/longlora"

    def __init__(self, group: int = 512, block: int = 64, query_block: int = 64) -> None:
        super().__init__(str(text.longlora(positive("group", group))), block, query_block)


class SinkLoRA(Trainable):
    """Sink fixed attention (SF-Attn).

    Args:
        group: keys in a group.
        first: sinks.
        shifted: part of the heads that stays moved, 1 / n.
    """

    name = "attention/sinklora"

    def __init__(self, group: int = 512, first: int = 4, shifted: float = 0.25, block: int = 64, query_block: int = 64) -> None:
        super().__init__(str(text.sinklora(positive("group", group), first, shifted)), block, query_block)


class SCCA(Trainable):
    """Shifted cross chunk attention.

    Args:
        chunk: keys in a chunk.
        shifts: how many different ones: equal shares of the heads move keys by 0, 1, 2, ... of so many parts of a chunk. 2 is the paper's half of
            the heads by half a chunk, as many as there are heads gives each its own.
    """

    name = "attention/scca"

    def __init__(self, chunk: int = 512, shifts: int = 2, block: int = 64, query_block: int = 64) -> None:
        moves = tuple(n * positive("chunk", chunk) // shifts for n in range(positive("shifts", shifts)))
        super().__init__(str(text.scca(chunk, moves)), block, query_block)
