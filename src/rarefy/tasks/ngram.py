"""A transformer layer that is an n-gram model, by construction (Svete & Cotterell 2024, arXiv 2404.14994).

n - 1 heads with sparsemax each put all of their weight on one of the last n - 1 tokens; what they bring, read together, names
the history, and an output layer looks its distribution up. With softmax the same weights only come near.

Shape letters: B = sequences, T = tokens, V = vocabulary, H = n - 1 heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import BadInput
from ..maps import sparsemax


class NGram:
    """One attention layer for a table of conditional probabilities.

    Positions are points on a circle, p_t = (cos wt, sin wt): turned by w h, the query at t is the point of t - h exactly, and every
    other position within `longest` lies at least 1 - cos w below it. Where the gap is 1 or more sparsemax gives it all; the scale makes it 2.

    Args:
        table: [V, ..., V] with n dims: next-token probabilities by the n - 1 tokens before, oldest first.
        longest: longest sequence.
    """

    def __init__(self, table: Tensor, longest: int) -> None:
        if table.ndim < 2 or len(set(table.shape)) != 1:
            raise BadInput(f"an n-gram table has n dims of one size, not shape {list(table.shape)}")
        if not torch.allclose(table.sum(-1), torch.ones((), dtype=table.dtype)) or bool((table < 0).any()):
            raise BadInput("each row of an n-gram table must be probabilities that sum to one")
        if longest < table.ndim:
            raise BadInput(f"longest={longest} must be at least n = {table.ndim}")
        self.table, self.longest = table, longest
        self.angle = 2 * math.pi / longest

    def weights(self, T: int, map: Callable[[Tensor], Tensor] = sparsemax) -> Tensor:
        """[H, T, T] attention of T tokens: head h of 0..n-2 from position t to t - h. Rows before the history is there are not meant to be read.

        Args:
            map: from scores to weights.
        """
        if not 0 < T <= self.longest:
            raise BadInput(f"{T} tokens, but this was built for 1..{self.longest}")
        at = torch.arange(T, dtype=torch.float64) * self.angle
        key_T2 = torch.stack([at.cos(), at.sin()], -1)
        later = ~torch.ones(T, T, dtype=torch.bool).tril()
        sharp = 2 / (1 - math.cos(self.angle))
        heads = []
        for h in range(self.table.ndim - 1):
            turned = at - h * self.angle
            query_T2 = torch.stack([turned.cos(), turned.sin()], -1)
            heads.append(map((sharp * query_T2 @ key_T2.mT).masked_fill(later, -torch.inf)))
        return torch.stack(heads)

    def __call__(self, ids_BT: Tensor, map: Callable[[Tensor], Tensor] = sparsemax) -> Tensor:
        """[B, T, V] next-token probabilities from position n - 2 on; zeros before, where the history is too short."""
        V, n = self.table.shape[0], self.table.ndim
        if not bool(((ids_BT >= 0) & (ids_BT < V)).all()):
            raise BadInput(f"tokens must be in 0..{V - 1}")
        one_hot_BTV = torch.nn.functional.one_hot(ids_BT, V).double()
        seen_BHTV = self.weights(ids_BT.shape[1], map) @ one_hot_BTV[:, None]
        out = self.table.double()
        # The history's indicator is a product of the heads' one-hots; contracting head by head is that lookup, oldest first.
        letters = "abcdefgh"[: n - 1]
        terms = ",".join(f"xt{c}" for c in letters)
        heads = [seen_BHTV[:, h] for h in reversed(range(n - 1))]
        out = torch.einsum(f"{letters}v,{terms}->xtv", out, *heads)
        out[:, : n - 2] = 0
        return out
