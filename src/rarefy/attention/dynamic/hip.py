"""HiP (Lee et al. 2024, arXiv 2406.09827): the best keys by tournament, in O(log S) rounds.

The keys that a query sees are cut into 2 k chunks. Each is judged by the block in its middle; the best k are cut in two, and so on until
chunks are single blocks. Neighbours score alike, so the winner of a chunk leads near the chunk's best. Each round looks at 2 k
blocks, and there are about log2(n / 2 k) + 1 of n blocks.

A middle block is judged by the largest logit of its keys with the queries that share the choice. With block=1 that is the paper's
representative key; the query's own block is kept without a contest. Of the authors' code earlier versions judge a chunk by its first block and
later ones by its middle; it keeps a window and first keys beside, and asks every second query of a block.
Shape letters as in scores.py; C = chunks in the contest, M = keys in a block, R = queries that share a choice.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..block import BlockAttention, highest
from .scores import query_rows

_AT_ONCE = 1 << 21
"""Numbers of gathered keys held at a time."""


class HiP(BlockAttention):
    """Key blocks that survive a tournament between halves; works in time n log n of n keys where dense scores take n^2."""

    name = "attention/hip"

    def choose(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
        """[B, H, Q, N] bool."""
        T, S, H = q_BHTD.shape[2], k_BGSD.shape[2], q_BHTD.shape[1]
        rows, q, k = self._rows(T), q_BHTD.detach(), k_BGSD.detach()
        lot, seen_Q = self.bounded(torch.zeros(1, 1, 1, 1, device=q.device).expand(*q.shape[:2], *self._grid(T, S)), T, S, rows, causal)
        own_Q = (lot[0, 0] == torch.inf).sum(-1)                      # queries of a block may lie in several key blocks
        # Python's round, for exactly the count that `budget` promises
        keep_Q = torch.tensor([max(1, round(self._budget * n)) for n in seen_Q.tolist()], device=q.device)
        rest_Q, best_Q = seen_Q - own_Q, (keep_Q - own_Q).clamp_min(0)
        keys_BGNMD = pad(k, (0, 0, 0, -S % self.block)).unflatten(2, (-1, self.block))
        queries_BHQRD, there_BHQR = query_rows(q, S, rows, 0.0), query_rows(torch.ones_like(q[..., :1]), S, rows, 0.0)[..., 0] > 0
        out = lot == torch.inf
        step = max(1, _AT_ONCE // max(1, 2 * int(best_Q.max()) * q.shape[0] * H * self.block * q.shape[3])) if len(best_Q) else 1
        for start in range(0, len(best_Q), step):
            cut = slice(start, start + step)
            at_BHQC = self._contest(queries_BHQRD[:, :, cut], there_BHQR[:, :, cut], keys_BGNMD, rest_Q[cut], best_Q[cut], S)
            won = torch.zeros(*at_BHQC.shape[:3], out.shape[-1] + 1, dtype=torch.bool, device=q.device).scatter(3, at_BHQC, True)
            out[:, :, cut] |= won[..., :-1]
        return out

    def _grid(self, T: int, S: int) -> tuple[int, int]:
        rows = self._rows(T)
        return -(-S // rows) - (S - T) // rows if T else 0, -(-S // self.block)

    def _contest(self, q_BHQRD: Tensor, there_BHQR: Tensor, k_BGNMD: Tensor, rest_Q: Tensor, best_Q: Tensor, S: int) -> Tensor:
        """[B, H, Q, C] the winning blocks of the first `rest_Q`, N where a row has fewer winners."""
        (B, H), most, N = q_BHQRD.shape[:2], int(best_Q.max()), k_BGNMD.shape[2]
        if not most:
            return torch.full((B, H, len(best_Q), 1), N, device=q_BHQRD.device)
        edge = torch.arange(2 * most + 1, device=q_BHQRD.device).minimum(2 * best_Q[:, None])
        edge = edge * rest_Q[:, None] // (2 * best_Q[:, None]).clamp_min(1)
        start, stop = (x.expand(B, H, *x.shape) for x in (edge[:, :-1], edge[:, 1:]))
        while True:
            middle = (start + stop - 1).div(2, rounding_mode="floor").clamp_min(0)
            score = judge(q_BHQRD, there_BHQR, k_BGNMD, middle, S).masked_fill(start >= stop, -torch.inf)
            won = highest(score, best_Q[:, None].clamp_min(1)) & (start < stop) & (best_Q > 0)[:, None]
            order = (~won).to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]     # winners first, in the order of their keys
            won, start, stop = (x.gather(-1, order) for x in (won, start, stop))
            start, stop = torch.where(won, start, 0), torch.where(won, stop, 0)
            if int((stop - start).max()) <= 1:
                return torch.where(won, start, N)
            half = (start + stop + 1) // 2
            start, stop = (torch.stack(x, -1).flatten(-2) for x in ((start, half), (half, stop)))

    def rounds(self, blocks: int) -> int:
        """Rounds of a row that sees so many blocks, its own among them."""
        best = max(1, round(self._budget * blocks)) - 1
        longest, count = -(-(blocks - 1) // (2 * best)) if best else 0, 1 if best else 0
        while longest > 1:
            longest, count = -(-longest // 2), count + 1
        return count

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """Two chunks a survivor and round, each judged by a block's keys."""
        n = max(1, round(keys / self.block))
        best = max(1, round(self._budget * n)) - 1
        return 2 * heads * width * self.block * min(2 * best * self.rounds(n), max(n - 1, 2 * best))


def judge(q_BHQRD: Tensor, there_BHQR: Tensor, k_BGNMD: Tensor, at_BHQC: Tensor, S: int) -> Tensor:
    """[B, H, Q, C] the largest product of a block's keys, of the S there are, with a row's queries that are there."""
    B, G, _, M, _ = k_BGNMD.shape
    H = q_BHQRD.shape[1]
    key_head_BH = torch.arange(B, device=at_BHQC.device)[:, None] * G + torch.arange(H, device=at_BHQC.device) // (H // G)
    keys_BHQCMD = k_BGNMD.flatten(0, 1)[key_head_BH[..., None, None], at_BHQC]
    logit_BHQRCM = torch.einsum("bhqrd,bhqcmd->bhqrcm", q_BHQRD, keys_BHQCMD)
    inside_BHQCM = at_BHQC[..., None] * M + torch.arange(M, device=at_BHQC.device) < S
    logit_BHQRCM = logit_BHQRCM.masked_fill(~there_BHQR[..., None, None], -torch.inf)
    return logit_BHQRCM.amax(3).masked_fill(~inside_BHQCM, -torch.inf).amax(-1)
