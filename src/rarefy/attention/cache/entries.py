"""Cached keys and values with their true positions, in any order, and exact attention over them.

Shape letters: B = batch, H = query heads, G = key heads, R = query heads of a key head, T = queries, M = entries, D = head width,
K = entries chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .base import Growing

ROWS = 256
"""Queries whose dense scores are held at once."""


class Entries:
    """Tensors [B, G, M, ...] with one row an entry: k, v, at (position among real tokens, -1 = empty) and what a policy adds."""

    def __init__(self) -> None:
        self.held: dict[str, Growing] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self.held[name].view()

    def __len__(self) -> int:
        return next(iter(self.held.values())).length if self.held else 0

    def append(self, **new: Tensor) -> None:
        """Add rows behind the others; every name at each call."""
        for name, x in new.items():
            self.held.setdefault(name, Growing()).append(x)

    def put(self, name: str, x: Tensor) -> None:
        """Overwrite a tensor of the same shape."""
        self.held[name].view().copy_(x)

    def take(self, index_BGK: Tensor) -> None:
        """Keep these rows, in this order; -1 leaves an empty one."""
        none_BGK = index_BGK < 0
        index_BGK = index_BGK.clamp_min(0)
        for name, grown in self.held.items():
            x = grown.view()
            wide = index_BGK.view(*index_BGK.shape, *[1] * (x.ndim - 3)).expand(*index_BGK.shape, *x.shape[3:])
            fresh = Growing()
            fresh.append(x.gather(2, wide))
            if name == "at":
                fresh.view().masked_fill_(none_BGK, -1)
            self.held[name] = fresh

    def room(self, rows: int) -> dict[str, Tensor]:
        """The storages, with room for so many more rows; see Growing.room."""
        return {name: grown.room(rows) for name, grown in self.held.items()}

    def count(self, rows: int) -> None:
        """Take note that so many rows were written behind the others, or taken away (below 0)."""
        for grown in self.held.values():
            grown.length += rows

    def drop_one(self, victim_BG: Tensor) -> None:
        """Every head loses one row: the last takes its place."""
        for grown in self.held.values():
            x = grown.view()
            where = victim_BG.view(*victim_BG.shape, 1, *[1] * (x.ndim - 3)).expand(*victim_BG.shape, 1, *x.shape[3:])
            x.scatter_(2, where, x[:, :, -1:].clone())
            grown.length -= 1

    def rows(self, take: Callable[[Tensor], Tensor]) -> None:
        """Replace by `take` of it: other batch rows."""
        for grown in self.held.values():
            grown.rows(take)

    def tensors(self) -> dict[str, Tensor]:
        """The storages by name."""
        return {name: grown.store for name, grown in self.held.items() if grown.store is not None}


def probabilities(
    q_BHTD: Tensor, k_BGMD: Tensor, at_BGM: Tensor, at_BT: Tensor, scale: float, allowed_BTM: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Some queries at a time, (their slice, [B, G, R, t, M] float32 softmax); zeros for a padded query or one without keys.

    Args:
        allowed_BTM: which entries a query may see beside the rule that none is later than itself; None for all.
    """
    G, share = k_BGMD.shape[1], q_BHTD.shape[1] // k_BGMD.shape[1]
    for start in range(0, q_BHTD.shape[2], ROWS):
        rows = slice(start, min(start + ROWS, q_BHTD.shape[2]))
        q = q_BHTD[:, :, rows]
        # The heads of a key head side by side, or its keys would be copied for each.
        logit = (q.unflatten(1, (G, share)).flatten(2, 3) @ k_BGMD.mT).unflatten(2, (share, -1)).float() * scale
        at = at_BGM[:, :, None, None]
        seen = (at >= 0) & (at <= at_BT[:, None, None, rows, None])
        if allowed_BTM is not None:
            seen = seen & allowed_BTM[:, None, None, rows]
        p = logit.masked_fill(~seen, -torch.inf).softmax(-1)
        yield rows, p.masked_fill(~seen.any(-1, keepdim=True), 0.0)


def attend_entries(
    q_BHTD: Tensor, k_BGMD: Tensor, v_BGMD: Tensor, at_BGM: Tensor, at_BT: Tensor, scale: float, sums: bool = False,
    allowed_BTM: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, T, D], and, if `sums`, the probability that each entry got from all queries of its heads, [B, G, M])."""
    out = torch.empty_like(q_BHTD)
    total = torch.zeros(at_BGM.shape, dtype=torch.float32, device=q_BHTD.device)
    for rows, p in probabilities(q_BHTD, k_BGMD, at_BGM, at_BT, scale, allowed_BTM):
        out[:, :, rows] = (p.to(v_BGMD.dtype).flatten(2, 3) @ v_BGMD).unflatten(2, p.shape[2:4]).flatten(1, 2)
        if sums:
            total += p.sum((2, 3))
    return out, total


def dense(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, at_BT: Tensor, scale: float) -> Tensor:
    """Causal attention of T tokens among themselves: torch's kernel unless a row is padded."""
    if bool((at_BT < 0).any()):
        return attend_entries(q_BHTD, k_BGSD, v_BGSD, at_BT[:, None].expand(*k_BGSD.shape[:3]), at_BT, scale)[0]
    return scaled_dot_product_attention(q_BHTD, k_BGSD, v_BGSD, is_causal=True, scale=scale, enable_gqa=True)


def dense_sums(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What attend_entries gives with `sums` for T tokens among themselves without padding; keys that come later are not met at all."""
    G, T = k_BGTD.shape[1:3]
    out, total = torch.empty_like(q_BHTD), torch.zeros(k_BGTD.shape[:3], dtype=torch.float32, device=q_BHTD.device)
    for start in range(0, T, ROWS):
        stop = min(start + ROWS, T)
        q = q_BHTD[:, :, start:stop].unflatten(1, (G, -1))
        logit = (q.flatten(2, 3) @ k_BGTD[:, :, :stop].mT).float().mul_(scale).unflatten(2, q.shape[2:4])
        later = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu(1)
        logit[..., start:].masked_fill_(later, -torch.inf)
        p = logit.softmax(-1)
        total[:, :, :stop] += p.sum((2, 3))
        out[:, :, start:stop] = (p.to(v_BGTD.dtype).flatten(2, 3) @ v_BGTD[:, :, :stop]).unflatten(2, p.shape[2:4]).flatten(1, 2)
    return out, total


def first_of(order_score_BGM: Tensor, at_BGM: Tensor, keep_B: Tensor) -> Tensor:
    """Indices [B, G, K] of the `keep_B` highest filled entries in order of position, -1 behind a row's last; equal scores go to the later."""
    filled = at_BGM >= 0
    score = order_score_BGM.masked_fill(~filled, -torch.inf)
    by_place = at_BGM.argsort(dim=-1, descending=True, stable=True)
    best = by_place.gather(-1, score.gather(-1, by_place).argsort(dim=-1, descending=True, stable=True))
    most = int(keep_B.max())
    chosen = best[..., :most]
    good = (torch.arange(chosen.shape[-1], device=chosen.device) < keep_B[:, None, None]) & filled.gather(-1, chosen)
    place = at_BGM.gather(-1, chosen).masked_fill(~good, torch.iinfo(at_BGM.dtype).max)
    order = place.argsort(dim=-1, stable=True)
    return chosen.masked_fill(~good, -1).gather(-1, order)
