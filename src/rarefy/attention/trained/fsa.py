"""FSA (Yan et al. 2025, arXiv 2508.18224): NSA whose selection branch goes key block by key block.

The result is NSA's. NSA's own order gives each query's program the heads of one GQA group, which fills a matrix unit only when that group
is large; with key blocks outside, the queries that chose a block fill it, at any group size.

Shape letters as in nsa.py.
"""

from __future__ import annotations

from torch import Tensor

from .by_keys import by_keys
from .nsa import NSA


class FSA(NSA):
    """NSA for small GQA groups; arguments and parameters are NSA's, and a saved one can be loaded as the other's state."""

    name = "attention/fsa"

    def selected(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        """The selection branch, keys outside."""
        return by_keys(q, k, v, mask, block=self.block, scale=scale, causal=causal)
