"""Shared DIFF Transformer: both maps of a differential head come from one base projection, each with a low-rank update of its own.

    W_Qi = W_Q + A_i B_i,  W_Ki = W_K + A'_i B'_i,  i = 1, 2
    out = (1 - lambda_init) RMSNorm((softmax(Q1 K1^T s) - lambda softmax(Q2 K2^T s)) V),  lambda as in diff.py

The base is the layer's own projection, so every head is a differential head with its own value: 8 (heads + key_heads) / 2 * rank * D numbers a
layer, where DIFF's second pair of projections holds (heads + key_heads) * E * D. Departure: an update reads the head's query or key after
rotation, x + (x A) B, which is W + (W A) B for A: keys of the past are held by a cache, their hidden states are not. The norm asks for large
embeddings, as in diff.py.

Shape letters as in diff.py; R = rank, I = the two maps.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...method import positive
from .base import PairAttention, drawn, masked_softmax
from .diff import Diff


class SharedDiff(Diff):
    """Differential attention in each head of a layer, from shared projections; train it in its model (`Trained`).

    Args:
        rank: of the updates, at most d_head.
        layer, eps: as in `Diff`.
    """

    name = "attention/shared_diff"

    def __init__(self, heads: int, key_heads: int, d_head: int, rank: int = 4, layer: int = 0, eps: float = 1e-5, seed: int = 0) -> None:
        PairAttention.__init__(self)
        draw = self.sized(heads, key_heads, d_head, seed)
        self.rank = positive("rank", rank, d_head)
        self._differential(draw, layer, eps, d_head)
        self.query_in_IHDR = drawn(draw, 2, heads, d_head, rank, std=d_head**-0.5)
        self.query_out_IHRD = drawn(draw, 2, heads, rank, d_head, std=rank**-0.5)
        self.key_in_IGDR = drawn(draw, 2, key_heads, d_head, rank, std=d_head**-0.5)
        self.key_out_IGRD = drawn(draw, 2, key_heads, rank, d_head, std=rank**-0.5)

    def both(self, q: Tensor, k: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Queries [B, H, T, D] and keys [B, G, S, D] of the first map and of the second."""
        def of(i: int) -> tuple[Tensor, Tensor]:
            return q + q @ self.query_in_IHDR[i] @ self.query_out_IHRD[i], k + k @ self.key_in_IGDR[i] @ self.key_out_IGRD[i]

        return [of(0), of(1)]

    def mix(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """Two attentions over the same values, subtracted."""
        see = mask[:1, :1] if causal else None
        first, second = (scaled_dot_product_attention(a, b, v, attn_mask=see, scale=scale, enable_gqa=True) for a, b in self.both(q, k))
        return self._normed(first - self.weight() * second)

    def naive(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """From the difference of the maps."""
        first, second = (masked_softmax(a, b, mask, scale) for a, b in self.both(q, k))
        return self._normed((first - self.weight() * second) @ v.repeat_interleave(self.heads // self.key_heads, 1))

    def maps(self, q: Tensor, k: Tensor, scale: float, causal: bool = True) -> Tensor:
        """[B, H, T, S] differential attention, of either sign."""
        mask = self.choice(q, k, k, None, scale, causal)
        first, second = (masked_softmax(a, b, mask, scale) for a, b in self.both(q, k))
        return first - self.weight() * second

    def own_flops(self, heads: int, width: int, keys: float) -> float:
        """The second map's scores, and the updates."""
        return 2 * heads * width * keys + 8 * (heads + self.key_heads) * width * self.rank
