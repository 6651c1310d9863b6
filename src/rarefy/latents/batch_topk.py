"""BatchTopK (Bussmann et al. 2024, arXiv 2412.06410): the k * B largest pre-activations of a batch of B rows.

In use, a batch is replaced by a threshold: the running mean of the smallest positive activation that training kept
(sec. 2.2), so that a row does not depend on its neighbours.

Shape letters as in topk.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ..errors import BadInput
from ..kernels.routes import Routes
from ..kernels.sparse_encode import encode_batch_top_k
from ..method import Loss
from ..selection import Selection, batch_top_k, check_finite, threshold
from .dictionary import Widths
from .topk import TopK


class BatchTopK(TopK):
    """k latents a row on average, allotted where they help.

    Args:
        momentum: of the running threshold (0.99). Others as for TopK.
    """

    name = "latents/batch_topk"

    tau: Tensor
    seen: Tensor

    def __init__(
        self, d_in: Widths, width: int, k: int = 32, d_out: Widths = 0, aux_alpha: float = 1 / 32, aux_k: int = 0,
        dead_after: int = 10_000_000, momentum: float = 0.99, seed: int = 0, skip: bool | str = False,
    ) -> None:
        super().__init__(d_in, width, k, d_out, aux_alpha, aux_k, dead_after, seed, skip)
        if not 0 <= momentum < 1:
            raise BadInput(f"momentum={momentum} must be in [0, 1)")
        self.momentum = momentum
        self.register_buffer("tau", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def select(self, x: Tensor) -> Selection:
        """By the batch while training, by the threshold after; before any training the threshold is 0."""
        check_finite(x, f"input of {self.name}")
        pre = self.pre_activations(x).relu()
        if self.training and torch.is_grad_enabled():
            chosen = batch_top_k(pre, self.k) if pre.numel() else threshold(pre, 0.0)
            return Selection(self.width, pre, mask_=chosen.mask & (pre > 0))
        return threshold(pre, self.tau.to(pre.dtype))

    @torch.no_grad()
    def _follow(self, weight: Tensor) -> None:
        if weight.numel():
            least = weight.min()
            self.tau.copy_(least if not self.seen else self.momentum * self.tau + (1 - self.momentum) * least)
            self.seen += 1

    def allotted(self, x_BD: Tensor) -> tuple[Tensor, Routes]:
        """(values [M], routes) of a training batch in the dictionary's units; moves the threshold."""
        value_M, unit_M, edges = encode_batch_top_k(x_BD, self.W_enc_FD, self.b_enc_F, self.k * len(x_BD), self.centre_D)
        self._follow(value_M)
        return value_M, Routes(unit_M, edges, self.width)

    def compared(self, value_M: Tensor, routes: Routes, y_BE: Tensor) -> tuple[Tensor, Tensor]:
        """(reconstruction [B, E], its squared error a channel), in the dictionary's units."""
        y_hat_BE = self.written(value_M, routes, self.b_dec_D)
        return y_hat_BE, mse_loss(y_hat_BE, y_BE)

    def latent_loss(self, x: Tensor, y: Tensor) -> Loss:
        """mse + aux, as TopK; moves the threshold."""
        x_BD, y_BE = self.scaled(x), y * self.scale_out.to(y.dtype)
        value_M, routes = self.allotted(x_BD)
        y_hat_BE, mse = self.compared(value_M, routes, y_BE)
        aux = self.aux_loss(x_BD, (y_BE - y_hat_BE).detach())
        trained = {"mse": mse} if aux is None else {"mse": mse, "aux": aux}
        return self.ended(trained, y_BE, y_hat_BE, routes.unit_M, len(value_M), self.dead_after)
