"""Policies that keep every token in fewer bytes: a window of exact entries, and behind it a store that is computed on as it is.

Shape letters: B = batch, H = query heads, G = key heads, R = query heads of a key head, T = new tokens, S = tokens in the store,
W = entries of the window, D = head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels.block_attention.softmax import attend, merge
from ...kernels.cache_steps import evicting_step
from .aligned import Aligned
from .entries import ROWS, Entries, dense
from .policy import Policy, PolicyLayer, Rotary


class CompressedLayer(PolicyLayer):
    """Tokens that leave the window are packed. Subclasses write `pack`, `scores`, `mix` and `decode`."""

    def __init__(self, policy: Policy, index: int) -> None:
        super().__init__(policy, index)
        self.window, self.far = Entries(), Aligned()

    def pack(self, k_BGTD: Tensor, v_BGTD: Tensor) -> dict[str, Tensor]:
        """What the store keeps of these tokens, each [B, G, T, ...]; of each token by itself."""
        raise NotImplementedError

    def scores(self, q_BGRTD: Tensor) -> Tensor:
        """q . k of every key in the store, [B, G, R, T, S]."""
        raise NotImplementedError

    def mix(self, p_BGRTS: Tensor) -> Tensor:
        """The sum of the store's values with these weights, [B, G, R, T, D]."""
        raise NotImplementedError

    def decode(self, q_BH1D: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(out [B, H, 1, D], lse [B, H, 1]) of one query a head over the whole store, all of which is before it."""
        raise NotImplementedError

    def answer(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, at_BT: Tensor, *, scale: float, rotary: Rotary, hidden_BTD: Tensor | None
    ) -> Tensor:
        first = not len(self.window)
        at_BGT = at_BT[:, None].expand(*k_BGTD.shape[:3])
        self.window.append(k=k_BGTD, v=v_BGTD, at=at_BGT.int())
        out = dense(q_BHTD, k_BGTD, v_BGTD, at_BT, scale) if first else self._attend(q_BHTD, at_BT, scale)
        self._move()
        return out

    def step(self, q_BH1D: Tensor, k_BG1D: Tensor, v_BG1D: Tensor, *, scale: float) -> Tensor | None:
        held, recent = len(self.window), self.policy.recent                   # type: ignore[attr-defined]
        if not 0 < held <= recent:
            return None
        full, room = held == recent, self.window.room(1)
        out, lse = evicting_step(
            q_BH1D, k_BG1D, v_BG1D, room["k"], room["v"], room["at"], None, held=held, place=self.seen - 1, first=0, recent=self.seen,
            drop=full, scale=scale)
        self.window.count(0 if full else 1)
        if len(self.far):
            stored, far_lse = self.decode(q_BH1D, scale)
            out = torch.lerp(stored, out, (lse - far_lse).sigmoid()[..., None].to(out.dtype))     # the exact union of both
        if full:
            leaves = self.pack(room["k"][:, :, held:recent + 1], room["v"][:, :, held:recent + 1])
            if len(self.far):
                self.far.push(**leaves)
            else:
                self.far.place(torch.zeros(len(q_BH1D), 1, dtype=torch.long, device=q_BH1D.device), **leaves)
        return out

    def _attend(self, q_BHTD: Tensor, at_BT: Tensor, scale: float) -> Tensor:
        w, far = self.window, len(self.far)
        k, v, at_BM = w["k"], w["v"], w["at"][:, 0]
        if far:
            at_BM = torch.cat([self.far.at(), at_BM], 1)
        if far and q_BHTD.shape[2] == 1:
            wide = (at_BM[:, far:, None] >= 0)[:, None, None].mT                         # a new token sees the whole window
            near, lse = attend(q_BHTD.unflatten(1, (k.shape[1], -1)), k[:, :, None], v[:, :, None], wide, scale)
            out = merge([near.flatten(1, 2), (stored := self.decode(q_BHTD, scale))[0]], [lse.flatten(1, 2), stored[1]])[0]
            return out.masked_fill((at_BT < 0)[:, None, :, None], 0.0)
        out = torch.empty_like(q_BHTD)
        for start in range(0, q_BHTD.shape[2], ROWS):
            rows = slice(start, start + ROWS)
            q = q_BHTD[:, :, rows].unflatten(1, (k.shape[1], -1))
            logit = q @ k[:, :, None].mT
            logit = torch.cat([self.scores(q), logit], -1) if far else logit
            seen = (at_BM[:, None] >= 0) & (at_BM[:, None] <= at_BT[:, rows, None])
            p = (logit.float() * scale).masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
            p = p.masked_fill(~seen.any(-1)[:, None, None, :, None], 0.0).to(v.dtype)
            got = p[..., far:] @ v[:, :, None]
            out[:, :, rows] = (got + self.mix(p[..., :far]) if far else got).flatten(1, 2)
        return out

    def _move(self) -> None:
        """Pack what is no longer among the newest `recent` tokens of its row."""
        w = self.window
        at_BM = w["at"][:, 0]
        newest_B = at_BM.amax(1)
        stays = at_BM > (newest_B - self.policy.recent)[:, None]              # type: ignore[attr-defined]
        leaves = (at_BM >= 0) & ~stays
        most = int(leaves.sum(1).max())
        if not most and bool((at_BM >= 0).all()):
            return
        by_place = at_BM.argsort(dim=1, stable=True)
        if most:
            index_BL = leaves.gather(1, by_place).int().argsort(dim=1, descending=True, stable=True)[:, :most]
            index_BL = by_place.gather(1, index_BL)
            wide = index_BL[:, None, :, None].expand(-1, w["k"].shape[1], -1, w["k"].shape[-1])
            at_BL = at_BM.gather(1, index_BL).masked_fill(~leaves.gather(1, index_BL), -1)
            self.far.place(at_BL.long(), **self.pack(w["k"].gather(2, wide), w["v"].gather(2, wide)))
        keep = int(stays.sum(1).max())
        order = stays.gather(1, by_place).int().argsort(dim=1, descending=True, stable=True)[:, : max(1, keep)]
        index = by_place.gather(1, order)
        index = index.masked_fill(~stays.gather(1, index), -1)
        w.take(index[:, None].expand(-1, w["k"].shape[1], -1))

    def kept(self) -> Tensor:
        """Every token."""
        return (self.window["at"].amax(-1) + 1).long()

    def tensors(self) -> dict[str, Tensor]:
        return {f"window {n}": x for n, x in self.window.tensors().items()} | {f"far {n}": x for n, x in self.far.tensors().items()}

    def rows(self, take: Callable[[Tensor], Tensor]) -> None:
        self.window.rows(take)
        self.far.rows(take)
