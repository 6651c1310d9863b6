"""StreamingLLM (Xiao et al. 2023, arXiv 2309.17453): a window of recent keys and a few first ones, the sinks.

Shape letters as in block.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadInput
from ..kernels.block_attention import Allowed, BlockMask, block_attention, blocks_of
from ..method import positive
from .block import BlockAttention
from .patterns import Pattern, sinks, window


class WindowSinks(BlockAttention):
    """`window(n) | sinks(s)`, chosen key by key.

    The paper fixes the window's length; that is `window` > 0. With window=0 a query at position p gets its budget's
    share of what it sees, max(1, round(budget * (p + 1))) keys, sinks among them, so that the same budget means the
    same density for every method; budget is then kept query by query.

    Args:
        sinks: first keys that are always kept (4 in the paper).
        window: fixed length of the window, or 0 to follow the budget.
    """

    name = "attention/window"
    unit = "key"

    def __init__(self, budget: float = 0.25, block: int = 16, query_block: int = 1, sinks: int = 4, window: int = 0) -> None:
        super().__init__(budget, block, query_block)
        positive("sinks", sinks)
        if window < 0:
            raise BadInput(f"window={window} must be >= 0 (0 follows the budget)")
        self.sinks, self.window = sinks, window
        self._cut: tuple[tuple[int, int, bool, torch.device], BlockMask] | None = None

    @property
    def pattern(self) -> Pattern:
        """The pattern as an expression of the algebra."""
        if self.window:
            return window(self.window) | sinks(self.sinks)
        return Pattern(f"window({self._budget:g} of what is seen) | sinks({self.sinks})", self._share)

    def _lengths(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """(first keys, window with the own key) of queries at these positions."""
        if self.window:
            return torch.full_like(at, self.sinks), torch.full_like(at, self.window)
        keep = torch.round(self._budget * (at + 1).double()).clamp_min(1).long()
        first = keep.clamp_max(self.sinks + 1) - 1               # the query's own key comes before the sinks
        return first, keep - first

    def _share(self, q: Tensor, k: Tensor) -> Tensor:
        first, length = self._lengths(q)
        keep = first + length
        return (k < first) | (q - k < keep - first)

    def allowed(self) -> Allowed:
        """Key-level predicate."""
        return self.pattern.allowed

    def choose(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
        """Blocks in which some key is allowed; independent of what queries and keys say."""
        T, S, rows = q_BHTD.shape[2], k_BGSD.shape[2], self._rows(q_BHTD.shape[2])
        if not causal:
            out = self.pattern.compile(T, S, size=self.block, query_block=rows, causal=False).to(q_BHTD.device)
            return out.expand(*q_BHTD.shape[:2], *out.shape)
        Q, N = blocks_of(T, S, self.block, rows)
        at_T = torch.arange(S - T, S, device=q_BHTD.device)
        row_T = at_T // rows - (S - T) // rows
        first_T, window_T = self._lengths(at_T)
        # Two runs of blocks a query, [0, first) and (p - window, p]: +1 where one starts, -1 behind its end, then a running sum.
        change_QN = torch.zeros(Q, N + 1, dtype=torch.int32, device=q_BHTD.device)
        one_T = torch.ones_like(at_T, dtype=torch.int32)
        for start_T, stop_T in ((torch.zeros_like(at_T), first_T.minimum(at_T + 1)), ((at_T + 1 - window_T).clamp_min(0), at_T + 1)):
            change_QN.index_put_((row_T, start_T // self.block), one_T * (stop_T > start_T), accumulate=True)
            change_QN.index_put_((row_T, (stop_T - 1) // self.block + 1), -one_T * (stop_T > start_T), accumulate=True)
        out = change_QN[:, :N].cumsum(1) > 0
        return out.expand(*q_BHTD.shape[:2], Q, N)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        T, S, rows = q.shape[2], k.shape[2], self._rows(q.shape[2])
        if rows == 1 or not q.numel():
            return super()._attend(q, k, v, scale, causal)
        self._shape = (q.shape[1], q.shape[-1], S, T)
        key = (T, S, causal, q.device)
        if self._cut is None or self._cut[0] != key:               # the layers of a pass ask for the same mask
            blocks = self.choose(q, k, causal)[:1, :1]
            self._cut = key, BlockMask.of(blocks, self.allowed(), T, S, block=self.block, query_block=rows)
        mask = self._cut[1]
        self._count(mask.blocks.expand(*q.shape[:2], -1, -1), T, S, causal)
        return block_attention(q, k, v, mask, block=self.block, query_block=rows, scale=scale, causal=causal)

    def _count(self, mask_BHQN: Tensor, T: int, S: int, causal: bool) -> None:
        every = mask_BHQN.shape[0] * mask_BHQN.shape[1]
        if not causal:
            self._kept += every * float(self.pattern.mask(T, S, causal=False).sum())
            self._seen += every * float(T * S)
            return
        at_T = torch.arange(S - T, S)
        first_T, window_T = self._lengths(at_T)
        self._kept += every * float((first_T + window_T).minimum(at_T + 1).sum())
        self._seen += every * float((at_T + 1).sum())
