"""Rules that spend the budget where it is worth most: rows differ in how much they keep, their mean is the budget.

Each gives units a level: the mass, or the distance from the largest, at which they are reached. What lies at or below the dial is
kept. The dial is a setting of the paper's (p, a threshold), or fitted: with 0 it becomes the value at which calibration text is kept to the
budget's share of pairs, which lets methods be compared at equal density.

Shape letters as in scores.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import BadInput
from ...kernels.block_attention import BlockMask
from ...kernels.block_attention.reach import reach
from ...method import not_negative
from .fitted import Fitted

BINS = 4096
"""Cells of the histogram of levels from which a dial is read."""


class Levels(Fitted):
    """Keep units whose level is at or below a dial.

    Args:
        dial: the level, or 0 to fit it to the budget.
    """

    span: ClassVar[tuple[float, float]] = (0.0, 30.0)
    """Levels told apart; a level beyond counts as the nearest."""
    dials_2: Tensor

    def __init__(self, budget: float = 0.25, block: int = 16, query_block: int = 1, dial: float = 0.0) -> None:
        super().__init__(budget, block, query_block)
        self.dial = not_negative("dial", dial)
        self.register_buffer("dials_2", torch.zeros(0, dtype=torch.long))      # cells of the histogram: whole in every dtype

    def shapes(self, H: int, G: int, D: int) -> Mapping[str, tuple[int, ...]]:
        """dials_2: of shared choices in prefill, and of single queries."""
        return {"dials_2": (2,)}

    def levels(self, score_BHQN: Tensor, always_BHQN: Tensor) -> Tensor:
        """[B, H, Q, N]; low is kept first. Scores are -inf at units not seen; those of `always` are kept whatever their level."""
        raise NotImplementedError

    def level_of(self, dial: float) -> float:
        """The setting as a level."""
        return dial

    def choose(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
        """Units at or below the dial. Raises BadInput while the dial is still to be fitted; one dial serves any heads."""
        rows = self._rows(q_BHTD.shape[2])
        level, seen = self.reached(q_BHTD.detach(), k_BGSD.detach(), rows, causal)
        return (level <= self.at(rows)) & seen

    def at(self, rows: int) -> float:
        """The level at which to stop, for choices shared by `rows` queries."""
        if self.dial:
            return self.level_of(self.dial)
        if not self.ready:
            raise BadInput(f"{self.name} is calibrated and saw no data; pass it through rarefy.calibrate first, or set its dial")
        cell, (low, high) = int(self.dials_2[1 if rows == 1 else 0]), self.span
        return torch.inf if cell > BINS else low + (high - low) * cell / BINS if cell else -torch.inf

    def reached(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> tuple[Tensor, Tensor]:
        """Levels [B, H, Q, N], -inf where always kept, and which units are seen at all."""
        raw = self.scores(q_BHTD, k_BGSD, rows, causal)
        score, _ = self.bounded(raw, q_BHTD.shape[2], k_BGSD.shape[2], rows, causal)
        seen, always = score > -torch.inf, score == torch.inf
        return self.levels(raw.masked_fill(~seen, -torch.inf), always).masked_fill(always, -torch.inf), seen

    def gather(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Mapping[str, Tensor]:
        """Histograms of levels, weighted by pairs, for shared and for single choices, which methods for prefill never make."""
        shared = self._histogram(q_BHTD, k_BGSD, self._rows(q_BHTD.shape[2]))
        return {"shared": shared, "single": shared if self.query_block == 1 or self.prefill_only else self._histogram(q_BHTD, k_BGSD, 1)}

    def _histogram(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int) -> Tensor:
        level, seen = self.reached(q_BHTD, k_BGSD, rows, True)
        pairs_QN = BlockMask(seen, None, None, self.block, rows).visible(q_BHTD.shape[2], k_BGSD.shape[2], True)
        low, high = self.span
        cell = ((level.double() - low) / (high - low) * BINS).ceil().clamp(1, BINS).masked_fill(level == -torch.inf, 0).long()
        weight = (pairs_QN * seen).expand(level.shape)
        return torch.zeros(BINS + 1, dtype=torch.float64, device=level.device).index_add_(0, cell.flatten(), weight.flatten())

    def settle(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The cell's edge at which the share kept is nearest to the budget; without bound at budget 1."""
        dials = []
        for name in ("shared", "single"):
            share = sums[name].cumsum(0) / sums[name].sum()
            dials.append(BINS + 1 if self._budget == 1 else int((share - self._budget).abs().argmin()))
        return {"dials_2": torch.tensor(dials)}


