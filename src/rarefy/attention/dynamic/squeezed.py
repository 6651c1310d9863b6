"""Squeezed Attention (Hooper et al. 2024, arXiv 2411.09688): keys of a long context are clustered once, and a query looks at centroids.

A key's importance is estimated as exp(q C) / sum_j N_j exp(q C_j) with C the centroid of its cluster; clusters above a threshold, one for all
heads and layers, are loaded whole. Keys of the user's own input, here the newest, are always kept.

Shape letters as in scores.py; Z = keys in a segment, C = clusters of a segment.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...errors import BadInput
from ...method import positive
from ..heads import per_head
from .rules import Levels
from .scores import key_blocks

ROUNDS = 10


def clustered(k_XZD: Tensor, clusters: int) -> Tensor:
    """[X, Z] cluster of each key of each segment: k-means of directions, begun at keys spread evenly over the segment."""
    unit = normalize(k_XZD, dim=-1)
    centre = unit[:, torch.linspace(0, k_XZD.shape[1] - 1, clusters).round().long()]
    at_XZ = (unit @ centre.mT).argmax(-1)
    for _ in range(ROUNDS):
        total = torch.zeros_like(centre).scatter_add(1, at_XZ[..., None].expand_as(unit), unit)
        empty = total.square().sum(-1, keepdim=True) == 0
        centre = torch.where(empty, centre, normalize(total, dim=-1))
        now = (unit @ centre.mT).argmax(-1)
        if torch.equal(now, at_XZ):
            break
        at_XZ = now
    return at_XZ


class Squeezed(Levels):
    """Keys whose cluster is estimated to matter.

    The context is clustered a segment at a time, so that clusters stay as they are while it grows; the segment that a query stands
    in is its input, and kept whole. The paper clusters all of a fixed context at once, from k-means++, and reads its threshold off importances
    averaged over the last 100 queries, where here every query's own is met by the budget; its second level of centroids is left out.

    Args:
        budget: mean fraction of visible keys, met by fitting the threshold, unless `dial` sets it.
        dial: -log of the importance at which clusters are loaded, or 0.
        segment: keys clustered together.
        size: keys of a cluster, on average.
    """

    name = "attention/squeezed"
    unit = "key"
    wants = ("cache",)

    def __init__(self, budget: float = 0.25, dial: float = 0.0, segment: int = 128, size: int = 16) -> None:
        super().__init__(budget, 1, 1, dial)
        self.segment, self.size = positive("segment", segment), positive("size", size)
        if size > segment:
            raise BadInput(f"size={size} must be at most segment={segment}: a cluster lies within a segment")

    def describe(self, k_BGSD: Tensor) -> Tensor:
        """[B, G, S, D] each key's centroid; keys of an unfinished segment stand for themselves."""
        whole = k_BGSD.shape[2] // self.segment * self.segment
        k_XZD = k_BGSD[:, :, :whole].reshape(-1, self.segment, k_BGSD.shape[-1])
        if not k_XZD.numel():
            return k_BGSD
        at_XZ = clustered(k_XZD, max(1, self.segment // self.size))
        index = at_XZ[..., None].expand_as(k_XZD)
        total = torch.zeros_like(k_XZD).scatter_add(1, index, k_XZD)
        count = torch.zeros_like(k_XZD).scatter_add(1, index, torch.ones_like(k_XZD))
        centroids = (total / count.clamp_min(1)).gather(1, index).reshape(*k_BGSD.shape[:2], whole, -1)
        return torch.cat([centroids, k_BGSD[:, :, whole:]], 2)

    def segments(self, k_BGSD: Tensor) -> Tensor:
        """[B, G, segments, Z, D]: `describe`, a segment an entry, the last one filled up."""
        return key_blocks(self.describe(k_BGSD), self.segment)

    def summary(self, k_BGSD: Tensor) -> Tensor:
        """`describe`; where the layer's cache keeps summaries, a segment is clustered once."""
        keep = getattr(self._cache, "summary", None)
        if keep is None:
            return self.describe(k_BGSD)
        held = keep(f"{self.name}/{self.segment}/{self.size}", self.segments, self.segment)
        return held.flatten(2, 3)[:, :, : k_BGSD.shape[2]]

    def scores(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> Tensor:
        """q C / sqrt(D)."""
        return q_BHTD @ per_head(self.summary(k_BGSD), q_BHTD.shape[1]).mT * q_BHTD.shape[-1] ** -0.5

    def bounded(self, score_BHQN: Tensor, T: int, S: int, rows: int, causal: bool) -> tuple[Tensor, Tensor]:
        """Scores with +inf in a query's own segment."""
        score, visible_Q = super().bounded(score_BHQN, T, S, rows, causal)
        at_T = torch.arange(S - T, S, device=score.device) if causal else torch.full((T,), S - 1, device=score.device)
        own = torch.arange(S, device=score.device) // self.segment >= (at_T // self.segment)[:, None]
        return score.masked_fill(own & (score > -torch.inf), torch.inf), visible_Q

    def levels(self, score_BHQN: Tensor, always_BHQN: Tensor) -> Tensor:
        """-log of the importance, over the keys that are not kept anyway."""
        score = score_BHQN.to(torch.promote_types(score_BHQN.dtype, torch.float32)).masked_fill(always_BHQN, -torch.inf)
        total = score.logsumexp(-1, keepdim=True)
        return torch.where(score > -torch.inf, total - score, torch.inf)

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """A product a cluster."""
        return 2 * heads * width * keys / self.size
