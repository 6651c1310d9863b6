"""Matryoshka autoencoder over nested k (MSAE; Zaigrajew et al. 2025, "Interpreting CLIP with Hierarchical Sparse
Autoencoders", arXiv 2502.20578).

One row of latents is cut at several k_1 < ... < k_L; each cut is decoded by the same decoder and the squared errors are
added with weights a_l: L = sum_l a_l || x - x_hat_l ||^2, a_l = 1 (uniform) or L - l + 1 (reverse), x_hat_l from the k_l
largest latents. Any k may then be read.

Departures: a_l are divided by their sum, so that learning rates mean what they mean for TopK; the levels stop at 8 k by
default, where the paper's go on to the whole width, because a level of the whole width costs as much as a dense decoder;
and dead latents are asked to explain the error of the last level (AuxK), which the whole width made needless.

Shape letters: B = rows, E = output width, F = latents, K = largest level, L = levels, M = kept (row, latent) pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadInput
from ..kernels.routes import Routes
from ..kernels.sparse_encode import encode_top_k
from ..method import Loss
from .dictionary import Widths
from .nested import nested_sums, sizes
from .topk import TopK


class NestedTopK(TopK):
    """TopK trained at several k at once.

    Args:
        k: latents kept a row in use; a dictionary may be loaded with another k than it was trained with.
        levels: the k trained at, as rising counts ("16, 64") or fractions of the width; "" means k, 2 k, 4 k and 8 k, as far
            as the width allows. weights: "uniform" or "reverse". Others as for TopK.
    """

    name = "latents/nested_topk"

    weight_L: Tensor
    edge_L: Tensor

    def __init__(
        self, d_in: Widths, width: int, k: int = 32, d_out: Widths = 0, levels: str = "", weights: str = "uniform", aux_alpha: float = 1 / 32,
        aux_k: int = 0, dead_after: int = 10_000_000, seed: int = 0, skip: bool | str = False,
    ) -> None:
        super().__init__(d_in, width, k, d_out, aux_alpha, aux_k, dead_after, seed, skip)
        if weights not in ("uniform", "reverse"):
            raise BadInput(f"weights={weights!r} must be \"uniform\" or \"reverse\"")
        self.levels = sizes("levels", levels, width) if levels else tuple(k << i for i in range(4) if k << i <= width)
        n = len(self.levels)
        weight_L = torch.ones(n) if weights == "uniform" else torch.arange(n, 0, -1).float()
        self.register_buffer("weight_L", weight_L / weight_L.sum(), persistent=False)
        self.register_buffer("edge_L", torch.tensor(self.levels), persistent=False)

    def latent_loss(self, x: Tensor, y: Tensor) -> Loss:
        """Weighted mse over levels + aux; the diagnostics are those of k, or of the level next above."""
        x_BD, y_BE = self.scaled(x), y * self.scale_out.to(y.dtype)
        value_BK, unit_BK = encode_top_k(x_BD, self.W_enc_FD, self.b_enc_F, self.levels[-1], self.centre_D)
        value_BK, order_BK = value_BK.relu().sort(dim=-1, descending=True)
        routes = Routes.from_index(unit_BK.gather(-1, order_BK), self.width)
        rank_K = torch.arange(self.levels[-1], device=x.device)
        level_M = torch.bucketize(rank_K, self.edge_L, right=True).repeat(len(x))
        y_hat_LBE = nested_sums(value_BK.reshape(-1), routes, level_M, len(self.levels), self.W_dec_FD, self.b_dec_D)
        mse = (self.weight_L * (y_hat_LBE - y_BE).square().mean((1, 2))).sum()
        aux = self.aux_loss(x_BD, (y_BE - y_hat_LBE[-1]).detach())
        trained = {"mse": mse} if aux is None else {"mse": mse, "aux": aux}
        at = next((i for i, size in enumerate(self.levels) if size >= self.k), len(self.levels) - 1)
        active, fired_M = (value_BK[:, : self.levels[at]] > 0).sum(), routes.unit_M[value_BK.reshape(-1) > 0]
        return self.ended(trained, y_BE, y_hat_LBE[at], fired_M, active, self.dead_after)