class TopP(Levels):
    """The fewest units whose share of the row's softmax over units reaches p (top-p of Twilight, Lin et al. 2025, arXiv 2502.02770).

    A unit's level is -log of the mass that it and all less likely ones hold: below -log(1 - p) the mass before it is below p.
    `scores` must be logits; units that are always kept count first.

    Args:
        dial: p, in (0, 1), or 0 to fit it to the budget.
    """

    def __init__(self, budget: float = 0.25, block: int = 16, query_block: int = 1, dial: float = 0.0) -> None:
        super().__init__(budget, block, query_block, dial)
        if dial >= 1:
            raise BadInput(f"dial={dial!r} must be below 1: a share of attention (budget=1 keeps everything)")

    def level_of(self, dial: float) -> float:
        """-log(1 - p)."""
        return float(-torch.log1p(torch.tensor(-dial, dtype=torch.float64)))

    def choose(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
        """As Levels; in float32 a row's mass is gone through digit by digit and not sorted."""
        if type(self).reached is not Levels.reached or type(self).levels is not TopP.levels or q_BHTD.dtype != torch.float32:
            return super().choose(q_BHTD, k_BGSD, causal)
        rows = self._rows(q_BHTD.shape[2])
        raw = self.scores(q_BHTD.detach(), k_BGSD.detach(), rows, causal)
        score, _ = self.bounded(raw, q_BHTD.shape[2], k_BGSD.shape[2], rows, causal)
        seen, always = score > -torch.inf, score == torch.inf
        return self.reach(raw.masked_fill(~seen, -torch.inf), always, rows) & seen

    def reach(self, score_BHQN: Tensor, always_BHQN: Tensor, rows: int) -> Tensor:
        """[B, H, Q, N] bool: what `levels` puts at or below the dial."""
        mass = score_BHQN.to(torch.promote_types(score_BHQN.dtype, torch.float32)).softmax(-1).nan_to_num(0.0)
        return reach(mass, always_BHQN, math.exp(-self.at(rows)) if self.at(rows) > -700 else math.inf)

    def levels(self, score_BHQN: Tensor, always_BHQN: Tensor) -> Tensor:
        """-log(mass from here on), in falling order of mass, what is always kept before the rest."""
        score = score_BHQN.to(torch.promote_types(score_BHQN.dtype, torch.float32))
        return tail_levels(score.softmax(-1).nan_to_num(0.0), always_BHQN)


def tail_levels(mass: Tensor, first: Tensor | None = None, within: bool = False) -> Tensor:
    """-log of the share of a row's mass that lies at a unit and all lighter ones; units of `first` come before all others.

    At or below -log(1 - p) lie the fewest units that reach p; with `within`, where a unit's own mass is left out, those that together stay
    within p, the heaviest in any case. Of equally heavy units the one with the lower index is reached first. Tails are summed from the light
    end, so that levels far beyond what 1 - (mass before) could tell apart stay exact.
    """
    key = mass if first is None else mass + 2 * mass.sum(-1, keepdim=True) * first
    order = key.argsort(dim=-1, descending=True, stable=True)
    tail = mass.gather(-1, order).flip(-1).cumsum(-1).flip(-1)
    total = tail[..., :1]
    if within and tail.shape[-1]:
        tail = torch.cat((total, tail[..., 2:], torch.zeros_like(total)), -1)[..., : tail.shape[-1]]
    level = -(tail / total.clamp_min(torch.finfo(tail.dtype).tiny)).log()
    return torch.empty_like(level).scatter_(-1, order, level)
