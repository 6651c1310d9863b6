"""SEA (Lee et al. 2024, arXiv 2310.01777): linear attention sees roughly, a small decoder draws from it where exact attention looks.

    c_t = random-feature attention of query t (Performer); logits over C cells = conv(MLP[q_t; c_t])
    cell of key s, seen by a query with n keys: ceil((s + 1/2) C / n) - 1; the keys with the highest cells, `budget` n of them, are attended exactly
    loss = KL(dense map summed by cell || softmax(logits)) + mean squared distance of the two
The C cells stretch over whatever a query sees, so the decoder's work a query does not grow with the context, and neither does Performer's.
Departures: the output is the exact sparse attention alone, without the paper's learned mixture with c_t and its mean; the convolution runs along
cells only, not across queries, so that nothing later is looked at; cells tie for the last keys in favour of earlier ones; each head has a budget of
its own (in the authors' code a query's heads share one), and maps are compared by cell (there key by key, KL at a tenth).

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width, M = random features, C = cells, F = channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv1d, relu

from ...method import Loss, fraction, positive
from .base import PairAttention, causal_mask, dense_map, drawn, top_share

STRETCH = 64
"""Keys summed into Performer's state at a time."""
CHANNELS = 4


class SEA(PairAttention):
    """The budget's share of keys by an estimated map; train it with `Distilled`.

    Args:
        budget: share of the keys a query sees.
        cells: width of the estimated map. features: random features of the linear attention, drawn once.
    """

    name = "attention/sea"

    def __init__(self, heads: int, key_heads: int, d_head: int, budget: float = 0.25, cells: int = 64, features: int = 64, seed: int = 0) -> None:
        super().__init__()
        draw = self.sized(heads, key_heads, d_head, seed)
        self._budget, self.cells, self.features = fraction("budget", budget), positive("cells", cells), positive("features", features)
        blocks = [_rotation(d_head, draw) for _ in range(-(-features // d_head))]
        size = torch.randn(features, d_head, generator=draw).norm(dim=-1, keepdim=True)
        self.register_buffer("random_MD", torch.cat(blocks)[:features] * size)
        self.random_MD: Tensor
        wide = CHANNELS * cells
        self.in_HDF = drawn(draw, heads, 2 * d_head, 2 * d_head, std=d_head**-0.5)
        self.out_HDF = drawn(draw, heads, 2 * d_head, wide, std=(2 * d_head) ** -0.5)
        self.kernel_1F3 = drawn(draw, 1, CHANNELS, 3, std=(3 * CHANNELS) ** -0.5)

    @property
    def budget(self) -> float:
        """Share of visible keys kept."""
        return self._budget

    def rough(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        """[B, H, T, D] Performer's estimate of attention, by running sums over keys (Choromanski et al. 2021, positive features)."""
        T, S, share = q.shape[2], k.shape[2], self.heads // self.key_heads
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        log_q, log_k = ((x * scale**0.5) @ self.random_MD.mT - (x * scale**0.5).square().sum(-1, keepdim=True) / 2 for x in (q, k))
        q, k = (log_q - log_q.amax(-1, keepdim=True)).exp(), (log_k - log_k.amax((-1, -2), keepdim=True)).exp()
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)                   # the last column sums to the normaliser
        if not causal:
            out = q @ (k.mT @ v)
            return out[..., :-1] / out[..., -1:].clamp_min(torch.finfo(v.dtype).tiny)
        state, outs = v.new_zeros(*v.shape[:2], self.features, v.shape[-1]), []
        for start in range(0, S, STRETCH):
            keys = slice(start, min(S, start + STRETCH))
            rows = slice(max(0, start - S + T), max(0, keys.stop - S + T))
            seen = causal_mask(keys.stop - start, keys.stop - start, q.device)[max(0, S - T - start) :]
            if rows.stop > rows.start:
                inner = (q[:, :, rows] @ k[:, :, keys].mT).masked_fill(~seen, 0.0)
                outs.append(q[:, :, rows] @ state + inner @ v[:, :, keys])
            state = state + k[:, :, keys].mT @ v[:, :, keys]
        out = torch.cat(outs, 2)
        return out[..., :-1] / out[..., -1:].clamp_min(torch.finfo(v.dtype).tiny)

    def _cell(self, T: int, S: int, causal: bool, device: torch.device) -> Tensor:
        """[T, S] number of each key's cell; C at keys not seen."""
        at_S, seen_T = torch.arange(S, device=device), torch.arange(S - T + 1, S + 1, device=device)[:, None]
        seen_T = seen_T if causal else torch.full_like(seen_T, S)
        return torch.where(at_S < seen_T, ((2 * at_S + 1) * self.cells - 1) // (2 * seen_T), self.cells)

    def estimate(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        """[B, H, T, C] logits of the estimated map."""
        inside = torch.cat([q * (scale * self.d_head**0.5), self.rough(q, k, v, scale, causal)], -1)
        wide = relu(inside @ self.in_HDF) @ self.out_HDF
        flat = wide.unflatten(-1, (CHANNELS, self.cells))
        return conv1d(flat.flatten(0, 2), self.kernel_1F3, padding=1)[:, 0].view(*q.shape[:3], self.cells)

    @torch.no_grad()
    def choice(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """[B, H, T, S] bool."""
        T, S = q.shape[2], k.shape[2]
        cell = self._cell(T, S, causal, q.device)
        logit = self.estimate(q, k, v, scale, causal)
        score = logit.gather(3, cell.clamp_max(self.cells - 1).expand(*logit.shape[:2], T, S))
        return top_share(score, cell < self.cells, self._budget)

    def distil(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, scale: float, causal: bool, hidden_BTD: Tensor | None = None) -> Loss:
        """KL (nats a query) and squared distance of the estimated map from the dense one summed by cell; cells without keys are left out."""
        self.refuse_other_sizes(q_BHTD, k_BGSD)
        cell = self._cell(q_BHTD.shape[2], k_BGSD.shape[2], causal, q_BHTD.device)
        one = torch.nn.functional.one_hot(cell, self.cells + 1)[..., : self.cells]
        with torch.no_grad():
            truth = torch.einsum("bhts,tsc->bhtc", dense_map(q_BHTD, k_BGSD, scale, causal), one.to(q_BHTD.dtype))
        logit = self.estimate(q_BHTD, k_BGSD, v_BGSD, scale, causal)
        log = logit.masked_fill(~one.any(1), torch.finfo(logit.dtype).min).log_softmax(-1)
        kl = (torch.special.xlogy(truth, truth) - truth * log).sum(-1).mean()
        mse = (log.exp() - truth).square().mean()
        return Loss(kl + mse, {"kl": kl, "mse": mse})

    def own_flops(self, heads: int, width: int, keys: float) -> float:
        """Features of a query and its key, the running sums, and the decoder."""
        rough = 2 * self.features * width * (heads + self.key_heads) + 4 * heads * self.features * width
        return rough + heads * (8 * width * width + 4 * width * CHANNELS * self.cells + 6 * CHANNELS * self.cells)


def _rotation(n: int, draw: torch.Generator) -> Tensor:
    """[n, n] orthogonal, evenly distributed: QR of normal values is so only once the signs of R's diagonal are moved into Q."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=draw))
    return q * r.diagonal().sign()
