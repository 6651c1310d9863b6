"""DIFF Transformer (Ye et al. 2024, arXiv 2410.05258): the difference of two softmax maps, so that what both see cancels.

    out_i = (1 - lambda_init) RMSNorm((softmax(Q1 K1^T s) - lambda softmax(Q2 K2^T s)) [V1; V2])
    lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init,  lambda_init = 0.8 - 0.6 exp(-0.3 layer)

Heads 2i and 2i + 1 of the layer are the two halves of head i, its value is both their values side by side, and its output, twice as
wide, goes back to their places. With GQA each half reads the key head it always reads. Every pair is computed: sparsity here is in the
values, near zero where nothing is to be found.

The norm gives every head's output the same size from the first step, whatever the values' size. To train a model from nothing draw its token
embeddings with hidden^-0.5 or so, as the authors draw their decoders': transformers' 0.02 is drowned by it, and lookups are not learned.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width, P = H / 2 differential heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ...errors import BadInput
from ...method import not_negative
from .base import PairAttention, causal_mask, drawn, masked_softmax


class Diff(PairAttention):
    """Differential attention over a layer's heads taken in pairs; train it in its model (`Trained`).

    Args:
        layer: number of the layer from 0, for lambda_init.
        eps: of the norm.

    Raises:
        BadInput: an odd number of query or key heads.
    """

    name = "attention/diff"

    def __init__(self, heads: int, key_heads: int, d_head: int, layer: int = 0, eps: float = 1e-5, seed: int = 0) -> None:
        super().__init__()
        draw = self.sized(heads, key_heads, d_head, seed)
        if heads % 2 or key_heads % 2:
            odd, value = ("heads", heads) if heads % 2 else ("key_heads", key_heads)
            raise BadInput(f"{odd}={value} must be even: two heads of the layer make one differential head")
        self._differential(draw, layer, eps, 2 * d_head)

    def _differential(self, draw: torch.Generator, layer: int, eps: float, width: int) -> None:
        """lambda and the norm of outputs `width` wide."""
        if not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
            raise BadInput(f"layer={layer!r} must be a whole number >= 0")
        self.eps = not_negative("eps", eps)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)          # the paper counts layers from 1
        self.lambda_4D = drawn(draw, 4, self.d_head, std=0.1)
        """lambda_q1, lambda_k1, lambda_q2, lambda_k2."""
        self.norm_D = nn.Parameter(torch.ones(width))

    def weight(self) -> Tensor:
        """lambda, one number for the layer."""
        q1, k1, q2, k2 = self.lambda_4D
        return (q1 @ k1).exp() - (q2 @ k2).exp() + self.lambda_init

    def choice(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """[B, H, T, S]: every pair seen."""
        T, S = q.shape[2], k.shape[2]
        see = causal_mask(T, S, q.device) if causal else torch.ones(T, S, dtype=torch.bool, device=q.device)
        return see.expand(*q.shape[:2], T, S)

    def wide(self, v: Tensor) -> Tensor:
        """[B, P, S, 2 D] value of each differential head."""
        pair = torch.cat([v[:, 0::2], v[:, 1::2]], -1)
        return pair.repeat_interleave(self.heads // self.key_heads, 1)

    def _ended(self, out_BPTE: Tensor) -> Tensor:
        """Norm, scale, and the two halves back to their heads; [B, H, T, D]."""
        return torch.stack(self._normed(out_BPTE).chunk(2, -1), 2).flatten(1, 2)

    def _normed(self, out_BPTE: Tensor) -> Tensor:
        """Norm of each head's output, and scale."""
        x = out_BPTE.float() if out_BPTE.element_size() < 4 else out_BPTE
        return (x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(out_BPTE.dtype) * self.norm_D * (1 - self.lambda_init)

    def mix(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """Two attentions over the wide values, subtracted."""
        k, v = k.repeat_interleave(self.heads // self.key_heads, 1), self.wide(v)
        see = mask[:1, :1] if causal else None
        first, second = (scaled_dot_product_attention(q[:, i::2], k[:, i::2], v, attn_mask=see, scale=scale) for i in (0, 1))
        return self._ended(first - self.weight() * second)

    def naive(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """From the map of every head."""
        p = masked_softmax(q, k, mask, scale)
        return self._ended((p[:, 0::2] - self.weight() * p[:, 1::2]) @ self.wide(v))

    def maps(self, q: Tensor, k: Tensor, scale: float, causal: bool = True) -> Tensor:
        """[B, P, T, S] differential attention, of either sign: what to look at for noise."""
        p = masked_softmax(q, k, self.choice(q, k, k, None, scale, causal), scale)
        return p[:, 0::2] - self.weight() * p[:, 1::2]
