"""Feature Choice autoencoder (Ayonrinde 2024, arXiv 2411.02124): every latent chooses its rows.

Latent f keeps the m_f rows of a batch of B on which its ReLU affinity is greatest; the m_f add up to k B and follow Zipf's
law in the order of the latents, so that none is ever dead. Affinities that are not positive are dropped.

Departures: shares of a batch are seldom whole numbers, and most are below 1 where F > k B; they are rounded so that each
latent has its share on average over batches. In use each latent has its own threshold, the running mean of the affinity at
its share of a batch, so that a row does not depend on its neighbours.

Shape letters: B = rows, D = input width, F = latents, G = latents of one group, P = rows looked at, M = kept pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.routes import Routes
from ..kernels.sparse_encode import encode_chosen
from ..method import not_negative
from ..selection import Selection, check_finite, threshold
from .batch_topk import BatchTopK
from .dictionary import Widths
from .zipf import in_whole_numbers, zipf_rates

_GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, fill [0, 1) evenly."""


class FeatureChoice(BatchTopK):
    """Each latent keeps its share of a batch.

    Args:
        exponent: of Zipf's law; 0 gives every latent the same share. Others as for BatchTopK.
    """

    name = "latents/feature_choice"

    def __init__(
        self, d_in: Widths, width: int, k: int = 32, d_out: Widths = 0, exponent: float = 1.0, aux_alpha: float = 1 / 32, aux_k: int = 0,
        dead_after: int = 10_000_000, momentum: float = 0.99, seed: int = 0, skip: bool | str = False,
    ) -> None:
        super().__init__(d_in, width, k, d_out, aux_alpha, aux_k, dead_after, momentum, seed, skip)
        self.exponent = not_negative("exponent", exponent)
        self.register_buffer("tau", torch.zeros(width))

    def shares(self, rows: int) -> tuple[Tensor, Tensor]:
        """([F] float64 rows that are each latent's share of `rows`, [F] int64 rows it may keep in the batch now at work)."""
        share_F = rows * zipf_rates(self.width, self.k, self.exponent)
        return share_F, in_whole_numbers(share_F, int(self.seen) * _GOLDEN % 1)

    def select(self, x: Tensor) -> Selection:
        """By the batch while training, by the thresholds after; before any training they are 0."""
        check_finite(x, f"input of {self.name}")
        pre = self.pre_activations(x).relu()
        if self.training and torch.is_grad_enabled():
            flat_BF = pre.reshape(-1, self.width)
            mask_BF, _ = column_top_k(flat_BF.detach(), *self.shares(len(flat_BF)))
            return Selection(self.width, pre, mask_=mask_BF.view_as(pre) & (pre > 0))
        return threshold(pre, self.tau.to(pre.dtype))

    def allotted(self, x_BD: Tensor) -> tuple[Tensor, Routes]:
        """(values [M], routes) of a training batch in the dictionary's units; moves the thresholds."""
        def choose(pre_BF: Tensor) -> Tensor:
            mask_BF, edge_F = column_top_k(pre_BF.relu(), *self.shares(len(pre_BF)))
            if len(pre_BF):
                edge_F = edge_F.to(self.tau)
                self.tau.copy_(edge_F if not self.seen else self.tau.lerp(edge_F, 1 - self.momentum))
                self.seen += 1
            return mask_BF & (pre_BF > 0)

        value_M, unit_M, edges = encode_chosen(x_BD, self.W_enc_FD, self.b_enc_F, choose, self.centre_D)
        return value_M, Routes(unit_M, edges, self.width)


def column_top_k(score_BF: Tensor, share_F: Tensor, count_F: Tensor) -> tuple[Tensor, Tensor]:
    """(mask [B, F] of the count_f largest of each column, [F] value that share_f entries of the column exceed).

    Between the m-th and the next largest lies the edge of a share of m; edges of other shares are interpolated, that of 0
    being the largest. Columns are worked on in groups of like counts, each looking no further down than it must.

    Args:
        score_BF: at least 0. count_F: rows to keep of each column, at most share + 1.
    """
    rows = len(score_BF)
    share_F, count_F = share_F.to(score_BF.device), count_F.to(score_BF.device)
    whole_F = share_F.floor().long()
    mask_BF, edge_F = torch.zeros_like(score_BF, dtype=torch.bool), score_BF.new_zeros(score_BF.shape[1])
    size_F = torch.frexp((whole_F + 2).double()).exponent
    for size in size_F.unique().tolist() if rows else ():
        at_G = (size_F == size).nonzero()[:, 0]
        depth = int(whole_F[at_G].max()) + 3
        top_PG, row_PG = score_BF[:, at_G].topk(min(depth, rows), dim=0)
        keep_PG = torch.arange(len(top_PG), device=top_PG.device)[:, None] < count_F[at_G]
        mask_BF[:, at_G] = torch.zeros_like(mask_BF[:, at_G]).scatter(0, row_PG, keep_PG)
        below_PG = torch.cat((top_PG, top_PG.new_zeros(depth + 1 - len(top_PG), len(at_G))))        # a column that ends has 0 below
        edge_PG = torch.cat((below_PG[:1], (below_PG[:-1] + below_PG[1:]) / 2))
        low_G, part_G = whole_F[at_G], (share_F - whole_F)[at_G].to(top_PG.dtype)
        edge_F[at_G] = torch.lerp(edge_PG.gather(0, low_G[None])[0], edge_PG.gather(0, low_G[None] + 1)[0], part_G)
    return mask_BF, edge_F
