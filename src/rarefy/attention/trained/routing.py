"""Routing Transformer (Roy et al. 2021, arXiv 2003.05997): queries and keys are clustered, and attention stays within a cluster.

Queries and keys are normalised (mean 0, variance 1 over a head's width) and compared with the head's centroids by dot product. Centroids
follow them by online k-means while training: mu <- decay mu + (1 - decay) / 2 (mean of its queries + mean of its keys).
They move in `after_step`, which `fit.train` calls, so that a layer computed again in the backward pass (gradient checkpointing) chooses the same.
    w > 0: each centroid takes the w queries and the w keys that match it best, as in the paper. This looks at later tokens, so it
        is for prefill: a query's clusters depend on what follows it.
    w = 0: each query and key goes to its best centroid. Nothing later is looked at, and decoding gives what prefill gives.
The first `local_heads` heads see the nearest `window` keys instead; every query sees its own key.
Departures: attention itself uses the layer's own queries and keys; the paper ties both in causal models.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width, C = clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, normalize

from ...errors import BadInput
from ...method import fraction, positive
from .base import PairAttention, causal_mask


class Routing(PairAttention):
    """Attention within clusters; its centroids follow the queries and keys while the model trains in `Trained`.

    Args:
        clusters: centroids of a head.
        w: tokens that a centroid takes; 0 sends each token to its best centroid.
        local_heads: heads, the first ones, that have a window in place of clusters. window: its keys.
        decay: of a centroid, a training batch.
    """

    name = "attention/routing"

    def __init__(
        self, heads: int, key_heads: int, d_head: int, clusters: int = 8, w: int = 0, local_heads: int = 0, window: int = 64, decay: float = 0.999,
        seed: int = 0,
    ) -> None:
        super().__init__()
        draw = self.sized(heads, key_heads, d_head, seed)
        self.clusters, self.window, self.decay = positive("clusters", clusters), positive("window", window), fraction("decay", decay)
        self.w = w if w == 0 and type(w) is int else positive("w", w)
        if not isinstance(local_heads, int) or isinstance(local_heads, bool) or not 0 <= local_heads <= heads:
            raise BadInput(f"local_heads={local_heads!r} must be a whole number in 0..{heads}")
        self.local_heads = local_heads
        self.register_buffer("centroid_HCD", normalize(torch.randn(heads, clusters, d_head, generator=draw), dim=-1))
        self.centroid_HCD: Tensor
        self.register_buffer("move_HCD", torch.zeros_like(self.centroid_HCD), persistent=False)
        self.move_HCD: Tensor
        """What the last training batch adds to the centroids."""

    def affinities(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normalised queries and keys, and their products with the centroids, [B, H, T or S, C]."""
        k = k.repeat_interleave(self.heads // self.key_heads, 1)
        unit_q, unit_k = (layer_norm(x, x.shape[-1:]) for x in (q, k))
        return unit_q, unit_k, unit_q @ self.centroid_HCD.mT, unit_k @ self.centroid_HCD.mT

    @torch.no_grad()
    def choice(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """[B, H, T, S] bool."""
        T, S = q.shape[2], k.shape[2]
        unit_q, unit_k, near_q, near_k = self.affinities(q, k)
        mask = (self._members(near_q).to(q.dtype) @ self._members(near_k).to(q.dtype).mT) > 0
        at_S, at_T = torch.arange(S, device=q.device), torch.arange(S - T, S, device=q.device)[:, None]
        mask = mask | (at_S == at_T)
        mask[:, : self.local_heads] = (at_T - at_S).abs() < self.window
        if self.training:
            self._follow(unit_q, unit_k, near_q, near_k)
        return mask & causal_mask(T, S, q.device) if causal else mask

    def _members(self, near_BHNC: Tensor) -> Tensor:
        """[B, H, N, C] bool: which tokens each centroid holds."""
        if not self.w:
            return torch.zeros_like(near_BHNC, dtype=torch.bool).scatter(3, near_BHNC.argmax(3, keepdim=True), True)
        at = near_BHNC.topk(min(self.w, near_BHNC.shape[2]), 2).indices
        return torch.zeros_like(near_BHNC, dtype=torch.bool).scatter(2, at, True)

    def _follow(self, unit_q: Tensor, unit_k: Tensor, near_q: Tensor, near_k: Tensor) -> None:
        """Send each centroid towards the tokens that it is the best of; one without any stays."""
        moved = torch.zeros_like(self.centroid_HCD)
        for unit, near in ((unit_q, near_q), (unit_k, near_k)):
            own = torch.zeros_like(near).scatter(3, near.argmax(3, keepdim=True), 1.0)
            total, count = torch.einsum("bhnc,bhnd->hcd", own, unit), own.sum((0, 2))[..., None]
            moved += torch.where(count > 0, total / count.clamp_min(1), self.centroid_HCD) / 2
        self.move_HCD.copy_((1 - self.decay) * (moved - self.centroid_HCD))

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """The centroids go where the step's batch sent them."""
        self.centroid_HCD += self.move_HCD
        self.move_HCD.zero_()

    def own_flops(self, heads: int, width: int, keys: float) -> float:
        """Products of a query and its key with the centroids."""
        return 4 * heads * width * self.clusters
