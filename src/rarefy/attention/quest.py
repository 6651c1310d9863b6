"""QUEST (Tang et al. 2024, arXiv 2406.10774): pages whose bounds promise the largest logit.

A page is described by the channel-wise minimum m and maximum M of its keys; for a query q no key of the page can score
above sum_d max(q_d m_d, q_d M_d) (sec. 3.3, alg. 1). The pages with the highest bounds are attended to exactly.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width, Q = query blocks, N = pages.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..kernels.block_attention import available, blocks_of, page_scores
from .block import BlockAttention


def page_bounds(k_BGSD: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """(minimum, maximum) [B, G, N, D] of the keys of each page; the last page may be short."""
    S = k_BGSD.shape[2]
    short = -S % page
    low = pad(k_BGSD, (0, 0, 0, short), value=torch.inf).unflatten(2, (-1, page)).amin(3)
    high = pad(k_BGSD, (0, 0, 0, short), value=-torch.inf).unflatten(2, (-1, page)).amax(3)
    return low, high


class Quest(BlockAttention):
    """Top pages by their upper bound; the query's own page always counts among them.

    The paper leaves prefill and the first two layers dense; here a plan says which layers, and prefill selects too.
    With query_block > 1 a block's bound is the largest of its queries'.
    """

    name = "attention/quest"

    def scores(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> Tensor:
        """sum_d max(q_d m_d, q_d M_d); in prefill as two products: relu(q) . M - relu(-q) . m."""
        if q_BHTD.shape[2] == 1 and available(q_BHTD, k_BGSD):
            return page_scores(q_BHTD, k_BGSD, self.block)
        low, high = page_bounds(k_BGSD, self.block)
        share = q_BHTD.shape[1] // k_BGSD.shape[1]
        low, high = low.repeat_interleave(share, 1), high.repeat_interleave(share, 1)
        bound_BHTN = q_BHTD.clamp_min(0) @ high.mT - (-q_BHTD).clamp_min(0) @ low.mT
        if rows == 1:
            return bound_BHTN
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        Q, _ = blocks_of(T, S, self.block, rows)
        lead = (S - T) % rows
        padded = pad(bound_BHTN, (0, 0, lead, Q * rows - lead - T), value=-torch.inf)
        return padded.unflatten(2, (Q, rows)).amax(3)

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """Two products with the bounds of keys / block pages."""
        return 4 * heads * width * keys / self.block
