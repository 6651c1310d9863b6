"""FlexPrefill (Lai et al. 2025, arXiv 2502.20766): each head picks its pattern at each prompt, and as many blocks as hold a share of attention.

The last block of queries attends exactly. Its attention summed by key block is held against what block means predict, softmax of (mean query).
(mean keys): where the root of their Jensen-Shannon divergence is below tau, means can be trusted, and the head keeps the heaviest blocks of the
map of means, of all rows together (query-aware). Elsewhere it keeps columns and diagonals of blocks (vertical-slash). Either takes the fewest that
hold the share gamma, and always the first column and the own diagonal (alg. 1 to 4). For prefill: decoding is dense.

Shape letters as in scores.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import BadInput
from ...kernels.block_attention import blocks_of
from ...method import not_negative
from .pooled import Pooled
from .rules import TopP, tail_levels
from .scores import block_sums
from .vertical_slash import VerticalSlash


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """[...] root of the Jensen-Shannon divergence, in nats, of distributions over the last dim."""
    middle = (p + q) / 2
    each = [torch.xlogy(x, x) - torch.xlogy(x, middle) for x in (p, q)]
    return ((each[0] + each[1]).sum(-1) / 2).clamp_min(0).sqrt()


def line_block_levels(mass_BHS: Tensor, block: int) -> Tensor:
    """[B, H, N] -log(1 - gamma) from which each block of lines is kept; the first one always is.

    gamma asks for a number n of single lines; blocks taken, heaviest first, are n // block + 1 (the authors' rounding).
    """
    tail = mass_BHS.sort(dim=-1, descending=True).values.flip(-1).cumsum(-1).flip(-1)
    each = block_sums(mass_BHS, block)
    each[..., 0] = torch.inf
    rank = each.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    share = tail.gather(-1, (rank * block - 1).clamp_min(0)) / tail[..., :1]
    return (-share.clamp_min(torch.finfo(share.dtype).tiny).log()).masked_fill(rank == 0, -torch.inf)


class FlexPrefill(TopP):
    """Query-aware blocks or vertical-slash, head by head and prompt by prompt.

    Args:
        budget: mean share of visible pairs, met by fitting gamma, unless `dial` sets it.
        block: queries and keys of a block (128 in the paper).
        dial: gamma (0.9 or 0.95 in the paper), or 0 to fit it.
        tau: divergence below which means of blocks are trusted (0.1 in the paper; 0 trusts none).
    """

    name = "attention/flex_prefill"
    wants = ("cache",)
    prefill_only = True

    def __init__(self, budget: float = 0.25, block: int = 64, dial: float = 0.0, tau: float = 0.1) -> None:
        super().__init__(budget, block, block, dial)
        self.tau = not_negative("tau", tau)
        self.means, self.probe = Pooled(1.0, block, block), VerticalSlash(1.0, last=block)

    def divergences(self, q_BHTD: Tensor, column_BHN: Tensor, k_BGSD: Tensor) -> Tensor:
        """[B, H] between the last queries' attention by key block and what means predict of it."""
        last = q_BHTD[:, :, -self.block :].mean(2, keepdim=True)
        guess = self.means.scores(last, k_BGSD, 1, True)[:, :, 0].to(column_BHN.dtype).softmax(-1)
        return divergence(guess, column_BHN / column_BHN.sum(-1, keepdim=True))

    def reached(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> tuple[Tensor, Tensor]:
        """Levels of the pattern of each head. Raises BadInput for attention that sees ahead: diagonals are counted back."""
        if not causal:
            raise BadInput(f"{self.name} counts diagonals back from the query and cannot see ahead; use attention/sparge or attention/pooled")
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        Q, N = blocks_of(T, S, self.block, rows)
        if rows == 1:                                                          # a lone token; other decoding steps are dense
            seen = torch.ones(*q_BHTD.shape[:2], Q, N, dtype=torch.bool, device=q_BHTD.device)
            return torch.zeros(seen.shape, device=seen.device), seen
        column_BHS, slash_BHS = self.probe.lines(q_BHTD, k_BGSD, True)
        means = self.means.scores(q_BHTD, k_BGSD, rows, True).to(column_BHS.dtype)
        score, _ = self.bounded(means, T, S, rows, True)
        seen, first = score > -torch.inf, (score == torch.inf) | (torch.arange(N, device=score.device) == 0)
        guess = means.masked_fill(~seen, -torch.inf).softmax(-1)
        aware = tail_levels(guess.flatten(2)).view_as(guess).masked_fill(first, -torch.inf)
        back_QN = ((S - T) // rows + torch.arange(Q, device=score.device))[:, None] - torch.arange(N, device=score.device)
        by_column, by_slash = (line_block_levels(mass, self.block) for mass in (column_BHS, slash_BHS))
        lines = torch.minimum(by_column[:, :, None], by_slash[:, :, back_QN.clamp_min(0)]).masked_fill(first, -torch.inf)
        trusted = self.divergences(q_BHTD, block_sums(column_BHS, self.block), k_BGSD) < self.tau
        return torch.where(trusted[..., None, None], aware, lines).masked_fill(~seen, torch.inf), seen

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """Logits of the last block of queries, shared by all, and a product for each pair of blocks."""
        T = self._shape[3] if self._shape else self.block
        return 2 * heads * width * keys * (min(1.0, self.block / T) + 1 / self.block**2)
