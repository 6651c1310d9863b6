"""DSV (Tan et al. 2025, arXiv 2502.07590): low-rank projections of queries and keys learn the score matrix, and name the keys worth computing.

    stage 1  attention is dense;  loss = mean ((q . k) s - (q A) . (k B))^2 over pairs seen, gradients to A and B alone       (`Distilled`)
    stage 2  each query attends exactly to the budget's share of keys with the highest (q A) . (k B), forward and backward     (`Trained`)

Heads whose attention is not sparse stay dense: `profile` gives the share of keys that each head needs, `dense_heads` names those to leave. The
paper's queries choose in groups of neighbours in a video; here each chooses for itself, and the projections read queries and keys after rotation.

Shape letters as in base.py; C = rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...method import Loss, fraction, positive
from ...selection import top_p
from .base import PairAttention, causal_mask, dense_map, drawn, top_share
from .purbo import head_numbers


class DSV(PairAttention):
    """The budget's share of keys by a low-rank estimate of the scores; train it with `Distilled`, then the model with `Trained`.

    Args:
        budget: share of the keys a query sees. rank: of the estimate.
        dense_heads: heads that see every key, "0, 3", "all", or "none".
    """

    name = "attention/dsv"

    def __init__(
        self, heads: int, key_heads: int, d_head: int, budget: float = 0.25, rank: int = 8, dense_heads: str = "none", seed: int = 0,
    ) -> None:
        super().__init__()
        draw = self.sized(heads, key_heads, d_head, seed)
        self._budget, self.rank, self.dense_heads = fraction("budget", budget), positive("rank", rank, d_head), dense_heads
        self._dense = head_numbers("dense_heads", dense_heads, heads)
        self.query_HDC = drawn(draw, heads, d_head, rank, std=d_head**-0.5)
        self.key_GDC = drawn(draw, key_heads, d_head, rank, std=d_head**-0.5)

    @property
    def budget(self) -> float:
        """Share of visible keys kept, dense heads aside."""
        return self._budget

    def estimate(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """[B, H, T, S] of the logits."""
        return (q * (scale * self.d_head**0.5)) @ self.query_HDC @ (k @ self.key_GDC).repeat_interleave(self.heads // self.key_heads, 1).mT

    @torch.no_grad()
    def choice(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """[B, H, T, S] bool."""
        T, S = q.shape[2], k.shape[2]
        seen = causal_mask(T, S, q.device) if causal else torch.ones(T, S, dtype=torch.bool, device=q.device)
        mask = top_share(self.estimate(q, k, scale), seen, self._budget)
        mask[:, self._dense] = seen
        return mask

    def distil(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, scale: float, causal: bool, hidden_BTD: Tensor | None = None) -> Loss:
        """Mean squared error of the estimated logits over the pairs seen."""
        self.refuse_other_sizes(q_BHTD, k_BGSD)
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        exact = q_BHTD @ k_BGSD.repeat_interleave(self.heads // self.key_heads, 1).mT * scale
        off = (self.estimate(q_BHTD, k_BGSD, scale) - exact).square()
        mse = (off[..., causal_mask(T, S, off.device)] if causal else off).mean()
        return Loss(mse, {"mse": mse})

    @torch.no_grad()
    def profile(self, q_BHTD: Tensor, k_BGSD: Tensor, *, scale: float, causal: bool = True, mass: float = 0.9) -> Tensor:
        """[H] share of the visible keys that hold `mass` of the dense attention: near 1, a head is better left dense."""
        kept = top_p(dense_map(q_BHTD, k_BGSD, scale, causal), fraction("mass", mass)).mask.sum(-1)
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        return kept.sum((0, 2)) / (len(q_BHTD) * (T * S - T * (T - 1) / 2 if causal else T * S))

    def own_flops(self, heads: int, width: int, keys: float) -> float:
        """Projections of a query and its key, and their product with every key's."""
        return 2 * (heads + self.key_heads) * width * self.rank + 2 * heads * self.rank * keys
