"""Sparse modular activation, SMA (Ren et al. 2023, arXiv 2306.11197, SeqBoat): each token decides whether attention runs for it at all.

    two logits a token, tempered softmax with a learned temperature; a token fires where the second is larger
    fired tokens, moved together into a shorter sequence, attend to the nearest `window` fired tokens there; results go back to their
    places times the confidence, the probability of firing, which carries the gradient; others get 0
Departures: a layer of a Hugging Face model has no state-space path beside its attention, so a token that does not fire keeps what the residual
stream holds; the configurator reads the token's values of all key heads, which is what a cache holds of it, in place of a state; `window` counts
the token itself.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width, F, U = fired queries and keys of a row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...errors import BadInput
from ...method import positive
from .base import PairAttention, causal_mask, drawn, masked_softmax, near_attention

BLOCK = 32
"""Keys in a block of the compressed sequence."""


class SMA(PairAttention):
    """Attention for the tokens that ask for it; train it in its model (`Trained`).

    Args:
        window: fired tokens that a fired token sees, itself among them.
        lean: bias towards firing at the start; 0 lets random weights decide, large fires everywhere.
    """

    name = "attention/sma"

    def __init__(self, heads: int, key_heads: int, d_head: int, window: int = 256, lean: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        draw = self.sized(heads, key_heads, d_head, seed)
        self.window, self.lean = positive("window", window), lean
        if not isinstance(lean, int | float) or isinstance(lean, bool) or not math.isfinite(lean):
            raise BadInput(f"lean={lean!r} must be a finite number: the bias towards firing")
        self.logit_E2 = drawn(draw, key_heads * d_head, 2, std=(key_heads * d_head) ** -0.5)
        self.bias_2 = nn.Parameter(torch.tensor([0.0, float(lean)]))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.3 * math.sqrt(key_heads * d_head))))

    def configure(self, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens fire, [B, S] bool, and with what probability."""
        logit = v_BGSD.transpose(1, 2).flatten(2) @ self.logit_E2 + self.bias_2
        return logit[..., 1] > logit[..., 0], (logit / self.log_temperature.exp()).softmax(-1)[..., 1]

    @torch.no_grad()
    def choice(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """[B, H, T, S] bool: pairs of fired tokens, near among the fired."""
        T, S = q.shape[2], k.shape[2]
        fired = self.configure(v)[0]
        rank = fired.cumsum(1)
        near = (rank[:, S - T :, None] - rank[:, None]).abs() < self.window
        mask = near & fired[:, S - T :, None] & fired[:, None]
        mask = mask & causal_mask(T, S, q.device) if causal else mask
        return mask[:, None].expand(-1, q.shape[1], -1, -1)

    def mix(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """Row by row: compress, attend in a band, scatter."""
        T, S = q.shape[2], k.shape[2]
        fired, sure = self.configure(v)
        rows = []
        for b in range(len(q)):
            at_U, at_F = fired[b].nonzero()[:, 0], fired[b, S - T :].nonzero()[:, 0]
            row = torch.zeros_like(q[b])
            if len(at_F):
                keys, values = k[b : b + 1, :, at_U], v[b : b + 1, :, at_U]
                out = near_attention(q[b : b + 1, :, at_F], keys, values, self.window, block=BLOCK, scale=scale, causal=causal)
                row = row.index_copy(1, at_F, out[0] * sure[b, S - T :][at_F, None])
            rows.append(row)
        return torch.stack(rows)

    def naive(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """From whole score matrices."""
        sure = self.configure(v)[1][:, None, k.shape[2] - q.shape[2] :, None]
        return masked_softmax(q, k, mask, scale) @ v.repeat_interleave(self.heads // self.key_heads, 1) * sure

    def own_flops(self, heads: int, width: int, keys: float) -> float:
        """Two logits of the query's own token."""
        return 4 * self.key_heads * width
