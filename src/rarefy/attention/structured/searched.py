"""Static patterns found by calibration: which of a family each head gets follows from what each would do to it.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width, R = patterns to choose from, X = choices made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import BadInput
from ..dynamic.fitted import Fitted
from ..pattern import PatternAttention
from ..patterns import parse
from ..trained.base import causal_mask

GRID = 1024
"""Costs are rounded up to this part of all pairs in the search."""


def allot(error_XR: Tensor, cost_XR: Tensor, budget: float) -> Tensor:
    """[X] an option for each of X: least total error at a mean cost of at most the budget, exactly; the cheapest of each if none fits.

    A knapsack with one of R taken from each of X, by a table over the cost spent (costs in 1 / GRID, rounded up).
    """
    error, cost = error_XR.double().cpu().numpy(), np.ceil(cost_XR.double().cpu().numpy() * GRID - 1e-6).astype(np.int64)
    room = math.floor(budget * GRID * len(error) + 1e-6)
    if cost.min(1).sum() > room:
        return torch.from_numpy(cost.argmin(1))
    best, taken = np.zeros(room + 1), []
    for errors, costs in zip(error, cost, strict=True):
        each = np.full((len(costs), room + 1), np.inf)
        for r, c in enumerate(costs):
            if c <= room:
                each[r, c:] = best[: room + 1 - c] + errors[r]
        taken.append(each.argmin(0))
        best = each.min(0)
    choice, left = np.zeros(len(error), dtype=np.int64), room
    for x in reversed(range(len(error))):
        choice[x] = taken[x][left]
        left -= cost[x, choice[x]]
    return torch.from_numpy(choice)


class Searched(Fitted):
    """Attention by the pattern chosen for each head. A subclass says what an option does harm (`harm`) and how one is picked (`pick`).

    Args:
        budget: mean fraction of visible pairs kept over heads, at the lengths calibrated with.
        options: expressions with semicolons between.
        block, query_block: what the kernel works on at a time.

    Raises:
        BadInput: an expression that cannot be read, fewer than two options.
    """

    unit = "key"
    choice_H: Tensor
    harm_HR: Tensor
    share_HR: Tensor

    def __init__(self, budget: float, options: str, block: int, query_block: int) -> None:
        texts = [text.strip() for text in options.split(";")] if isinstance(options, str) else []
        if len(texts) < 2:
            raise BadInput(f"options={options!r} must be at least two patterns with a semicolon between, such as 'full(); window(64)'")
        self.options = [parse(text) for text in texts]
        super().__init__(budget, block, query_block)
        self._made: tuple[tuple[int, ...], PatternAttention] | None = None

    def shapes(self, H: int, G: int, D: int) -> Mapping[str, tuple[int, ...]]:
        """The option of each head, what each option would harm and keep there."""
        return {"choice_H": (H,), "harm_HR": (H, len(self.options)), "share_HR": (H, len(self.options))}

    def harm(self, q: Tensor, k: Tensor, v: Tensor, keep_RTS: Tensor) -> Tensor:
        """[H, R] sums over a batch of what keeping only those pairs costs."""
        raise NotImplementedError

    def pick(self, harm_HR: Tensor, share_HR: Tensor) -> Tensor:
        """[H] number of an option each."""
        return allot(harm_HR, share_HR, self._budget)

    def gather(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Mapping[str, Tensor]:
        """Harm and pairs kept, by head and option, and pairs seen."""
        B, H, T, _ = q_BHTD.shape
        S = k_BGSD.shape[2]
        keep_RTS = torch.stack([option.mask(T, S) for option in self.options]).to(q_BHTD.device)
        kept = keep_RTS.sum((1, 2)).double() * B
        seen = causal_mask(T, S).sum().double() * B
        return {"harm": self.harm(q_BHTD, k_BGSD, v_BGSD, keep_RTS).double(), "kept": kept.expand(H, -1), "seen": seen.to(kept.device)}

    def settle(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Means, and the choice by them."""
        harm, share = sums["harm"] / sums["seen"], sums["kept"] / sums["seen"]
        return {"harm_HR": harm, "share_HR": share, "choice_H": self.pick(harm, share)}

    def chosen(self) -> PatternAttention:
        """Attention by the patterns now chosen."""
        choice = tuple(int(n) for n in self.choice_H.tolist())
        if self._made is None or self._made[0] != choice:
            text = "heads(" + ", ".join(str(self.options[n]) for n in choice) + ")"
            self._made = choice, PatternAttention(text, self.block, self.query_block)
        return self._made[1]

    def choose(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
        """[B, H, Q, N] bool: blocks with a pair of the chosen patterns."""
        self._fits(q_BHTD, k_BGSD)
        return self.chosen().choose(q_BHTD, k_BGSD, causal)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        self._fits(q, k)
        by = self.chosen()
        self._shape = (q.shape[1], q.shape[-1], k.shape[2], q.shape[2])
        return by.attend(q, k, v, scale=scale, causal=causal, layer=self._layer)

    def measured_density(self) -> float:
        """Pairs kept of pairs visible, over every call since this was last asked; 1 if there was none."""
        return self._made[1].measured_density() if self._made else 1.0

    def reference(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
        """Dense scores under the chosen patterns."""
        self._fits(q_BHTD, k_BGSD)
        return self.chosen().reference(q_BHTD, k_BGSD, v_BGSD)

    def __deepcopy__(self, memo: dict[int, Any]) -> Searched:
        other = type(self)(**self.arguments)
        memo[id(self)] = other
        other.load_state_dict(self.state_dict())
        return other.to(self.harm_HR.dtype).train(self.training)
