"""Twilight (Lin et al. 2025, arXiv 2502.02770): any selector's candidates, pruned to the few that hold a share p of attention.

First a generous share of pages by Quest's bounds; then the candidates' weights from a copy of the keys in 4 bits; kept are the fewest
whose weights reach p. How many that is differs by head and query.

Shape letters as in scores.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import BadInput
from ...kernels.block_attention import available, key_lists, page_meta, page_scores
from ...kernels.block_attention.listed import listed_products
from ...method import positive
from ..block import highest
from ..heads import per_head
from .rules import TopP
from .scores import bounds


def rounded(x: Tensor, bits: int) -> Tensor:
    """Values after a round trip through so many bits: even steps between the smallest and the largest of the last dim."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(x.dtype).tiny)
    return low + ((x - low) / step).round() * step


class Twilight(TopP):
    """Keys by top-p of estimated weights among candidate pages.

    The 4-bit copy is kept as rounded values: what is estimated is the paper's, what is saved in memory is not.

    Args:
        budget: mean fraction of visible keys, met by fitting p, unless `dial` sets p.
        dial: p, in (0, 1), or 0.
        page: keys of a candidate page.
        generous: candidates, as a multiple of the budget; all pages where that is 1 or more.
        bits: of the copy.
    """

    name = "attention/twilight"
    unit = "key"
    by_query = True
    wants = ("cache",)

    def __init__(self, budget: float = 0.25, dial: float = 0.0, page: int = 16, generous: float = 3.0, bits: int = 4) -> None:
        super().__init__(budget, 1, 1, dial)
        if not 1 <= generous < float("inf"):
            raise BadInput(f"generous={generous!r} must be at least 1: candidates are chosen from, so there must be as many as are kept")
        self.page, self.generous, self.bits = positive("page", page), float(generous), positive("bits", bits, 16)

    def describe(self, k_BGSD: Tensor) -> Tensor:
        """[B, G, S, D] keys in few bits."""
        return rounded(k_BGSD, self.bits)

    def page_scores(self, q_BHTD: Tensor, k_BGSD: Tensor) -> Tensor:
        """[B, H, T, pages] largest product that a page's keys can have; where the layer's cache keeps summaries, bounds are of new pages alone."""
        keep = getattr(self._cache, "summary", None)

        def made(k: Tensor) -> Tensor:
            return page_meta(k, self.page)

        meta = made(k_BGSD) if keep is None else keep(f"{self.name}/pages/{self.page}", made, self.page)
        if q_BHTD.shape[2] == 1 and available(q_BHTD, meta):
            return page_scores(q_BHTD, k_BGSD, self.page, meta)
        high, low = meta.chunk(2, -1)
        return bounds(q_BHTD, low, high)

    def candidates(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
        """[B, H, T, S] bool: keys of the pages with the highest bounds, a query's own page among them."""
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        bound = self.page_scores(q_BHTD, k_BGSD)
        at_T, N = torch.arange(S - T, S, device=bound.device), bound.shape[-1]
        own_T = at_T // self.page if causal else torch.full_like(at_T, N - 1)
        page_N = torch.arange(N, device=bound.device)
        bound = bound.masked_fill(page_N > own_T[:, None], -torch.inf)
        if causal:
            bound = bound.masked_fill(page_N == own_T[:, None], torch.inf)
        keep_T = ((own_T + 1) * min(1.0, self.generous * self._budget)).ceil().long()
        keep = highest(bound, keep_T[:, None])
        return keep.repeat_interleave(self.page, -1)[..., :S]

    def scores(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> Tensor:
        """Estimated logits of candidates, -inf elsewhere."""
        score = q_BHTD @ per_head(self.summary(k_BGSD), q_BHTD.shape[1]).mT * q_BHTD.shape[-1] ** -0.5
        return score.masked_fill(~self.candidates(q_BHTD, k_BGSD, causal), -torch.inf)

    def choose(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
        """As TopP; a step estimates the weights of its candidates alone."""
        (B, H, T, D), S = q_BHTD.shape, k_BGSD.shape[2]
        if T > 1 or self.at(1) == torch.inf:
            if self.at(1) == torch.inf or q_BHTD.dtype != torch.float32:
                return super().choose(q_BHTD, k_BGSD, causal)
            own, visible = self._visible(q_BHTD, k_BGSD, causal)
            score = self.scores(q_BHTD.detach(), k_BGSD.detach(), 1, causal).masked_fill(~visible, -torch.inf)
            return self.reach(score, own == torch.inf, 1) & visible
        q, key = q_BHTD.detach(), key_lists(self.candidates(q_BHTD.detach(), k_BGSD.detach(), causal))[:, :, 0]     # [B, H, X], -1 behind the last
        score = listed_products(q, self.summary(k_BGSD.detach()), key[:, :, None])[:, :, 0] * D**-0.5
        own = key == S - 1 if causal else torch.zeros_like(key, dtype=torch.bool)
        kept = torch.where(self.reach(score, own, 1) & (key >= 0), key, S)
        return torch.zeros(B, H, 1, S + 1, dtype=torch.bool, device=q.device).scatter_(3, kept[:, :, None], True)[..., :S]

    def reached(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> tuple[Tensor, Tensor]:
        """Levels of candidates; what is no candidate lies beyond every dial but that of budget 1."""
        level, seen = super().reached(q_BHTD, k_BGSD, rows, causal)
        _, visible = self._visible(q_BHTD, k_BGSD, causal)
        return level.masked_fill(visible & ~seen, torch.inf), visible

    def _visible(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        score, _ = self.bounded(q_BHTD.new_zeros(*q_BHTD.shape[:2], T, S), T, S, 1, causal)
        return score, score > -torch.inf

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """Bounds of every page, and the candidates' products (in 4 bits, counted as others)."""
        return heads * width * keys * (4 / self.page + 2 * min(1.0, self.generous * self._budget))
