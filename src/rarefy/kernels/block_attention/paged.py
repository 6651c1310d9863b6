"""Decoding over pages: requests of any lengths share one pool of keys and values, long ones are cut, shared beginnings are read once.

After FlashInfer (Ye et al. 2025, arXiv 2501.01005): a page table is a block-sparse row matrix from requests to pages (sec. 3.1); pages that several
requests begin with form larger blocks, worked on for all of them together (composable formats, sec. 3.1.2); what is left is cut into chunks
of even size, given to the least loaded worker (alg. 1), and the parts' (output, log-sum-exp) states are merged (sec. 2.2). Departure: where
requests part is found in the table here, page by page, as in a tree of prefixes; the paper is told.

Shape letters: R = requests, H = query heads, G = key heads, D = head width, P = pages of the pool, M = keys of a page, N = pages of the longest
request, W = pieces of work, C = keys of the longest piece.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import BadInput
from . import block_attention
from .mask import blocks_of
from .softmax import attend, merge
from .tokens import token_attention

TILE = 64
"""Queries and keys that a shared run is worked on by."""


class Piece(NamedTuple):
    """Keys start .. stop - 1 of a request, and who works on them."""

    request: int
    start: int
    stop: int
    worker: int


def schedule(spans: Sequence[tuple[int, int, int]], workers: int, step: int = 1) -> list[Piece]:
    """Spans (request, start, stop) cut into pieces and given to workers, by worker.

    No piece is longer than an even share of all keys, rounded up to `step`; long ones go first, each to the least loaded worker. So no
    worker has more than an even share plus one piece.

    Raises:
        BadInput: fewer than one worker or a step below 1.
    """
    if workers < 1 or step < 1:
        raise BadInput(f"workers={workers} and step={step} must be at least 1")
    total = sum(stop - start for _, start, stop in spans)
    most = max(step, -(-total // (workers * step)) * step)
    pieces = [(request, at, min(at + most, stop)) for request, start, stop in spans for at in range(start, stop, most)]
    pieces.sort(key=lambda p: p[1] - p[2])
    load, out = [(0, worker) for worker in range(workers)], []
    for request, start, stop in pieces:
        busy, worker = heapq.heappop(load)
        heapq.heappush(load, (busy + stop - start, worker))
        out.append(Piece(request, start, stop, worker))
    return sorted(out, key=lambda p: (p.worker, p.request, p.start))


@dataclass(frozen=True)
class Prefix:
    """Keys start .. stop - 1, the same pages for several requests."""

    requests: tuple[int, ...]
    start: int
    stop: int


def shared_prefixes(table_RN: Tensor, length_R: Tensor, page: int, least: int = 1) -> tuple[list[Prefix], list[tuple[int, int, int]]]:
    """(prefixes that two or more requests share, the spans of keys that are left to each), a tree of prefixes: shared again after parting too.

    Args:
        page: M. least: pages that a shared run must have; shorter ones are read by each.
    """
    full_R, spans, found = (length_R // page).tolist(), [], []
    todo = [(tuple(range(len(table_RN))), 0, [0] * len(table_RN))]
    while todo:
        rows, at, since = todo.pop()
        groups: dict[int, list[int]] = {}
        for r, begun in zip(rows, since, strict=True):
            if full_R[r] > at and len(rows) > 1:
                groups.setdefault(int(table_RN[r, at]), []).append(r)
            else:
                spans.append((r, begun, int(length_R[r])))
        begun_of = dict(zip(rows, since, strict=True))
        for mine in groups.values():
            if len(mine) == 1:
                spans.append((mine[0], begun_of[mine[0]], int(length_R[mine[0]])))
                continue
            deep = min(full_R[r] for r in mine)
            alike = (table_RN[mine, at:deep] == table_RN[mine[0], at:deep]).all(0)
            stop = at + int(alike.long().cumprod(0).sum())
            if stop - at < least:
                todo.append((tuple(mine), stop, [begun_of[r] for r in mine]))
                continue
            # a run too short to share came before: each reads that by itself
            spans += [(r, begun_of[r], at * page) for r in mine if begun_of[r] < at * page]
            found.append(Prefix(tuple(mine), at * page, stop * page))
            todo.append((tuple(mine), stop, [stop * page] * len(mine)))
    return found, sorted(span for span in spans if span[2] > span[1])


class Paged:
    """Which pages each request reads and in which pieces; made once a step of a batch, used in every layer.

    Args:
        table_RN: page numbers, in order; what stands behind a request's last page is not read.
        length_R: keys of each request; 0 gives zeros.
        page: M.
        workers: to share the work among; torch's threads unless told.
        share: whether pages that several requests begin with are read once for all of them.
        least: pages that a shared run must have.

    Raises:
        BadInput: tables that are too short for a length, pages below 0.
    """

    def __init__(self, table_RN: Tensor, length_R: Tensor, page: int, *, workers: int | None = None, share: bool = True, least: int = 1) -> None:
        if table_RN.ndim != 2 or length_R.shape != table_RN.shape[:1] or table_RN.is_floating_point() or length_R.is_floating_point():
            raise BadInput(f"give whole numbers table [R, N] and length [R], not {list(table_RN.shape)} and {list(length_R.shape)}")
        if page < 1 or least < 1:
            raise BadInput(f"page={page} and least={least} must be at least 1")
        self.table_RN, self.length_R, self.page = table_RN.long(), length_R.long(), page
        if len(length_R) and not 0 <= int(length_R.min()) <= int(length_R.max()) <= page * table_RN.shape[1]:
            raise BadInput(f"lengths {int(length_R.min())} .. {int(length_R.max())} do not fit {table_RN.shape[1]} pages of {page} keys")
        need = torch.arange(table_RN.shape[1], device=table_RN.device) * page < self.length_R[:, None]
        self.last = int(self.table_RN.masked_fill(~need, 0).max()) if table_RN.numel() else 0
        if bool((self.table_RN[need] < 0).any()):
            raise BadInput("the table names a page below 0 within a request's length")
        alone = [(r, 0, length) for r, length in enumerate(self.length_R.tolist()) if length]
        self.prefixes, spans = shared_prefixes(self.table_RN, self.length_R, page, least) if share else ([], alone)
        self.pieces = schedule(spans, workers or torch.get_num_threads(), page)
        self._index_WC = self._listed()

    def _keys(self, request: int, start: int, stop: int) -> Tensor:
        """Places in the pool."""
        at = torch.arange(start, stop, device=self.table_RN.device)
        return self.table_RN[request, at // self.page] * self.page + at % self.page

    def _listed(self) -> Tensor:
        C = max((p.stop - p.start for p in self.pieces), default=0)
        out = torch.full((len(self.pieces), C), -1, device=self.table_RN.device)
        for w, p in enumerate(self.pieces):
            out[w, : p.stop - p.start] = self._keys(p.request, p.start, p.stop)
        return out

    def keys_read(self) -> int:
        """Keys read from the pool for a key head; without sharing the sum of all lengths."""
        return sum(p.stop - p.start for p in self.prefixes) + sum(p.stop - p.start for p in self.pieces)

    def attend(self, q_RHD: Tensor, k_PMGD: Tensor, v_PMGD: Tensor, *, scale: float, return_lse: bool = False) -> Any:
        """[R, H, D]: each request's query over all of its keys; with `return_lse` also lse [R, H].

        Several queries of a request are as many rows of the table with the length that each sees; the pages they share are read once.

        Raises:
            BadInput: a pool that lacks pages or has pages of another size, heads that do not fit.
        """
        R, H, D = q_RHD.shape
        if k_PMGD.ndim != 4 or k_PMGD.shape != v_PMGD.shape or k_PMGD.shape[1] != self.page or k_PMGD.shape[3] != D:
            raise BadInput(f"pages must be [P, {self.page}, G, {D}], keys and values alike, not {list(k_PMGD.shape)} and {list(v_PMGD.shape)}")
        if R != len(self.length_R) or self.last >= len(k_PMGD) or not k_PMGD.shape[2] or H % k_PMGD.shape[2]:
            raise BadInput(f"{R} queries of {H} heads, {len(self.length_R)} requests up to page {self.last}, a pool {list(k_PMGD.shape)}")
        k_GSD, v_GSD = (x.flatten(0, 1).transpose(0, 1) for x in (k_PMGD, v_PMGD))          # views: the pool stays where it lies
        outs, lses, of = [], [], []
        for prefix in self.prefixes:
            out, lse = self._together(prefix, q_RHD, k_GSD, v_GSD, scale)
            outs.append(out)
            lses.append(lse)
            of += prefix.requests
        if self.pieces:
            mine = [p.request for p in self.pieces]
            out, lse = token_attention(
                q_RHD[mine].transpose(0, 1)[None], k_GSD[None], v_GSD[None], self._index_WC[None, None], scale=scale, return_lse=True)
            outs.append(out[0].transpose(0, 1))
            lses.append(lse[0].T)
            of += mine
        out, lse = _joined(q_RHD, outs, lses, of)
        return (out, lse) if return_lse else out

    def _together(self, prefix: Prefix, q_RHD: Tensor, k_GSD: Tensor, v_GSD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Its requests' queries as the rows of one product with its keys, which are gathered once."""
        at, G = self._keys(prefix.requests[0], prefix.start, prefix.stop), len(k_GSD)
        q = q_RHD[list(prefix.requests)].unflatten(1, (G, -1)).transpose(0, 1)                        # [G, n, share, D]
        rows, k, v = q.flatten(1, 2), k_GSD[:, at], v_GSD[:, at]
        if rows.shape[1] <= len(at):
            whole = torch.ones(1, 1, *blocks_of(rows.shape[1], len(at), TILE, TILE), dtype=torch.bool, device=q.device)
            how = {"block": TILE, "query_block": TILE, "scale": scale, "causal": False, "return_lse": True}
            out, lse = (x[0] for x in block_attention(rows[None], k[None], v[None], whole, **how))
        else:                                                                                         # more queries than keys
            out, lse = attend(rows, k, v, torch.ones(1, 1, dtype=torch.bool, device=q.device), scale)
        return out.view(q.shape).transpose(0, 1).flatten(1, 2), lse.view(q.shape[:3]).transpose(0, 1).flatten(1, 2)


