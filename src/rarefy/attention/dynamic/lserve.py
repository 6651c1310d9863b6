"""LServe (Yang et al. 2025, arXiv 2502.14866): streaming heads, and pages judged by the bounds of their parts.

Half of the heads look at the first and the newest keys only; the others choose pages. A page is stored whole and judged in parts: each
logical page of `part` keys keeps the channel-wise minimum and maximum of its keys, the bound on its logits is that of QUEST, and the page's
score the largest of its parts'. The chosen pages serve `reuse` queries in a row, by the choice of the first of them.

Which heads stream: those with the most attention on the first and newest keys, in calibration text; the paper takes DuoAttention's learned
gates. Its budget is a constant number of pages; here it is a share of what a query sees, as everywhere. Other heads are dense in
the paper's prefill; here they choose there too.
Shape letters as in scores.py; C = the query that others take their choice from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...errors import BadInput
from ...kernels.block_attention import blocks_of
from ...method import fraction, positive
from .fitted import Fitted
from .scores import bounds, largest, page_bounds, probabilities


class LServe(Fitted):
    """Streaming heads beside heads that choose pages.

    Args:
        budget: share of the visible pages that a choosing head keeps, its own among them.
        block: keys of a page. part: keys of a logical page, which divides `block`.
        reuse: queries served by one choice. Where one is taken over, the pages begun since are kept as well.
        streaming: share of heads that stream.
        sinks, window: pages at the start and at the end that streaming heads see.
    """

    name = "attention/lserve"
    wants = ("cache",)
    streams_H: Tensor

    def __init__(
        self, budget: float = 0.25, block: int = 64, query_block: int = 1, part: int = 16, reuse: int = 1, streaming: float = 0.5,
        sinks: int = 1, window: int = 4,
    ) -> None:
        super().__init__(budget, block, query_block)
        self.part, self.reuse, self.streaming = positive("part", part), positive("reuse", reuse), fraction("streaming", streaming)
        if block % part:
            raise BadInput(f"part={part} must divide block={block}")
        if reuse > 1 and query_block > 1:
            raise BadInput(f"reuse={reuse} needs query_block=1: queries of a block share their choice already")
        self.sinks, self.window = positive("sinks", sinks), positive("window", window)
        self._past: WeakKeyDictionary[Any, tuple[int, Tensor]] = WeakKeyDictionary()

    def shapes(self, H: int, G: int, D: int) -> Mapping[str, tuple[int, ...]]:
        """streams_H: 1 at streaming heads."""
        return {"streams_H": (H,)}

    def near(self, T: int, S: int, rows: int, causal: bool, like: Tensor) -> Tensor:
        """[Q, N] bool: pages that streaming heads see."""
        Q, N = blocks_of(T, S, self.block, rows)
        row_Q, n = (S - T) // rows + torch.arange(Q, device=like.device)[:, None], torch.arange(N, device=like.device)
        first_Q, last_Q = row_Q * rows // self.block, (((row_Q + 1) * rows).clamp_max(S) - 1) // self.block
        around = (n > first_Q - self.window) & (n < last_Q + self.window) | (n < self.sinks)
        return around & (n <= last_Q) if causal else around

    def gather(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Mapping[str, Tensor]:
        """Attention of each head to what it would see streaming."""
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        seen = self.near(T, S, 1, True, q_BHTD).repeat_interleave(self.block, 1)[:, :S]
        return {"mass": (probabilities(q_BHTD.double(), k_BGSD.double(), True) * seen).sum((0, 2, 3))}

    def settle(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The heads that lose least."""
        mass_H = sums["mass"]
        best = mass_H.topk(min(len(mass_H), round(self.streaming * len(mass_H)))).indices
        return {"streams_H": torch.zeros_like(mass_H).scatter(0, best, 1.0)}

    def describe(self, k_BGSD: Tensor) -> Tensor:
        """[B, G, parts, 2, D] minimum and maximum of the keys of each logical page."""
        return torch.stack(page_bounds(k_BGSD, self.part), 3)

    def summary(self, k_BGSD: Tensor) -> Tensor:
        """`describe`, by the cache where it keeps summaries."""
        keep = getattr(self._cache, "summary", None)
        return self.describe(k_BGSD) if keep is None else keep(f"{self.name}/{self.part}", self.describe, self.part)

    def scores(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> Tensor:
        """The largest bound of a page's parts."""
        low, high = self.summary(k_BGSD).unbind(3)
        bound = bounds(q_BHTD, low, high)
        bound = torch.nn.functional.pad(bound, (0, -bound.shape[-1] % (self.block // self.part)), value=-torch.inf)
        return largest(bound.unflatten(-1, (-1, self.block // self.part)).amax(-1), k_BGSD.shape[2], rows)

    def choose(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
        """[B, H, Q, N] bool."""
        self._fits(q_BHTD, k_BGSD)
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        rows = self._rows(T)
        near = self.near(T, S, rows, causal, q_BHTD)
        mask = self._pages(q_BHTD.detach(), k_BGSD.detach(), rows, causal)
        return torch.where(self.streams_H.bool()[:, None, None], near, mask)

    def _pages(self, q: Tensor, k: Tensor, rows: int, causal: bool) -> Tensor:
        """[B, H, Q, N] as choosing heads see it, choices taken over from the first query of each `reuse`."""
        T, S = q.shape[2], k.shape[2]
        fresh = self.rule(*self.bounded(self.scores(q, k, rows, causal), T, S, rows, causal))
        if self.reuse == 1 or not causal or not T:
            return fresh
        at_T = torch.arange(S - T, S, device=q.device)
        first_T = at_T // self.reuse * self.reuse
        held = self._past.get(self._cache) if self._cache is not None else None
        if held is not None and held[0] == int(first_T[0]) < S - T and held[1].shape[:2] == fresh.shape[:2]:
            old = torch.nn.functional.pad(held[1], (0, fresh.shape[-1] - held[1].shape[-1]))[:, :, None]
        else:
            old, first_T = fresh[:, :, :1], first_T.clamp_min(S - T)      # the choice is not known: the first query here makes it
        mask = torch.cat((old, fresh), 2)[:, :, (first_T - (S - T) + 1).clamp_min(0)]
        if self._cache is not None:
            self._past[self._cache] = (int(first_T[-1]), mask[:, :, -1, : int(first_T[-1]) // self.block + 1].clone())
        n = torch.arange(mask.shape[-1], device=q.device)
        return mask | (n > first_T[:, None] // self.block) & (n <= at_T[:, None] // self.block)

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """Two products with the bounds of the logical pages, for the heads that choose, once in `reuse` queries."""
        return 4 * heads * (1 - self.streaming) * width * keys / self.part / self.reuse
