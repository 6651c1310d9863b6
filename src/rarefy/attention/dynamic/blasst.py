"""BLASST (Yuan et al. 2025, arXiv 2512.12087): inside the online softmax, blocks far below the running maximum are passed over.

Blocks are visited in order; where every row's largest logit of a block lies more than -ln(threshold) below the largest so far, its
exponentials, its values and the product with them are skipped. Logits are formed all the same.

Shape letters as in scores.py; R = queries in a block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from .rules import Levels
from .scores import later, logits, query_rows


def block_maxima(q_BHTD: Tensor, k_BGSD: Tensor, block: int, causal: bool) -> Tensor:
    """[B, H, T, N] largest logit of each key block, -inf where none is seen."""
    wide = torch.promote_types(q_BHTD.dtype, torch.float32)
    score = logits(q_BHTD.to(wide), k_BGSD.to(wide))
    if causal:
        score = score.masked_fill(later(*score.shape[2:], score), -torch.inf)
    return pad(score, (0, -score.shape[-1] % block), value=-torch.inf).unflatten(-1, (-1, block)).amax(-1)


def gaps(maxima_BHTN: Tensor) -> Tensor:
    """[B, H, T, N] how far each block's largest logit lies below the running maximum, itself included; inf where none is seen."""
    gap = maxima_BHTN.cummax(-1).values - maxima_BHTN
    return gap.masked_fill(maxima_BHTN == -torch.inf, torch.inf)


def smallest(gap_BHTN: Tensor, S: int, rows: int) -> Tensor:
    """[B, H, Q, N]: a block is passed over only where all queries of a query block agree."""
    return gap_BHTN if rows == 1 else query_rows(gap_BHTN, S, rows, torch.inf).amin(3)


class Blasst(Levels):
    """Skip a block whose largest logit is more than ln(n / dial) below the running maximum, n the keys that a query sees.

    A threshold that falls as 1 / n keeps the same share of blocks at every length (the paper's calibration). The query's own
    block is always kept. Skipped mass is at most dial * (share of blocks skipped) of what the largest key has.

    Args:
        dial: the constant, threshold * context; or 0 to fit it to the budget.
    """

    name = "attention/blasst"
    span = (-15.0, 45.0)

    def level_of(self, dial: float) -> float:
        """-ln(dial)."""
        return -math.log(dial)

    def reached(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> tuple[Tensor, Tensor]:
        """Gap less ln n as level."""
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        seen_T = torch.arange(S - T + 1, S + 1, device=q_BHTD.device) if causal else torch.full((T,), S, device=q_BHTD.device)
        gap = gaps(block_maxima(q_BHTD, k_BGSD, self.block, causal)) - seen_T.to(torch.promote_types(q_BHTD.dtype, torch.float32)).log()[:, None]
        level = smallest(gap, S, rows)
        bounded, _ = self.bounded(-level, T, S, rows, causal)
        return level.masked_fill(bounded == torch.inf, -torch.inf), bounded > -torch.inf

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """Every logit, of which the kept are counted with the attention itself."""
        return 2 * heads * width * keys
