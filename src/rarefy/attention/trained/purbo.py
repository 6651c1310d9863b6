"""RTPurbo (Zhou et al. 2026, arXiv 2605.16928): only retrieval heads look far, at the keys that a narrow learned indexer gives a share p of its mass.

    indexer = softmax(q W_q . k W_k / sqrt(C)) over keys not later; a retrieval head attends exactly to the fewest keys whose mass reaches p
    loss = KL(dense map on its own top-p keys, renormalised || indexer), of retrieval heads, C = 16
Every other head sees the first `sinks` keys and the nearest `window`. Which heads retrieve is measured beforehand
(rarefy.tasks.retrieval_heads) and given as an argument. Taken from the paper's abstract and a third party's account of the loss; the indexer
reads queries and keys after rotation, which is what a cache holds.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width, C = indexer width, X, Y = far and near heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import BadInput
from ...kernels.block_attention import key_lists, token_attention
from ...method import Loss, fraction, positive
from ...selection import top_p
from .base import PairAttention, causal_mask, dense_map, drawn, masked_softmax, near_attention

CHUNK = 64
"""Keys in a block of the near heads' attention."""


class Purbo(PairAttention):
    """Top-p by an indexer in retrieval heads, a window elsewhere; train it with `Distilled`.

    Args:
        p: share of the indexer's mass that a retrieval head's keys reach; 1 keeps every key.
        d_index: width of the indexer.
        window, sinks: nearest and first keys of the other heads.
        retrieval: numbers of this layer's retrieval heads, "0, 3"; "all", or "none".
    """

    name = "attention/purbo"

    def __init__(
        self, heads: int, key_heads: int, d_head: int, p: float = 0.9, d_index: int = 16, window: int = 256, sinks: int = 4, retrieval: str = "all",
        seed: int = 0,
    ) -> None:
        super().__init__()
        draw = self.sized(heads, key_heads, d_head, seed)
        self.p, self.d_index = fraction("p", p), positive("d_index", d_index)
        self.window, self.sinks = positive("window", window), positive("sinks", sinks)
        far = head_numbers("retrieval", retrieval, heads)
        self.register_buffer("far_X", torch.tensor(far, dtype=torch.long), persistent=False)
        self.register_buffer("near_Y", torch.tensor([h for h in range(heads) if h not in far], dtype=torch.long), persistent=False)
        self.far_X: Tensor
        self.near_Y: Tensor
        self.query_HDC = drawn(draw, heads, d_head, d_index, std=d_head**-0.5)
        self.key_GDC = drawn(draw, key_heads, d_head, d_index, std=d_head**-0.5)

    def indexer(self, q: Tensor, k: Tensor, causal: bool) -> Tensor:
        """[B, X, T, S] logits of the retrieval heads, -inf at later keys."""
        share = self.heads // self.key_heads
        query, key = q[:, self.far_X] @ self.query_HDC[self.far_X], (k @ self.key_GDC)[:, self.far_X // share]
        logit = query @ key.mT * self.d_index**-0.5
        return logit.masked_fill(~causal_mask(q.shape[2], k.shape[2], q.device), -torch.inf) if causal else logit

    @torch.no_grad()
    def choice(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """[B, H, T, S] bool."""
        T, S = q.shape[2], k.shape[2]
        seen = causal_mask(T, S, q.device) if causal else torch.ones(T, S, dtype=torch.bool, device=q.device)
        at_S, at_T = torch.arange(S, device=q.device), torch.arange(S - T, S, device=q.device)[:, None]
        mask = (((at_T - at_S).abs() < self.window) | (at_S < self.sinks)).expand(*q.shape[:2], T, S) & seen
        if len(self.far_X):
            wide = self.indexer(q * (scale * self.d_head**0.5), k, causal)
            mask[:, self.far_X] = top_p(wide.to(torch.promote_types(q.dtype, torch.float32)).softmax(-1), self.p).mask & seen
        return mask

    def mix(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """Retrieval heads key by key, the others in a band."""
        share, out = self.heads // self.key_heads, torch.zeros_like(q)
        if len(self.far_X):
            of = self.far_X // share
            far = token_attention(q[:, self.far_X], k[:, of], v[:, of], key_lists(mask[:, self.far_X]), scale=scale)
            out = out.index_copy(1, self.far_X, far)
        if len(self.near_Y):
            of = self.near_Y // share
            near = near_attention(q[:, self.near_Y], k[:, of], v[:, of], self.window, block=CHUNK, scale=scale, causal=causal, first=self.sinks)
            out = out.index_copy(1, self.near_Y, near)
        return out

    def naive(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """From whole score matrices."""
        return masked_softmax(q, k, mask, scale) @ v.repeat_interleave(self.heads // self.key_heads, 1)

    def distil(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, scale: float, causal: bool, hidden_BTD: Tensor | None = None) -> Loss:
        """KL of the indexer from the dense map's top-p part, nats a query; 0 in a layer without retrieval heads."""
        self.refuse_other_sizes(q_BHTD, k_BGSD)
        if not len(self.far_X):
            kl = 0.0 * (self.query_HDC.sum() + self.key_GDC.sum())
            return Loss(kl, {"kl": kl})
        with torch.no_grad():
            dense = dense_map(q_BHTD, k_BGSD, scale, causal)[:, self.far_X]
            truth = dense * top_p(dense, self.p).mask
            truth = truth / truth.sum(-1, keepdim=True)
        logit = self.indexer(q_BHTD * (scale * self.d_head**0.5), k_BGSD, causal)
        log = logit.masked_fill(logit == -torch.inf, torch.finfo(logit.dtype).min).log_softmax(-1)
        kl = (torch.special.xlogy(truth, truth) - truth * log).sum(-1).mean()
        return Loss(kl, {"kl": kl})

    def own_flops(self, heads: int, width: int, keys: float) -> float:
        """The indexer: a projection of the query and of its key, and a narrow product with every key."""
        far = len(self.far_X)
        return far * (4 * width * self.d_index + 2 * self.d_index * keys)


def head_numbers(name: str, text: str, heads: int) -> list[int]:
    """Heads that an argument names. BadInput for another text."""
    if text in ("all", "none"):
        return list(range(heads)) if text == "all" else []
    parts = [part.strip() for part in text.split(",")] if isinstance(text, str) else [""]
    if not all(part.isdigit() and int(part) < heads for part in parts):
        raise BadInput(f'{name}={text!r} must be "all", "none" or head numbers in 0..{heads - 1} with commas between, such as "0, 3"')
    return sorted({int(part) for part in parts})
