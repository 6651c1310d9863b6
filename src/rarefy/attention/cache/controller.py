"""A recurrent score of past tokens for the next step, and what it is taught: which tokens full attention's top K holds.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = tokens so far, C = states of the controller, D = head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from .entries import dense, probabilities


class Controller(nn.Module):
    """z_t = GRU(x_t, z_(t-1)) of a layer's inputs; each key head scores a past token s for step t from z_s, z_t and their distance."""

    def __init__(self, width: int, key_heads: int, states: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, states, batch_first=True)
        self.key = nn.Linear(states, key_heads * states, bias=False)
        self.query = nn.Linear(states, key_heads * states, bias=False)
        self.own = nn.Linear(states, key_heads)
        self.slope_G = nn.Parameter(torch.zeros(key_heads))

    def forward(self, now_BTC: Tensor, past_BSC: Tensor, at_BT: Tensor) -> Tensor:
        """[B, G, T, S] importance as a logit; past state s stands at place s."""
        G = len(self.slope_G)
        query, key = (f(z).unflatten(-1, (G, -1)) for f, z in ((self.query, now_BTC), (self.key, past_BSC)))
        distance = (at_BT[:, :, None] - torch.arange(past_BSC.shape[1], device=at_BT.device)).clamp_min(0)
        recent = self.slope_G[:, None, None] * distance[:, None].log1p()
        return torch.einsum("btgc,bsgc->bgts", query, key) / query.shape[-1] ** 0.5 + self.own(past_BSC).mT[:, :, None] - recent


class Watch(nn.Module):
    """Attends densely and notes inputs, queries and keys of every layer."""

    wants = ("hidden",)

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[Tensor, Tensor, Tensor, float]] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int, hidden_BTD: Tensor, **rest: Any) -> Tensor:
        self.seen[layer] = (hidden_BTD.float(), q, k, scale)
        at_BT = torch.arange(q.shape[2], device=q.device).expand(len(q), -1)
        return dense(q, k, v, at_BT, scale)


def attended(q_BHTD: Tensor, k_BGSD: Tensor, scale: float) -> Tensor:
    """[B, G, T, S] probability of each key from query t in full attention, the mean over the heads of a key head."""
    B, T = len(q_BHTD), q_BHTD.shape[2]
    at_BT = torch.arange(T, device=q_BHTD.device).expand(B, T)
    return torch.cat([p.mean(2) for _, p in probabilities(q_BHTD, k_BGSD, at_BT[:, None].expand(*k_BGSD.shape[:3]), at_BT, scale)], 2)


def wanted(weight_BGTS: Tensor, budget: float) -> Tensor:
    """[B, G, T, S] bool: the max(1, round(budget * (t + 1))) keys with the most probability from query t."""
    T = weight_BGTS.shape[2]
    visible = torch.ones(T, T, dtype=torch.bool, device=weight_BGTS.device).tril()
    rank = weight_BGTS.masked_fill(~visible, -1.0).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    keep_T = torch.tensor([max(1, round(budget * (t + 1))) for t in range(T)], device=weight_BGTS.device)
    return rank < keep_T[:, None]


def fit_controller(texts: list[tuple[Tensor, Tensor, Tensor, float]], states: int, budget: float, steps: int) -> Controller:
    """A controller taught by cross entropy with Adam, each step over one row of one text and 64 of its queries.

    A query's loss is the mean over the keys that it sees plus the mean weighted by the probability that they get. Without the second
    part a controller may name nearly all of a top K and miss the one token (a sink, say) that gets nearly all the probability.

    Args:
        texts: (inputs [B, T, E], queries, keys, scale) of a layer.
    """
    hidden, _, k, _ = texts[0]
    made = Controller(hidden.shape[-1], k.shape[1], states).to(hidden.device)
    rows = []
    for x, q, k, scale in texts:
        for b in range(len(x)):
            weight = attended(q[b : b + 1], k[b : b + 1], scale)
            rows.append((x[b], weight[0], wanted(weight, budget)[0]))
    optimiser = torch.optim.Adam(made.parameters(), lr=1e-2)
    for _ in range(steps):
        x_TE, weight_GTT, wanted_GTT = rows[int(torch.randint(len(rows), ()))]
        T = len(x_TE)
        at = torch.randperm(T)[:64].to(x_TE.device)
        z = made.gru(x_TE[None])[0]
        visible = torch.arange(T, device=at.device) <= at[:, None]
        loss = binary_cross_entropy_with_logits(made(z[:, at], z, at[None])[0], wanted_GTT[:, at].float(), reduction="none")
        optimiser.zero_grad()
        (loss * (visible / (at + 1)[:, None] + weight_GTT[:, at])).sum(-1).mean().backward()
        optimiser.step()
    return made.requires_grad_(False)
