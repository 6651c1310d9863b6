"""Mustafar (Joo et al. 2025): each cached key and value keeps its largest channels, as a bitmap and the packed rest.

Shape letters: B = batch, G = key heads, R = query heads of a key head, T = tokens, S = tokens in the store, D = head width,
C = channels kept, E = ceil(D / 8) bytes of bitmap.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.coded_attention import bitmap_attention, prune_rows, unpack_rows
from ...method import positive
from .compressed import CompressedLayer
from .policy import Policy

TILE = 256
"""Tokens that are unpacked at once while they are computed on."""


class _Layer(CompressedLayer):
    width = 0

    def pack(self, k_BGTD: Tensor, v_BGTD: Tensor) -> dict[str, Tensor]:
        self.width = k_BGTD.shape[-1]
        keep = max(1, round(self.budget * self.width))
        (k_bits, k), (v_bits, v) = prune_rows(k_BGTD, keep), prune_rows(v_BGTD, keep)
        return {"k bits": k_bits, "k": k, "v bits": v_bits, "v": v}

    def decode(self, q_BH1D: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        assert self.far.count_B is not None
        far = self.far
        return bitmap_attention(q_BH1D, far["k bits"], far["k"], far["v bits"], far["v"], self.far.count_B, scale=scale)

    def _tile(self, what: str, start: int) -> Tensor:
        rows = slice(start, start + TILE)
        return unpack_rows(self.far[f"{what} bits"][:, :, rows], self.far[what][:, :, rows], self.width)[:, :, None]

    def scores(self, q_BGRTD: Tensor) -> Tensor:
        """Tile by tile; no more than a tile is ever unpacked."""
        return torch.cat([q_BGRTD @ self._tile("k", s).mT for s in range(0, len(self.far), TILE)], -1)

    def mix(self, p_BGRTS: Tensor) -> Tensor:
        out = p_BGRTS.new_zeros(*p_BGRTS.shape[:-1], self.width)
        for s in range(0, len(self.far), TILE):
            out += p_BGRTS[..., s : s + TILE] @ self._tile("v", s)
        return out


class Mustafar(Policy):
    """Per-token magnitude pruning of keys and values behind a dense local window (sec. 3), stored as bitmap and packed values.

    Each token and head keeps max(1, round(budget * D)) channels of its key and of its value, whichever they are: ceil(D / 8)
    bytes of bitmap and the values themselves. Scores and sums are computed from the packed form, a tile at a time. The authors' code
    keeps one channel more, where its threshold is the last one to be dropped.

    Args:
        recent: newest tokens that are kept whole (32 in the paper).
    """

    name = "cache/mustafar"
    unit = "channel of a cached key or value"
    layer = _Layer

    def __init__(self, budget: float | list[float] = 0.5, recent: int = 32) -> None:
        super().__init__(budget)
        self.recent = positive("recent", recent)
