"""A graph over keys that follows where queries look, and best-first search on it (RoarGraph, Chen et al. 2024, arXiv 2408.08933).

Queries and keys of a head lie in different places, so that neighbours among keys are no guide to what a query's nearest keys are. Here two keys
are neighbours where the same query has both among its nearest: each query's nearest keys make a star about the very nearest.

Shape letters: B = batch, G = key heads, P = probing queries, S = keys, D = head width, M = neighbours of a key, E = entries, R = searching queries,
W = width of the beam.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..block import highest

_AT_ONCE = 4
"""Keys of the beam whose neighbours are looked at together."""
_PROBES = 256
"""Probes whose products with all keys are held at once."""


@dataclass(frozen=True)
class KeyGraph:
    """neighbour_BGSM [B, G, S, M], -1 for none, and where searches begin, entry_BGE."""

    neighbour_BGSM: Tensor
    entry_BGE: Tensor


def build(probe_BGPD: Tensor, k_BGSD: Tensor, near: int, degree: int, entries: int = 4) -> KeyGraph:
    """Exact nearest keys of each probe, projected onto the keys: the `degree` pairs most often together; each key also knows its two
    neighbours in time, so that all can be reached. Searches begin at the keys that most probes have among their nearest."""
    B, G, S, _ = k_BGSD.shape
    found = [(some @ k_BGSD.mT).topk(min(near, S), -1).indices for some in probe_BGPD.split(_PROBES, 2)]
    nearest = torch.cat(found, 2) if found else probe_BGPD.new_zeros(B, G, 0, min(near, S), dtype=torch.long)
    step = torch.arange(S, device=nearest.device)
    beside = torch.stack((step - 1, torch.where(step + 1 < S, step + 1, -1)), -1).expand(B, G, S, 2)
    named = torch.zeros(B, G, S, dtype=torch.int32, device=nearest.device)
    flat = nearest.flatten(2)
    named.scatter_add_(2, flat, torch.ones_like(flat, dtype=torch.int32))
    often = _often(nearest.flatten(0, 1), S, min(degree, S)).view(B, G, S, -1)
    return KeyGraph(torch.cat((often, beside), -1), named.topk(min(entries, S), -1).indices)


def _often(nearest_XPN: Tensor, S: int, degree: int) -> Tensor:
    """[X, S, degree] the keys that most often were the very nearest beside a key or the other way round; of equals the first, -1 for none.

    Of pairs that were met alone, since a table of all pairs would have S^2 places.
    """
    X, device = len(nearest_XPN), nearest_XPN.device
    head = torch.arange(X, device=device)[:, None, None] * S
    centre, other = nearest_XPN[..., :1].expand_as(nearest_XPN[..., 1:]), nearest_XPN[..., 1:]
    met = torch.cat([((head + one) * S + two).flatten() for one, two in ((centre, other), (other, centre))])
    pair, count = met.unique(return_counts=True)
    most = int(count.max()) + 1 if len(count) else 1
    order = (pair // S * most + most - 1 - count).sort(stable=True).indices
    owner, two = pair[order] // S, pair[order] % S
    total = torch.bincount(owner, minlength=X * S)
    place = torch.arange(len(owner), device=device) - (total.cumsum(0) - total)[owner]
    out = torch.full((X * S, degree), -1, device=device)
    fits = place < degree
    out[owner[fits], place[fits]] = two[fits]
    return out.view(X, S, degree)


def search(q_BGRD: Tensor, k_BGSD: Tensor, graph: KeyGraph, width_R: Tensor) -> tuple[Tensor, Tensor]:
    """(at [B, G, R, W], looked [B, G, R, S] bool): keys of the largest products found, best first, -1 beyond a query's width, and those looked at.

    Best-first: the best keys of the beam whose neighbours were not yet looked at open theirs, until the beam holds none. A query's
    search is its own: it ends as it would alone.

    Args:
        width_R: keys in each query's beam.
    """
    (B, G, R, D), S, W = q_BGRD.shape, k_BGSD.shape[2], max(1, int(width_R.max()))
    rank, bar = torch.arange(W, device=q_BGRD.device), -torch.inf
    looked = torch.zeros(B, G, R, S + 1, dtype=torch.bool, device=q_BGRD.device)         # the last column takes what is no key
    at = torch.full((B, G, R, W), -1, device=q_BGRD.device)
    score, opened = q_BGRD.new_full((B, G, R, W), bar), torch.ones(B, G, R, W, dtype=torch.bool, device=q_BGRD.device)
    fresh = graph.entry_BGE[:, :, None].expand(-1, -1, R, -1)
    while True:
        new = (fresh >= 0) & ~looked.gather(3, torch.where(fresh >= 0, fresh, S))
        order = torch.where(new, fresh, S).sort(-1).values
        fresh = torch.where((order < S) & (order != torch.nn.functional.pad(order, (1, 0), value=-1)[..., :-1]), order, -1)
        looked.scatter_(3, torch.where(fresh >= 0, fresh, S), True)
        keys = k_BGSD.gather(2, fresh.clamp_min(0).flatten(2)[..., None].expand(-1, -1, -1, D)).unflatten(2, fresh.shape[2:])
        gained = (keys @ q_BGRD[..., None])[..., 0].masked_fill(fresh < 0, bar)
        at, score = torch.cat((at, fresh), -1), torch.cat((score, gained), -1)
        opened = torch.cat((opened, fresh < 0), -1)
        score, best = score.topk(W, -1)
        score = score.masked_fill(rank >= width_R[:, None], bar)
        at = at.gather(3, best).masked_fill(score == bar, -1)
        opened = opened.gather(3, best) | (at < 0)
        if bool(opened.all()):
            return at, looked[..., :S]
        take = highest(torch.where(opened, bar, score), torch.full((B, G, R, 1), min(_AT_ONCE, W), device=at.device)) & ~opened
        opened = opened | take
        place = take.to(torch.uint8).topk(min(_AT_ONCE, W), -1)
        chosen = torch.where(place.values > 0, at.gather(3, place.indices), -1)
        around = graph.neighbour_BGSM.gather(2, chosen.clamp_min(0).flatten(2)[..., None].expand(-1, -1, -1, graph.neighbour_BGSM.shape[-1]))
        fresh = around.unflatten(2, chosen.shape[2:]).masked_fill(chosen[..., None] < 0, -1).flatten(-2)
