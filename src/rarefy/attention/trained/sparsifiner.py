"""Sparsifiner (Wei et al. 2023, arXiv 2303.13755): a low-rank attention map, spread over the tokens by a sparse learned basis, says who looks where.

    A = softmax((q W_q) (W_down K W_k)^T / sqrt(C)), n_down wide, entries below `floor` dropped;  connectivity = A W_up
    each query attends exactly to its keys of the highest connectivity, `budget` of those seen

W_down and W_up belong to places, as in an image: `tokens` of them, and a longer context is refused. In a causal layer the sum over tokens in
W_down K runs over keys not later than the query. Trained with `Distilled`: KL(dense map || softmax(connectivity)) + sparse mean|W_up|. The paper
distils its whole network; the form of the predictor's own loss is ours.

Shape letters as in base.py; C = narrow width, I = n_down, N = tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import BadInput
from ...method import Loss, fraction, not_negative, positive
from .base import PairAttention, causal_mask, dense_map, drawn, top_share


class Sparsifiner(PairAttention):
    """The budget's share of keys by predicted connectivity; train it with `Distilled`.

    Args:
        budget: share of the keys a query sees. tokens: longest context. down: width of the low-rank map (n_down); d_low: of queries and keys in it.
        floor: share below which an entry of the map is dropped. sparse: weight of the basis' mean absolute value in the loss.
    """

    name = "attention/sparsifiner"

    def __init__(
        self, heads: int, key_heads: int, d_head: int, budget: float = 0.25, tokens: int = 512, down: int = 32, d_low: int = 8, floor: float = 0.01,
        sparse: float = 0.01, seed: int = 0,
    ) -> None:
        super().__init__()
        draw = self.sized(heads, key_heads, d_head, seed)
        self._budget, self.tokens = fraction("budget", budget), positive("tokens", tokens)
        self.down, self.d_low = positive("down", down), positive("d_low", d_low)
        self.floor, self.sparse = not_negative("floor", floor), not_negative("sparse", sparse)
        self.query_HDC = drawn(draw, heads, d_head, d_low, std=d_head**-0.5)
        self.key_GDC = drawn(draw, key_heads, d_head, d_low, std=d_head**-0.5)
        self.down_GNI = drawn(draw, key_heads, tokens, down, std=tokens**-0.5)
        self.up_HIN = drawn(draw, heads, down, tokens, std=1.0)

    @property
    def budget(self) -> float:
        """Share of visible keys kept."""
        return self._budget

    def connectivity(self, q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
        """[B, H, T, S], of keys seen or not. BadInput for more than `tokens` keys."""
        T, S, share = q.shape[2], k.shape[2], self.heads // self.key_heads
        if S > self.tokens:
            raise BadInput(f"{self.name} knows {self.tokens} places and is given {S} keys; make it with tokens={S} or more")
        low_q, low_k = (q * (scale * self.d_head**0.5)) @ self.query_HDC, k @ self.key_GDC
        if causal:
            each = low_k[:, :, :, None] * self.down_GNI[:, :S, :, None]                  # [B, G, S, I, C]
            narrow = each.cumsum(2)[:, :, S - T :].repeat_interleave(share, 1)
            logit = torch.einsum("bhtc,bhtic->bhti", low_q, narrow)
        else:
            logit = low_q @ (self.down_GNI[:, :S].mT @ low_k).repeat_interleave(share, 1).mT
        map_BHTI = (logit * self.d_low**-0.5).softmax(-1)
        return torch.where(map_BHTI >= self.floor, map_BHTI, 0.0) @ self.up_HIN[:, :, :S]

    @torch.no_grad()
    def choice(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """[B, H, T, S] bool."""
        T, S = q.shape[2], k.shape[2]
        seen = causal_mask(T, S, q.device) if causal else torch.ones(T, S, dtype=torch.bool, device=q.device)
        return top_share(self.connectivity(q, k, scale, causal), seen, self._budget)

    def distil(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, scale: float, causal: bool, hidden_BTD: Tensor | None = None) -> Loss:
        """KL of the connectivity, as logits, from the dense map (nats a query), and the size of the basis."""
        self.refuse_other_sizes(q_BHTD, k_BGSD)
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        with torch.no_grad():
            truth = dense_map(q_BHTD, k_BGSD, scale, causal)
        logit = self.connectivity(q_BHTD, k_BGSD, scale, causal)
        if causal:
            logit = logit.masked_fill(~causal_mask(T, S, logit.device), torch.finfo(logit.dtype).min)
        kl = (torch.special.xlogy(truth, truth) - truth * logit.log_softmax(-1)).sum(-1).mean()
        size = self.sparse * self.up_HIN.abs().mean()
        return Loss(kl + size, {"kl": kl, "basis": size})

    def own_flops(self, heads: int, width: int, keys: float) -> float:
        """Narrow queries and keys, the running sums, the low-rank map and its spread over the keys (dense; the paper multiplies sparse by sparse)."""
        narrow = 2 * (heads + self.key_heads) * width * self.d_low + 2 * (heads + self.key_heads) * self.down * self.d_low
        return narrow + 2 * heads * self.down * keys