def _joined(q_RHD: Tensor, outs: list[Tensor], lses: list[Tensor], of: list[int]) -> tuple[Tensor, Tensor]:
    """Each request's parts merged; requests without any give zeros and -inf."""
    R, H, _ = q_RHD.shape
    wide = torch.promote_types(q_RHD.dtype, torch.float32)
    rank, seen = [], [0] * R
    for r in of:
        rank.append(seen[r])
        seen[r] += 1
    most = max(seen, default=0)
    if not most:
        return torch.zeros_like(q_RHD), q_RHD.new_full((R, H), -torch.inf, dtype=wide)
    at = (torch.tensor(rank, device=q_RHD.device), torch.tensor(of, device=q_RHD.device))
    out = q_RHD.new_zeros((most, *q_RHD.shape)).index_put(at, torch.cat(outs).to(q_RHD.dtype))
    lse = q_RHD.new_full((most, R, H), -torch.inf, dtype=wide).index_put(at, torch.cat(lses).to(wide))
    return merge(list(out), list(lse))


def paged_attention(
    q_RHD: Tensor, k_PMGD: Tensor, v_PMGD: Tensor, table_RN: Tensor, length_R: Tensor, *, scale: float, return_lse: bool = False,
    workers: int | None = None, share: bool = True,
) -> Any:
    """[R, H, D]: a query for each request over the pages that its row of the table names, up to its length. See `Paged`, which can be kept."""
    made = Paged(table_RN, length_R, k_PMGD.shape[1], workers=workers, share=share)
    return made.attend(q_RHD, k_PMGD, v_PMGD, scale=scale, return_lse=return_lse)
