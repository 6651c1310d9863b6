"""RetrievalAttention (Liu et al. 2024, arXiv 2409.10516): the keys of the largest logits, found on a graph in place of a scan.

Queries search a graph over the keys that was built from earlier queries (key_graph.py), and attend to what they find, the first keys and
the newest, all in one softmax (the paper merges by log-sum-exp, which is the same).

The paper runs the prompt dense, builds the graph of its queries once, and searches it while decoding. Here prefill searches too: positions
come in strides, and the queries of a stride search the graph of all keys before it, built from the queries before it; what lies between is
attended to as the newest. Queries before a decoding step are kept beside rarefy's cache (`cache=`); without one, earlier queries are not
known and keys stand in for them, the usual index that the paper finds wanting.
Shape letters as in key_graph.py; H = query heads, T = queries.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...errors import BadInput
from ...method import positive
from ..block import TokenAttention
from ..heads import per_head
from .key_graph import KeyGraph, build, search
from .scores import later


class RetrievalAttention(TokenAttention):
    """Approximate top keys by graph search.

    Args:
        budget: share of a query's visible keys, the first and the newest counted in.
        near: nearest keys of a query that become neighbours. degree: neighbours of a key.
        breadth: least width of the beam; wider finds more of the true top keys and looks at more.
        sinks, window: first and newest keys that are always attended to.
        stride: positions that share a graph.
    """

    name = "attention/retrieval"
    wants = ("cache",)

    def __init__(
        self, budget: float = 0.05, near: int = 32, degree: int = 32, breadth: int = 32, sinks: int = 4, window: int = 16, stride: int = 256,
    ) -> None:
        super().__init__(budget)
        self.near, self.degree, self.breadth = positive("near", near), positive("degree", degree), positive("breadth", breadth)
        if near < 2:
            raise BadInput(f"near={near} must be at least 2: neighbours are keys that a query has both among its nearest")
        if sinks < 0:
            raise BadInput(f"sinks={sinks} must be >= 0")
        self.sinks, self.window, self.stride = sinks, positive("window", window), positive("stride", stride)
        self._past: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
        self._looked = self._asked = 0.0

    def choose(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
        """[B, H, T, S] bool."""
        q, k, (T, S) = q_BHTD.detach(), k_BGSD.detach(), (q_BHTD.shape[2], k_BGSD.shape[2])
        if not q.numel():
            return torch.zeros(*q.shape[:3], S, dtype=torch.bool, device=q.device)
        past, state = self._queries(q, k)
        at_S, at_T = torch.arange(S, device=q.device), torch.arange(S - T, S, device=q.device)
        done_T = at_T // self.stride * self.stride if causal else torch.full_like(at_T, S)      # keys before these are in the graph
        newest = (at_S >= done_T[:, None]) | (at_T[:, None] - at_S < self.window) if causal else (at_S - at_T[:, None]).abs() < self.window
        out = newest | (at_S < self.sinks)
        out = (out & ~later(T, S, q) if causal else out).expand(*q.shape[:2], T, S).clone()
        seen = (at_T + 1).tolist() if causal else [S] * T
        keep_T = torch.tensor([max(1, round(self._budget * n)) for n in seen], device=q.device)
        for done in done_T.unique().tolist():
            rows = (done_T == done).nonzero()[:, 0]
            if done:
                out[:, :, rows] = self._found(q[:, :, rows], k[:, :, :done], past, state, out[:, :, rows], keep_T[rows])
        return out

    def _queries(self, q: Tensor, k: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """All queries up to now [B, H, S, D], and what is kept beside the cache."""
        before = k.shape[2] - q.shape[2]
        state: dict[str, Any] = {} if self._cache is None else self._past.setdefault(self._cache, {})
        kept = state.get("queries")
        if kept is None or kept.shape[2] < before or kept.shape[0] != q.shape[0]:
            state.clear()
            kept = per_head(k, q.shape[1])
        state["queries"] = torch.cat((kept[:, :, :before], q), 2)
        return state["queries"], state

    def _graph(self, past: Tensor, k: Tensor, state: dict[str, Any]) -> KeyGraph:
        """Of the keys k, from as many queries; the last one is kept."""
        if state.get("keys") != k.shape[2]:
            state["graph"] = build(past[:, :, : k.shape[2]].unflatten(1, (k.shape[1], -1)).flatten(2, 3), k, self.near, self.degree)
            state["keys"] = k.shape[2]
        return state["graph"]

    def _found(self, q: Tensor, k: Tensor, past: Tensor, state: dict[str, Any], sure: Tensor, keep_T: Tensor) -> Tensor:
        """[B, H, T, S] with the budget's rest filled by the best keys found."""
        share, T, n = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
        want_T = (keep_T - sure[0, 0].sum(-1)).clamp_min(0)
        if not bool(want_T.any()):
            return sure
        free_T = (~sure[0, 0, :, :n]).sum(-1)
        width_T = torch.where(want_T > 0, (want_T + n - free_T).clamp_min(self.breadth).clamp_max(n), 1)     # what is sure may be found as well
        at, looked = search(q.unflatten(1, (-1, share)).flatten(2, 3), k, self._graph(past, k, state), width_T.repeat(share))
        at, looked = (x.unflatten(2, (share, T)).flatten(1, 2) for x in (at, looked))
        self._looked, self._asked = self._looked + float(looked.sum()), self._asked + float(looked.shape[:3].numel()) * n
        new = (at >= 0) & ~sure.gather(3, at.clamp_min(0))
        new = new & (new.cumsum(-1) <= want_T[:, None])
        found = torch.zeros(*sure.shape[:3], sure.shape[3] + 1, dtype=torch.bool, device=q.device)
        found = sure | found.scatter(3, torch.where(new, at, sure.shape[3]), True)[..., :-1]
        everything = (want_T >= free_T)[:, None] & (torch.arange(sure.shape[3], device=q.device) < n)
        return found | everything

    def visited(self) -> float:
        """Share of the keys of the graphs that searches looked at, over every search so far; 1 if there was none."""
        return self._looked / self._asked if self._asked else 1.0

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """A product with every key looked at. Graphs are not counted: a scan of all keys by all queries, once a stride, off a query's path."""
        return 2 * heads * width * keys * self.visited()
