"""Methods that choose whole columns and whole diagonals: a prefill attends to those without the matrix of pairs.

`choose` says the same pair by pair; it defines the method, and serves where the compiled path does not (gradients, other devices and
dtypes, attention that is not causal).

Shape letters as in scores.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.block_attention import available
from ...kernels.block_attention.lines import line_attention, line_pairs
from ..block import BlockAttention


def visible(T: int, S: int) -> int:
    """Pairs of T queries at the end of S keys whose key is not ahead."""
    return T * S - T * (T - 1) // 2


class ByLines(BlockAttention):
    """Write `lines_of`; `choose` must say the same."""

    wants = ("cache",)

    def lines_of(self, q_BHTD: Tensor, k_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        """(keys [B, H, S], distances [B, H, S]) bool that all queries of a causal prefill attend to; logits are q k / sqrt(D)."""
        raise NotImplementedError

    def by_lines(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> bool:
        """Whether lines serve this call."""
        return causal and q.shape[2] > 1 and self._rows(q.shape[2]) == 1 and bool(q.numel()) and available(q, k, v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        if not self.by_lines(q, k, v, causal):
            return super()._attend(q, k, v, scale, causal)
        (B, H, T, D), S = q.shape, k.shape[2]
        self._shape = (H, D, S, T)
        unit = scale * D**0.5
        column, back = self.lines_of(q if abs(unit - 1) < 1e-12 else q * unit, k)
        column, back = column.expand(B, H, S), back.expand(B, H, S)
        self._kept += float(line_pairs(column, back, T).sum())
        self._seen += float(visible(T, S) * B * H)
        return line_attention(q, k, v, column, back, scale=scale)


def lowest_lines(column_BHS: Tensor, back_BHS: Tensor, T: int, keep: int) -> tuple[Tensor, Tensor]:
    """Columns and distances of the lowest levels, the fewest whose union holds `keep` of the pairs of T queries; ties all at once.

    Halving over the sorted levels: each look counts a union in time S.
    """
    level = torch.cat((column_BHS, back_BHS), -1).sort(-1).values
    low, high = level.new_zeros(level.shape[:2], dtype=torch.long), level.new_full(level.shape[:2], level.shape[-1] - 1, dtype=torch.long)
    while bool((low < high).any()):
        middle = (low + high) // 2
        at = level.gather(-1, middle[..., None])
        enough = line_pairs(column_BHS <= at, back_BHS <= at, T) >= keep
        low, high = torch.where(enough, low, middle + 1).minimum(high), torch.where(enough, middle, high)
    at = level.gather(-1, high[..., None])
    return column_BHS <= at, back_BHS <= at
