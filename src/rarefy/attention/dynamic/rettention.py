"""Re-ttention (Chen et al. 2025, arXiv 2505.22918): a fixed sparse pattern, its softmax put back to the size it had among all keys.

Softmax over few keys divides by too little and makes those kept too heavy. At a dense step of a denoising run the share of the whole
normaliser that the pattern's keys hold is kept, rho = sum_pattern exp / sum_all exp, and with it the rest r = dense - rho sparse. Later steps give
    rho sparse + r
which is exact while queries, keys and values are as they were, and drifts with them. Every `refresh`-th step is dense. The authors' code has the
first five steps dense, and adds 0.04 to rho at every sparse step, a constant found for its models and left out here.

Shape letters as in scores.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.block_attention import BlockMask, block_attention
from ...method import positive
from ..pattern import PatternAttention
from ..patterns.count import visible_pairs
from .steps import Stepwise


class Rettention(PatternAttention, Stepwise):
    """A pattern whose output is reshaped by what a dense step of the same run showed; outside a run, the pattern alone.

    Args:
        pattern: an expression, see `rarefy.attention.patterns`.
        refresh: steps from one dense step to the next.
    """

    name = "attention/rettention"

    def __init__(self, pattern: str = "band(-64, 64)", block: int = 64, query_block: int = 64, refresh: int = 10) -> None:
        super().__init__(pattern, block, query_block)
        self.refresh = positive("refresh", refresh)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        now = self.step()
        if now is None or not q.numel():
            return super()._attend(q, k, v, scale, causal)
        number, state = now
        if number % self.refresh and "rest" in state and state["rest"].shape == q.shape:
            return (state["share"] * super()._attend(q, k, v, scale, causal) + state["rest"]).to(q.dtype)
        mask = self.block_mask(q.shape[2], k.shape[2], q.shape[1], causal)
        partial, tiles = (None if x is None else x.to(q.device) for x in (mask.partial, mask.tiles))
        here = BlockMask(mask.blocks.to(q.device), partial, tiles, mask.block, mask.query_block)
        how = {"block": self.block, "query_block": self._rows(q.shape[2]), "scale": scale, "causal": causal, "return_lse": True}
        (dense, lse), (sparse, part) = (block_attention(q, k, v, m, **how) for m in (torch.ones_like(here.blocks), here))
        share = (part - lse).exp()[..., None].to(q.dtype)
        state["share"], state["rest"] = share.detach(), (dense - share * sparse).detach()
        pairs = float(visible_pairs(q.shape[2], k.shape[2], causal) * q.shape[0] * q.shape[1])
        self._kept, self._seen, self._shape = self._kept + pairs, self._seen + pairs, (q.shape[1], q.shape[3], k.shape[2], q.shape[2])
        return dense
