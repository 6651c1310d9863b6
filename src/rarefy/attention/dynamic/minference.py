"""MInference (Jiang et al. 2024, arXiv 2407.02490): each head has the pattern that serves it best, found once offline.

Three patterns at one budget: a window with sinks (A-shape), columns and diagonals (vertical-slash), blocks by pooled products
(block-sparse). On calibration text a head takes the one whose output is nearest to dense attention's. For prefill: decoding is dense.

Shape letters as in scores.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...kernels.block_attention import BlockMask, block_attention
from ...method import positive
from ..heads import per_head
from .by_lines import ByLines, visible
from .fitted import Fitted
from .pooled import Pooled
from .scores import later, logits
from .vertical_slash import VerticalSlash

PATTERNS = ("A-shape", "vertical-slash", "block-sparse")


def a_shape(T: int, S: int, budget: float, sinks: int, causal: bool, device: torch.device) -> Tensor:
    """[T, S] bool: the first keys and a window, the widest that leaves within the budget's share of visible pairs; the own key at least."""
    place_T, place_S = torch.arange(S - T, S, device=device), torch.arange(S, device=device)
    back_TS = place_T[:, None] - place_S
    seen_TS = back_TS >= 0 if causal else torch.ones_like(back_TS, dtype=torch.bool)
    far_TS = back_TS.abs().masked_fill(place_S < sinks, 0).masked_fill(~seen_TS, S)
    count_S = torch.bincount(far_TS.flatten(), minlength=S + 1)[:S].cumsum(0)          # pairs of a window of 1, 2, ...
    return far_TS <= max(0, int((count_S <= budget * int(seen_TS.sum())).sum()) - 1)


def a_reach(T: int, S: int, budget: float, sinks: int) -> int:
    """The window of `a_shape` in a causal prefill, as its farthest distance, from counts of pairs and not the pairs."""
    at_S = torch.arange(S)
    outside_S = (S - (sinks + at_S).clamp_min(S - T)).clamp_min(0)                     # pairs at a distance whose key is no sink
    count_S = outside_S.cumsum(0) + (S - at_S[:sinks]).clamp_max(T).sum()
    return max(0, int((count_S <= budget * visible(T, S)).sum()) - 1)


class MInference(ByLines, Fitted):
    """The pattern of each head, at one budget.

    The paper searches counts of columns and diagonals too, at equal FLOPs; here the budget fixes them (see attention/vertical_slash). Its code counts
    the outputs that are off by more than 0.005, or the attention kept; here errors are squared, which needs no threshold.

    Args:
        budget: fraction of visible pairs.
        last: probing queries of the vertical-slash pattern.
        side: queries and keys of a block of the block-sparse pattern.
        sinks: first keys of the A-shape pattern.
    """

    name = "attention/minference"
    unit = "key"
    prefill_only = True
    pattern_H: Tensor

    def __init__(self, budget: float = 0.25, last: int = 64, side: int = 16, sinks: int = 4) -> None:
        super().__init__(budget, 1, 1)
        self.last, self.side, self.sinks = positive("last", last), positive("side", side), positive("sinks", sinks)
        self.lines, self.blocks = VerticalSlash(self._budget, last=last), Pooled(self._budget, side, side)

    def shapes(self, H: int, G: int, D: int) -> Mapping[str, tuple[int, ...]]:
        """pattern_H: index into PATTERNS."""
        return {"pattern_H": (H,)}

    def pairs(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> list[Tensor]:
        """[B, H, T, S] bool of each pattern."""
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        blocks = self.blocks.choose(q_BHTD, k_BGSD, causal)
        rows = 1 if T == 1 else self.side
        return [
            a_shape(T, S, self._budget, self.sinks, causal, q_BHTD.device).expand(*q_BHTD.shape[:2], T, S),
            self.lines.choose(q_BHTD, k_BGSD, causal),
            BlockMask(blocks, None, None, self.side, rows).pairs(T, S, causal),
        ]

    def gather(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Mapping[str, Tensor]:
        """Squared error of each head's output under each pattern."""
        score = logits(q_BHTD, k_BGSD).double()
        score = score.masked_fill(later(*score.shape[2:], score), -torch.inf)
        v = per_head(v_BGSD, q_BHTD.shape[1]).double()
        dense = score.softmax(-1) @ v
        errors = [(score.masked_fill(~keep, -torch.inf).softmax(-1) @ v - dense).square().sum((0, 2, 3)) for keep in self.pairs(q_BHTD, k_BGSD, True)]
        return {"error": torch.stack(errors)}

    def settle(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The pattern of least error; of equal ones the earlier."""
        return {"pattern_H": sums["error"].argmin(0)}

    def choose(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
        """[B, H, T, S] bool."""
        self._fits(q_BHTD, k_BGSD)
        found = torch.stack([keep.expand(q_BHTD.shape[0], -1, -1, -1) for keep in self.pairs(q_BHTD.detach(), k_BGSD.detach(), causal)])
        head_H = torch.arange(q_BHTD.shape[1], device=found.device)
        return found[self.pattern_H.long(), :, head_H].transpose(0, 1)

    def lines_of(self, q_BHTD: Tensor, k_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        """Sinks and window of A-shape heads, columns and distances of vertical-slash heads, nothing of the others."""
        (B, H, T, _), S = q_BHTD.shape, k_BGSD.shape[2]
        kind_H1, at_S = self.pattern_H[:, None], torch.arange(S, device=q_BHTD.device)
        column = ((kind_H1 == 0) & (at_S < self.sinks)).expand(B, H, S)
        back = ((kind_H1 == 0) & (at_S <= a_reach(T, S, self._budget, self.sinks))).expand(B, H, S)
        if not (kind_H1 == 1).any():
            return column, back
        column, back = column.clone(), back.clone()
        at, group = self._heads(1, H // k_BGSD.shape[1])
        column[:, at], back[:, at] = self.lines.lines_of(q_BHTD[:, at], k_BGSD[:, group])
        return column, back

    def _heads(self, kind: int, share: int) -> tuple[Tensor, Tensor]:
        """Query heads of a pattern, and the key head of each."""
        at = (self.pattern_H == kind).nonzero()[:, 0]
        return at, at // share

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        if not self.by_lines(q, k, v, causal):
            return super()._attend(q, k, v, scale, causal)
        self._fits(q, k)
        out, T, S = super()._attend(q, k, v, scale, causal), q.shape[2], k.shape[2]
        at, group = self._heads(2, q.shape[1] // k.shape[1])
        if not len(at):
            return out
        q, k, v = q[:, at], k[:, group], v[:, group]
        chosen = self.blocks.choose(q * (scale * q.shape[3] ** 0.5), k, True)
        self._kept += float((chosen * BlockMask(chosen, None, None, self.side, self.side).visible(T, S, True)).sum())
        out[:, at] = block_attention(q, k, v, chosen, block=self.side, query_block=self.side, scale=scale)
        return out

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """The probing queries of the heads that probe, and the pooled products of those that pool."""
        if not self.ready:
            return 0.0
        share = [float((self.pattern_H == n).double().mean()) for n in range(3)]
        T = self._shape[3] if self._shape else self.last
        probing = 2 * heads * width * keys * min(self.last, T) / max(T, 2 * self.last)
        return share[1] * probing + share[2] * 2 * heads * width * keys / self.side**2
