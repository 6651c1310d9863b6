"""Chunked sparse prefill of Qwen2.5-1M (Yang et al. 2025, arXiv 2501.15383): columns and diagonals chunk by chunk, budgets by recall.

A prompt is filled in chunks. The last queries of each chunk show which columns and diagonals of all keys so far matter to it (vertical-slash of
MInference), and the chunk attends to those. How many is settled offline for each head: what a sparse softmax keeps of the whole one,
    recall = exp(lse of the chosen pairs - lse of all pairs),
is measured on calibration text, and a head below the target is given more until it reaches it.

Logits are those of the model as it stands. The report also extends lengths by dual chunk attention and then estimates with continuous
positions; a model that attends in that way is not served.
Shape letters as in scores.py; C = cells of a histogram of levels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ...errors import BadInput
from ...kernels.block_attention import block_attention
from ...method import fraction, positive
from .fitted import Fitted
from .rules import BINS
from .scores import probabilities
from .vertical_slash import VerticalSlash


class Chunked(Fitted):
    """Vertical-slash for each chunk, with a level for each head at which lines are no longer taken.

    Chunks are cut at multiples of `chunk` of the position, so that a prompt given at once and the same given chunk by chunk
    through a cache are served alike. Decoding steps are dense.

    Args:
        budget: fraction of visible pairs. With a target every head's least; without, the mean of the heads, shared out so that all
            reach the same recall on calibration text.
        target: recall that each head is raised to, in (0, 1), or 0.
        chunk: queries of a chunk (32,768 in the report).
        share: of a head's lines, for columns.
        last: probing queries of each chunk (64 in the report).
    """

    name = "attention/chunked"
    unit = "column or diagonal"
    wants = ("cache",)
    prefill_only = True
    cells_H: Tensor

    def __init__(self, budget: float = 0.25, target: float = 0.0, chunk: int = 256, share: float = 0.5, last: int = 64) -> None:
        super().__init__(budget, 1, 1)
        if isinstance(target, bool) or not isinstance(target, int | float) or not 0 <= target < 1:
            raise BadInput(f"target={target!r} must be in [0, 1): a recall, or 0 to share the budget (budget=1 keeps everything)")
        self.target, self.chunk = float(target), positive("chunk", chunk)
        self.lines = VerticalSlash(1.0, fraction("share", share), positive("last", last))
        self.span = 1 / max(share, 1 - share)
        self.register_buffer("cells_H", torch.zeros(0, dtype=torch.long))

    def shapes(self, H: int, G: int, D: int) -> Mapping[str, tuple[int, ...]]:
        """cells_H: of BINS + 1 cells of levels, the last that each head keeps."""
        return {"cells_H": (H,)}

    def chunks(self, T: int, S: int) -> Iterator[tuple[slice, int]]:
        """(queries, keys so far) of each chunk."""
        start = 0
        while start < T:
            end = min(T, ((S - T + start) // self.chunk + 1) * self.chunk - (S - T))
            yield slice(start, end), S - T + end
            start = end

    def _cells(self, level: Tensor) -> Tensor:
        """Cell of each level: 0 where always kept, BINS at the last that any line has."""
        return (level / self.span * BINS).nan_to_num(posinf=BINS + 1, neginf=0.0).ceil().clamp(0, BINS + 1).long()

    def gather(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Mapping[str, Tensor]:
        """Attention and pairs of each head in each cell: what a head keeps, and of how many pairs, wherever it stops."""
        H, T, S = q_BHTD.shape[1], q_BHTD.shape[2], k_BGSD.shape[2]
        mass, pairs = (torch.zeros(H, BINS + 2, dtype=torch.float64, device=q_BHTD.device) for _ in range(2))
        for mine, end in self.chunks(T, S):
            level, seen_TS = self.lines.levels(q_BHTD[:, :, mine], k_BGSD[:, :, :end], True)
            cell = self._cells(level).transpose(0, 1).flatten(1)
            weight = probabilities(q_BHTD[:, :, mine], k_BGSD[:, :, :end], True).double().transpose(0, 1).flatten(1)
            mass.scatter_add_(1, cell, weight)
            pairs.scatter_add_(1, cell, seen_TS.double().expand(level.shape).transpose(0, 1).flatten(1))
        return {"mass": mass, "pairs": pairs}

    def settle(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The first cell at which each head reaches the target and the budget, or the budget's share of all heads at one recall."""
        recall_HC, density_HC = (sums[name][:, : BINS + 1].cumsum(1) / sums[name].sum(1, keepdim=True) for name in ("mass", "pairs"))
        if self._budget == 1:
            return {"cells_H": torch.full_like(recall_HC[:, 0], BINS + 1, dtype=torch.long)}
        if self.target:
            return {"cells_H": ((recall_HC < self.target) | (density_HC < self._budget)).sum(1).clamp_max(BINS)}
        low, high = 0.0, 1.0
        for _ in range(40):                                                    # density grows with the recall asked for
            middle = (low + high) / 2
            cell_H = (recall_HC < middle).sum(1).clamp_max(BINS)
            low, high = (middle, high) if float(density_HC.gather(1, cell_H[:, None]).mean()) < self._budget else (low, middle)
        return {"cells_H": (recall_HC < low).sum(1).clamp_max(BINS)}

    def choose(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
        """[B, H, T, S] bool. Raises BadInput before fitting, and for attention that sees ahead: chunks are filled in order."""
        self._fits(q_BHTD, k_BGSD)
        if not causal:
            raise BadInput(f"{self.name} fills a prompt chunk by chunk and cannot see ahead; use attention/vertical_slash")
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        keep = torch.zeros(*q_BHTD.shape[:2], T, S, dtype=torch.bool, device=q_BHTD.device)
        for mine, end in self.chunks(T, S):
            level, seen_TS = self.lines.levels(q_BHTD[:, :, mine], k_BGSD[:, :, :end], True)
            keep[:, :, mine, :end] = (self._cells(level) <= self.cells_H[:, None, None]) & seen_TS
        return keep

    @torch.no_grad()
    def recall(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
        """[B, H, T] share of each query's causal attention that is kept, exp(lse of the chosen pairs - lse of all), without forming the map."""
        keep = self._chosen(q_BHTD, k_BGSD, v_BGSD, True)
        how = {"block": 1, "query_block": 1, "scale": q_BHTD.shape[-1] ** -0.5, "return_lse": True}
        (_, part), (_, whole) = (block_attention(q_BHTD, k_BGSD, v_BGSD, mask, **how) for mask in (keep, torch.ones_like(keep)))
        return (part - whole).exp()

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """Logits of each chunk's probing queries, shared among its queries."""
        T = self._shape[3] if self._shape else self.chunk
        return 2 * heads * width * keys * min(1.0, self.lines.last / min(T, self.chunk))
