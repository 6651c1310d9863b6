"""Shared Attention (Liao and Vargas 2024): softmax weights of one layer serve the layers behind it, which hold no keys.

Shape letters: B = batch, H = query heads, G = key heads, R = query heads of a key head, T = new tokens, S = tokens held, D = head
width, L = layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BadInput, Unsupported
from ...site import replaced
from .aligned import Aligned
from .entries import probabilities
from .policy import Policy, PolicyLayer, Rotary


class _Layer(PolicyLayer):
    policy: SharedAttention

    def __init__(self, policy: Policy, index: int) -> None:
        super().__init__(policy, index)
        self.all = Aligned()
        self.weights: list[Tensor] = []
        """Softmax weights of this pass [B, G, R, t, S], while layers behind this one need them."""

    def answer(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, at_BT: Tensor, *, scale: float, rotary: Rotary, hidden_BTD: Tensor | None
    ) -> Tensor:
        leader, last = self.policy.span_of(self.index)
        if leader == self.index:
            self.all.place(at_BT, k=k_BGTD, v=v_BGTD)
            place_BGS = self.all.at()[:, None].expand(*self.all["k"].shape[:3])
            self.weights = [p for _, p in probabilities(q_BHTD, self.all["k"], place_BGS, at_BT, scale)]
        else:
            self.all.place(at_BT, v=v_BGTD)
        source: Any = self.policy.layers[leader]
        v = self.all["v"]
        if source.weights[0].shape[:2] != v.shape[:2]:
            raise Unsupported(f"{self}: its {v.shape[1]} key heads cannot take the weights of layer {leader}, which has {source.weights[0].shape[1]}")
        out = torch.cat([(p.to(v.dtype) @ v[:, :, None]).flatten(1, 2) for p in source.weights], 2)
        if self.index == last:
            source.weights = []
        return out

    def kept(self) -> Tensor:
        assert self.all.count_B is not None
        return self.all.count_B[:, None].expand(-1, self.all["v"].shape[1])

    def tensors(self) -> dict[str, Tensor]:
        return self.all.tensors()

    def rows(self, take: Callable[[Tensor], Tensor]) -> None:
        self.all.rows(take)


class _Maps(nn.Module):
    """Dense attention that keeps its weights, on its way to finding spans."""

    def __init__(self) -> None:
        super().__init__()
        self.of_layer: dict[int, Tensor] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, padding_BS: Tensor | None, layer: int) -> Tensor:
        at_BT = torch.arange(q.shape[2], device=q.device).expand(q.shape[0], -1)
        p = torch.cat([p for _, p in probabilities(q, k, at_BT[:, None].expand(*k.shape[:3]), at_BT, scale)], 3)
        self.of_layer[layer] = p.flatten(1, 2)
        return (p.to(v.dtype) @ v[:, :, None]).flatten(1, 2)


class SharedAttention(Policy):
    """Layers of a span attend with the weights of its first layer; behind the first, a span holds values alone.

    `fit` finds the spans: it starts from single layers and joins the neighbours whose maps are most alike (mean cosine of the
    leading layer's map with each map of the layers that would follow it, over heads and queries) until max(1, round(budget *
    L)) spans are left. Queries and keys of following layers are still projected by the model's own code and thrown away:
    what is saved here is the cache, and the scores. The optional fine-tuning of the paper is not done.

    Args:
        budget: fraction of the layers that keep keys and compute weights.
        spans: [first, last] layers of each span instead of `fit`; layers in none stand alone.
    """

    name = "cache/shared"
    unit = "layer"
    layer = _Layer

    def __init__(self, budget: float | list[float] = 0.75, spans: Sequence[Sequence[int]] | None = None) -> None:
        super().__init__(budget)
        self.spans = None if spans is None else [(int(a), int(b)) for a, b in spans]
        taken = sorted(n for a, b in self.spans or () for n in range(a, b + 1))
        if len(set(taken)) != len(taken) or any(not 0 <= a <= b for a, b in self.spans or ()):
            raise BadInput(f"spans={spans} must be [first, last] pairs of layers that do not overlap")

    def span_of(self, layer: int) -> tuple[int, int]:
        """(first, last) layer of the span that a layer is in."""
        if self.spans is None:
            if min(self.budgets) < 1:
                raise BadInput(f"{self.name} does not know its spans yet; call cache.fit(model, input_ids) first, or give spans=[[first, last], ...]")
            return layer, layer
        return next(((a, b) for a, b in self.spans if a <= layer <= b), (layer, layer))

    @torch.no_grad()
    def fit(self, model: nn.Module, input_ids: Tensor) -> SharedAttention:
        """Choose spans by the dense model's attention maps on calibration text [B, T] without padding."""
        maps = _Maps()
        with replaced(model, {"layers.*.attn": maps}):
            model(input_ids=input_ids, use_cache=False)
        L = len(maps.of_layer)
        alike_LL = torch.stack([torch.stack([
            torch.cosine_similarity(maps.of_layer[a], maps.of_layer[b], dim=-1).mean() for b in range(L)
        ]) for a in range(L)])
        spans = [(n, n) for n in range(L)]
        while len(spans) > max(1, round(sum(self.budgets) / len(self.budgets) * L)):
            gain = [float(alike_LL[a, c : d + 1].mean()) for (a, _), (c, d) in zip(spans, spans[1:], strict=False)]
            best = max(range(len(gain)), key=gain.__getitem__)
            spans[best : best + 2] = [(spans[best][0], spans[best + 1][1])]
        self.spans = spans
        return self
