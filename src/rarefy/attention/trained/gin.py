"""Sparse GIN-Attention (Buehler 2025, arXiv 2501.02393): a layer's attention map as a sparse graph, along which a small network adds to its output.

    A = softmax(sharp * logits);   A' = A where A > threshold                                       ("keep")
                                   A' = max(0, A - threshold)                                        ("shift")
                                   A' = 1 where A > threshold                                        ("binary")
    u_t = (1 + eps) x_t + sum_s A'_ts x_s;      output = attention + W2 relu(W1 u_t + b1) + b2
W2 and b2 begin at zero, so the model is unchanged until the adapter is trained (`Trained(plan, model, train_model=False)`); eps is learned.

Departure: x are the layer's values, all heads side by side, and what is added passes the layer's output projection; the paper updates hidden states
beside attention. A cache holds values and no hidden states, and decoding has to give what prefill gives. The attention that is added to stays dense.

Shape letters as in base.py; E = H D here, W = hidden units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...errors import BadInput
from ...method import positive
from .base import PairAttention, causal_mask, drawn, masked_softmax

RULES = ("keep", "shift", "binary")


class GIN(PairAttention):
    """Dense attention and a graph isomorphism network over its sharpened, thresholded map.

    Args:
        width: W; the adapter has 2 E W + W + E + 1 parameters.
        threshold: in [0, 1): weight below which there is no edge. rule: what an edge weighs, one of RULES.
        sharp: factor on the logits of the graph, above 0.
    """

    name = "attention/gin"

    def __init__(
        self, heads: int, key_heads: int, d_head: int, width: int = 16, threshold: float = 0.05, rule: str = "keep", sharp: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        draw = self.sized(heads, key_heads, d_head, seed)
        self.width = positive("width", width)
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < 1:
            raise BadInput(f"threshold={threshold!r} must be in [0, 1): a share of attention")
        if isinstance(sharp, bool) or not isinstance(sharp, int | float) or not 0 < sharp < math.inf:
            raise BadInput(f"sharp={sharp!r} must be a finite number above 0")
        if rule not in RULES:
            raise BadInput(f"rule={rule!r} is none of {', '.join(RULES)}")
        self.threshold, self.rule, self.sharp = float(threshold), rule, float(sharp)
        E = heads * d_head
        self.in_EW, self.in_W = drawn(draw, E, width, std=E**-0.5), nn.Parameter(torch.zeros(width))
        self.out_WE, self.out_E = nn.Parameter(torch.zeros(width, E)), nn.Parameter(torch.zeros(E))
        self.eps = nn.Parameter(torch.zeros(()))

    def choice(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """[B, H, T, S]: every pair seen, since attention itself stays dense; edges are a part of these."""
        T, S = q.shape[2], k.shape[2]
        see = causal_mask(T, S, q.device) if causal else torch.ones(T, S, dtype=torch.bool, device=q.device)
        return see.expand(*q.shape[:2], T, S)

    def edges(self, q: Tensor, k: Tensor, scale: float, causal: bool = True) -> Tensor:
        """[B, H, T, S] A', zero where there is no edge."""
        return self._edges(masked_softmax(q, k, self.choice(q, k, k, None, scale, causal), scale * self.sharp))

    def _edges(self, map_BHTS: Tensor) -> Tensor:
        there = map_BHTS > self.threshold
        if self.rule == "binary":
            return there.to(map_BHTS.dtype)
        return torch.where(there, map_BHTS - self.threshold if self.rule == "shift" else map_BHTS, 0.0)

    def mix(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """The map is formed once where the graph's is the same."""
        p = masked_softmax(q, k, mask, scale)
        edges = self._edges(p if self.sharp == 1 else masked_softmax(q, k, mask, scale * self.sharp))
        values = v.repeat_interleave(self.heads // self.key_heads, 1)
        gathered = (1 + self.eps) * values[:, :, k.shape[2] - q.shape[2] :] + edges @ values
        return p @ values + self._added(gathered)

    def _added(self, u_BHTD: Tensor) -> Tensor:
        u_BTE = u_BHTD.transpose(1, 2).flatten(2)
        made_BTE = (u_BTE @ self.in_EW + self.in_W).relu() @ self.out_WE + self.out_E
        return made_BTE.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def naive(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """Query by query, summed over its edges."""
        values, S, T = v.repeat_interleave(self.heads // self.key_heads, 1), k.shape[2], q.shape[2]
        p, graph = masked_softmax(q, k, mask, scale), masked_softmax(q, k, mask, scale * self.sharp)
        rows = []
        for t in range(T):
            at = graph[:, :, t]
            weight = {"keep": at * (at > self.threshold), "shift": (at - self.threshold).relu(), "binary": (at > self.threshold) * 1.0}[self.rule]
            u = values[:, :, S - T + t] * (1 + self.eps) + (weight.to(v.dtype)[..., None] * values).sum(2)
            hidden_W = torch.clamp(u.flatten(1) @ self.in_EW + self.in_W, min=0)
            rows.append((hidden_W @ self.out_WE + self.out_E).unflatten(1, (self.heads, -1)))
        return p @ values + torch.stack(rows, 2)

    def own_flops(self, heads: int, width: int, keys: float) -> float:
        """The graph's sums, a map of its own where it is sharpened, and the network."""
        graph = 2 * heads * width * keys * (1 if self.sharp == 1 else 2)
        return graph + 4 * heads * width * self.width
