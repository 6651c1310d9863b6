"""Tensors with one row a token, every batch row packed from slot 0 on: slot = place among the real tokens, no room for padding.

Shape letters: B = batch, G = key heads, T = new tokens, S = slots.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .base import Growing


class Aligned:
    """Named tensors [B, G, S, ...]; slots behind a row's last token hold zeros."""

    def __init__(self) -> None:
        self.held: dict[str, Growing] = {}
        self.count_B: Tensor | None = None
        """Real tokens of each row."""

    def __getitem__(self, name: str) -> Tensor:
        return self.held[name].view()

    def __len__(self) -> int:
        return next(iter(self.held.values())).length if self.held else 0

    def place(self, at_BT: Tensor, **new: Tensor) -> None:
        """Put rows x[b, :, t] of each tensor [B, G, T, ...] at slot at_BT[b, t]; those at -1 are left out."""
        before, T = len(self), at_BT.shape[1]
        ahead = torch.arange(before, before + T, device=at_BT.device)
        plain = bool((at_BT == ahead).all())
        b, t = (at_BT >= 0).nonzero(as_tuple=True)
        end = max(before, int(at_BT.max()) + 1)
        for name, x in new.items():
            grown = self.held.setdefault(name, Growing())
            if plain:
                grown.append(x)
                continue
            grown.append(x.new_zeros(*x.shape[:2], end - before, *x.shape[3:]))
            grown.view()[b, :, at_BT[b, t]] = x[b, :, t]
        count_B = at_BT.amax(1) + 1
        self.count_B = count_B if self.count_B is None else self.count_B.maximum(count_B)

    def push(self, **new: Tensor) -> None:
        """Add rows behind the others, where all batch rows hold as many; every name at each call."""
        assert self.count_B is not None
        for name, x in new.items():
            self.held[name].append(x)
        self.count_B = self.count_B + next(iter(new.values())).shape[2]

    def stores(self) -> dict[str, Tensor]:
        """The storages, room behind the last slot included."""
        return {name: grown.room(0) for name, grown in self.held.items()}

    def room(self, rows: int) -> dict[str, Tensor]:
        """The storages, with room for so many more slots; see Growing.room."""
        return {name: grown.room(rows) for name, grown in self.held.items()}

    def count(self, rows: int) -> None:
        """Take note that so many slots were filled behind the others, in every row."""
        assert self.count_B is not None
        self.count_B = self.count_B + rows
        for grown in self.held.values():
            grown.length += rows

    def crop(self, left: int) -> None:
        """Keep the first `left` slots, where all batch rows hold as many."""
        assert self.count_B is not None
        self.count_B = self.count_B.clamp_max(left)
        for grown in self.held.values():
            grown.length = min(grown.length, left)

    def at(self) -> Tensor:
        """[B, S] each slot's place; -1 behind a row's last token."""
        assert self.count_B is not None
        slot = torch.arange(len(self), device=self.count_B.device)
        return torch.where(slot < self.count_B[:, None], slot, -1)

    def rows(self, take: Callable[[Tensor], Tensor]) -> None:
        """Replace by `take` of it: other batch rows."""
        for grown in self.held.values():
            grown.rows(take)
        if self.count_B is not None:
            self.count_B = take(self.count_B)

    def tensors(self) -> dict[str, Tensor]:
        """The storages by name."""
        counted = {} if self.count_B is None else {"count": self.count_B}
        return counted | {name: grown.store for name, grown in self.held.items() if grown.store is not None}
