"""Flux Attention (Qiu et al. 2026, arXiv 2604.07394): a router reads the prompt and gives a whole layer full or sparse attention for that request.

    z = W_2 silu(W_1 [mean of the prompt's hidden states; mean of its last `tail`]);  full where z > 0, else a window and the first keys
    training: out = g full + (1 - g) sparse,  g = sigmoid(z + logistic noise);  loss + price max(0, mean g - target)     (model frozen, `Trained`)

All heads of a layer do the same, so that a layer's work is uniform; the decision made on the prompt holds for the tokens decoded after it. Taken from
the abstract and a third party's account: a frozen model, routers alone trained, a relaxed binary choice, a target share; the router's inputs and the
form of the term are ours.

Shape letters as in base.py; E = hidden width, W = router width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from ...errors import BadInput
from ...method import Loss, fraction, not_negative, positive
from .base import PairAttention, causal_mask, drawn, masked_softmax, near_attention

CHUNK = 64
"""Keys in a block of the window's attention."""


class Flux(PairAttention):
    """Full or window attention by request; train the routers with `Trained(plan, model, train_model=False)`.

    The method remembers the decisions of its last prompt: decode a batch to its end before the next one, and give prompts whole.

    Args:
        window, sinks: nearest and first keys of sparse attention. tail: last tokens of the prompt whose mean the router reads. width: of the router.
        target: share of requests that may take full attention free of charge; price: of each beyond it, in nats a token.
    """

    name = "attention/flux"
    wants = ("hidden",)

    def __init__(
        self, hidden: int, heads: int, key_heads: int, d_head: int, window: int = 256, sinks: int = 4, tail: int = 16, width: int = 16,
        target: float = 0.5, price: float = 1.0, seed: int = 0,
    ) -> None:
        super().__init__()
        draw = self.sized(heads, key_heads, d_head, seed)
        self.window, self.sinks, self.tail = positive("window", window), positive("sinks", sinks), positive("tail", tail)
        self.target, self.price, E, W = fraction("target", target), not_negative("price", price), positive("hidden", hidden), positive("width", width)
        self.in_EW, self.out_W = drawn(draw, 2 * E, W, std=(2 * E) ** -0.5), drawn(draw, W, std=W**-0.5)
        self._gate_B: Tensor | None = None
        self._held_B: Tensor | None = None

    def route(self, hidden_BTD: Tensor, padding_BT: Tensor | None = None) -> Tensor:
        """[B] logit of full attention for each prompt; padding_BT is True at real tokens."""
        real = hidden_BTD.new_ones(hidden_BTD.shape[:2]) if padding_BT is None else padding_BT.to(hidden_BTD.dtype)
        last = real * (real.flip(1).cumsum(1).flip(1) <= self.tail)
        summary = torch.cat([(hidden_BTD * w[..., None]).sum(1) / w.sum(1, keepdim=True).clamp_min(1) for w in (real, last)], -1)
        return silu(summary @ self.in_EW) @ self.out_W

    def attend(
        self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, scale: float, causal: bool = True, padding_BS: Tensor | None = None, layer: int = 0,
        hidden_BTD: Tensor | None = None,
    ) -> Tensor:
        """[B, H, T, D]. A call with one query and more keys is a step of decoding and does what the prompt before it was given.

        Raises BadInput for such a step without a prompt of as many rows.
        """
        self._refuse(layer, queries=q_BHTD, keys=k_BGSD, values=v_BGSD, hidden=hidden_BTD)
        self.refuse_other_sizes(q_BHTD, k_BGSD)
        B, T, S = len(q_BHTD), q_BHTD.shape[2], k_BGSD.shape[2]
        more: dict[str, Any] = {"scale": scale, "causal": causal, "layer": layer}
        assert hidden_BTD is not None
        if T == 1 and S > 1:
            if self._held_B is None or len(self._held_B) != B:
                raise BadInput(f"{self.name}: {B} rows are decoded in layer {layer} whose prompts it was not given")
            gate_B = self._held_B.to(q_BHTD.device)
        else:
            z_B = self.route(hidden_BTD, None if padding_BS is None else padding_BS[:, S - T :])
            noise = torch.rand_like(z_B).clamp(1e-6, 1 - 1e-6).logit() if self.training else 0.0
            gate_B = (z_B + noise).sigmoid() if self.training else (z_B > 0).to(q_BHTD.dtype)
            self._held_B = (z_B > 0).to(q_BHTD.dtype).detach()
        try:
            if padding_BS is None:
                self._gate_B = gate_B
                return super().attend(q_BHTD, k_BGSD, v_BGSD, hidden_BTD=hidden_BTD, **more)
            rows = []
            for b in range(B):
                self._gate_B, at = gate_B[b : b + 1], slice(b, b + 1)
                rows.append(super().attend(q_BHTD[at], k_BGSD[at], v_BGSD[at], padding_BS=padding_BS[at], hidden_BTD=hidden_BTD[at], **more))
            return torch.cat(rows) if rows else torch.zeros_like(q_BHTD)
        finally:
            self._soft_B, self._gate_B = gate_B, None

    def penalty(self) -> Loss:
        """Price of the last call's full attention beyond the target; its second part, the share itself, is only told."""
        over = self.price * (self._soft_B.mean() - self.target).clamp_min(0)
        return Loss(over, {"full_price": over, "full": self._soft_B.detach().mean()})

    def _gate(self, hidden: Tensor | None) -> Tensor:
        assert hidden is not None
        return (self.route(hidden) > 0).to(hidden.dtype) if self._gate_B is None else self._gate_B

    @torch.no_grad()
    def choice(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """[B, H, T, S] bool: every key seen where the gate is not shut, else window and first keys."""
        T, S, gate_B = q.shape[2], k.shape[2], self._gate(hidden)
        seen = causal_mask(T, S, q.device) if causal else torch.ones(T, S, dtype=torch.bool, device=q.device)
        at_S, at_T = torch.arange(S, device=q.device), torch.arange(S - T, S, device=q.device)[:, None]
        near = seen & (((at_T - at_S).abs() < self.window) | (at_S < self.sinks))
        return torch.where((gate_B > 0)[:, None, None, None], seen, near).expand(-1, self.heads, -1, -1)

    def mix(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """Each row by its own way; in training both ways, mixed."""
        gate_B, out = self._gate(hidden), torch.zeros_like(q)
        for weight_B, full in ((gate_B, True), (1 - gate_B, False)):
            at = (weight_B > 0).nonzero()[:, 0]
            if not len(at):
                continue
            if full:
                see = causal_mask(q.shape[2], k.shape[2], q.device) if causal else None
                got = scaled_dot_product_attention(q[at], k[at], v[at], attn_mask=see, scale=scale, enable_gqa=True)
            else:
                got = near_attention(q[at], k[at], v[at], self.window, block=CHUNK, scale=scale, causal=causal, first=self.sinks)
            out = out.index_add(0, at, weight_B[at, None, None, None].to(q.dtype) * got)
        return out

    def naive(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """From whole score matrices, outside training."""
        return masked_softmax(q, k, mask, scale) @ v.repeat_interleave(self.heads // self.key_heads, 1)

    def own_flops(self, heads: int, width: int, keys: float) -> float:
        """The router, once a prompt, shared out over its tokens."""
        return (2 * self.in_EW.numel() + 2 * len(self.out_W)) / max(1.0, keys)
