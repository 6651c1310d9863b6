"""Vertical-slash attention of MInference (Jiang et al. 2024, arXiv 2407.02490): columns and diagonals that the last queries show.

The last 64 queries' exact attention is summed by key (verticals) and by distance (slashes); the heaviest of each are attended to by all
queries of the prefill.

Shape letters as in scores.py; P = probing queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...method import fraction, positive
from ..block import TokenAttention
from .by_lines import ByLines, lowest_lines, visible
from .scores import later, probabilities


def line_levels(mass_BHS: Tensor, T: int) -> Tensor:
    """[B, H, S] share of all visible pairs that a line and all heavier ones cover; line s is seen by min(T, S - s) queries."""
    S = mass_BHS.shape[-1]
    order = mass_BHS.argsort(dim=-1, descending=True, stable=True)
    pairs_S = (S - torch.arange(S, device=mass_BHS.device)).clamp_max(T).double()
    return torch.empty_like(mass_BHS, dtype=torch.float64).scatter_(-1, order, pairs_S[order].cumsum(-1) / pairs_S.sum())


class VerticalSlash(ByLines, TokenAttention):
    """Whole columns and whole diagonals, taken in the order of their mass until the budget's share of pairs is reached.

    The paper fixes both counts, and its code always keeps the first 30 columns and the nearest 100 diagonals; here `share` of the pairs goes to
    columns and the rest to diagonals, overlaps counted once, and only the diagonal of own keys is kept whatever its mass. Decoding steps are
    dense, as in the paper; early queries follow what the last ones show.

    Args:
        budget: fraction of visible pairs.
        share: of the budget, for columns.
        last: probing queries, at most those there are.
    """

    name = "attention/vertical_slash"
    unit = "column or diagonal"
    prefill_only = True

    def __init__(self, budget: float = 0.25, share: float = 0.5, last: int = 64) -> None:
        super().__init__(budget)
        self.share, self.last = fraction("share", share), positive("last", last)

    def lines(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Mass of each column and of each diagonal (by distance, from 0), [B, H, S] each, over the last queries."""
        P, S = min(self.last, q_BHTD.shape[2]), k_BGSD.shape[2]
        attention_BHPS = probabilities(q_BHTD[:, :, -P:], k_BGSD, causal)
        back_PS = (torch.arange(S - P, S, device=q_BHTD.device)[:, None] - torch.arange(S, device=q_BHTD.device)).abs()
        slash = attention_BHPS.new_zeros(*attention_BHPS.shape[:2], S)
        slash.scatter_add_(-1, back_PS.flatten().expand(*slash.shape[:2], -1), attention_BHPS.flatten(2))
        return attention_BHPS.sum(2), slash

    def levels(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """(how early each pair's column or diagonal is reached [B, H, T, S], -inf at own keys and inf where not seen; what is seen [T, S])."""
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        column, slash = (line_levels(x, T) for x in self.lines(q_BHTD.detach(), k_BGSD.detach(), causal))
        back_TS = (torch.arange(S - T, S, device=column.device)[:, None] - torch.arange(S, device=column.device)).abs()
        level = torch.minimum(column[:, :, None] / self.share, slash[:, :, back_TS] / max(1 - self.share, 1e-9))
        seen_TS = ~later(T, S, column) if causal else torch.ones(T, S, dtype=torch.bool, device=column.device)
        return level.masked_fill(back_TS == 0, -torch.inf).masked_fill(~seen_TS, torch.inf), seen_TS

    def choose(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
        """[B, H, T, S] bool."""
        level, seen_TS = self.levels(q_BHTD, k_BGSD, causal)
        keep = max(1, round(self._budget * int(seen_TS.sum())))
        return (level <= level.flatten(2).kthvalue(keep, -1).values[..., None, None]) & seen_TS

    def lines_of(self, q_BHTD: Tensor, k_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        """The columns and distances whose pairs `choose` keeps."""
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        column, slash = (line_levels(x, T) for x in self.lines(q_BHTD, k_BGSD, True))
        slash = slash / max(1 - self.share, 1e-9)
        slash[..., 0] = -torch.inf
        return lowest_lines(column / self.share, slash, T, max(1, round(self._budget * visible(T, S))))

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """Logits of the probing queries, shared among all queries of a prefill."""
        T = self._shape[3] if self._shape else self.last
        return 2 * heads * width * keys * min(self.last, T) / max(T, 2 * self.last)
