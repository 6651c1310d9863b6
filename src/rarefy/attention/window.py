"""StreamingLLM (Xiao et al. 2023, arXiv 2309.17453): a window of recent keys and a few first ones, the sinks.

Shape letters as in block.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadInput
from ..kernels.block_attention import Allowed, blocks_of
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

    @property
    def pattern(self) -> Pattern:
        """The pattern as an expression of the algebra."""
        if self.window:
            return window(self.window) | sinks(self.sinks)
        return Pattern(f"window({self._budget:g} of what is seen) | sinks({self.sinks})", self._share)

    def _share(self, q: Tensor, k: Tensor) -> Tensor:
        keep = torch.round(self._budget * (q + 1).double()).clamp_min(1).long()
        first = keep.clamp_max(self.sinks + 1) - 1               # the query's own key comes before the sinks
        return (k < first) | (q - k < keep - first)

    def allowed(self) -> Allowed:
        """Key-level predicate."""
        return self.pattern.allowed

    def choose(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
        """Blocks in which some key is allowed; independent of what queries and keys say."""
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        rows = self._rows(T)
        at_T = torch.arange(S - T, S, device=q_BHTD.device)
        mask_TS = self.pattern.allowed(at_T[:, None], torch.arange(S, device=q_BHTD.device))
        if causal:
            mask_TS = mask_TS & (torch.arange(S, device=q_BHTD.device) <= at_T[:, None])
        Q, N = blocks_of(T, S, self.block, rows)
        out = torch.zeros(Q, N, dtype=torch.bool, device=q_BHTD.device)
        at = mask_TS.nonzero()
        out[(at[:, 0] + S - T) // rows - (S - T) // rows, at[:, 1] // self.block] = True
        return out.expand(*q_BHTD.shape[:2], Q, N)

    def _count(self, mask_BHQN: Tensor, T: int, S: int, causal: bool) -> None:
        at_T = torch.arange(S - T, S, device=mask_BHQN.device)
        at_S = torch.arange(S, device=mask_BHQN.device)
        seen = (at_S <= at_T[:, None]) if causal else torch.ones(T, S, dtype=torch.bool, device=mask_BHQN.device)
        self._kept += float((self.pattern.allowed(at_T[:, None], at_S) & seen).sum())
        self._seen += float(seen.sum())
