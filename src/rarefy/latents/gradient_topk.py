"""g-SAE (Olmo et al. 2025, arXiv 2411.10397): what a latent does to the model's loss counts in its choice.

While it learns, the k latents kept are those with the largest z + beta * z * |W_dec g|, z the pre-activations and g
the gradient of the model's loss in x, to first order what the loss would gain or lose by the latent. They keep z as their
weight; loss and AuxK are TopK's. In use no gradient is at hand and the choice is plain TopK's, as in the paper.

Gradients come with the targets: `loss` takes y of [x, g] side by side, [B, 2 D], as `rarefy.gradient_stream` gives them; a y
of width D trains as TopK. Departure: g is scaled, once, so that its mean squared channel is 1, and beta means the same for
every model, site and context length.

Measured on 32 large latents that the loss does not see and 32 small ones that it does (orthonormal, k 4): beta = 1 brought
the first-order change of the loss from 0.85 of what leaving everything out makes to 0.56 in the choice of training, and to
0.81 in that of use; of the small ones 0.16 were found, against 0.02.

Shape letters: B = rows, D = width, F = latents, K = kept, M = kept pairs, C = rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..errors import BadInput
from ..kernels.sparse_encode import encode_pairs
from ..kernels.top_k import top_k
from ..method import Loss, not_negative
from ..selection import Selection
from .topk import TopK

_AT_ONCE = 256
"""Rows whose products with all latents exist at a time."""


class GradientTopK(TopK):
    """TopK whose choice, in training, looks ahead to the model's loss.

    Args:
        beta: weight of the gradient's part in the choice. Others as for TopK.
    """

    name = "latents/gradient_topk"
    reads_gradients = True

    scale_gradient: Tensor

    def __init__(
        self, d_in: int, width: int, k: int = 32, beta: float = 1.0, aux_alpha: float = 1 / 32, aux_k: int = 0,
        dead_after: int = 10_000_000, seed: int = 0,
    ) -> None:
        super().__init__(d_in, width, k, 0, aux_alpha, aux_k, dead_after, seed)
        self.beta = not_negative("beta", beta)
        self.register_buffer("scale_gradient", torch.ones(()))

    @torch.no_grad()
    def initialise(self, x: Tensor, y: Tensor | None = None) -> None:
        """As TopK, and the scale of gradients where y brings them."""
        super().initialise(x)
        gradient = None if y is None else self.parted(y)[1]
        if gradient is not None:
            self.scale_gradient.copy_(gradient.float().pow(2).mean().clamp_min(1e-24).rsqrt())

    def parted(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """(target [B, D], gradient [B, D] or None) of y. Raises BadInput for another width."""
        if y.shape[-1] == self.d_in:
            return y, None
        if y.shape[-1] != 2 * self.d_in:
            raise BadInput(f"target of {self.name} has width {y.shape[-1]}; need {self.d_in}, or {2 * self.d_in} with gradients beside it")
        return y[..., : self.d_in], y[..., self.d_in :]

    def choose_by(self, scaled_BD: Tensor, gradient_BD: Tensor) -> Selection:
        """The k latents whose key is largest, for rows in the dictionary's units and gradients in the model's."""
        with torch.no_grad(), torch.autocast(scaled_BD.device.type, enabled=False):
            centred_BD = (scaled_BD - self.b_dec_D).to(self.W_enc_FD.dtype)
            pull_BD = (gradient_BD * self.scale_gradient.to(gradient_BD.dtype)).to(self.W_dec_FD.dtype)
            index_BK = torch.empty(len(scaled_BD), self.k, dtype=torch.long, device=scaled_BD.device)
            pieces = (t.split(_AT_ONCE) for t in (centred_BD, pull_BD, index_BK))
            for x_CD, g_CD, index_CK in zip(*pieces, strict=True):
                pre_CF = linear(x_CD, self.W_enc_FD, self.b_enc_F)
                index_CK.copy_(top_k(pre_CF.addcmul_(pre_CF, linear(g_CD, self.W_dec_FD).abs_(), value=self.beta), self.k))
        edges = torch.arange(len(index_BK) + 1, device=index_BK.device) * self.k
        value_M = encode_pairs(scaled_BD - self.b_dec_D, self.W_enc_FD, self.b_enc_F, index_BK.reshape(-1), edges)
        return Selection(self.width, self.weigh(value_M.view(index_BK.shape)), index=index_BK)

    def loss(self, x: Tensor, y: Tensor) -> Loss:
        """mse + aux, as TopK, of the latents chosen with the gradients that y brings, if it does."""
        self.check_rows(x, y)
        target, gradient = self.parted(y)
        if gradient is None:
            return super().loss(x, target)
        x_BD = self.scaled(x)
        return self.learned(x_BD, target * self.scale_out.to(y.dtype), self.choose_by(x_BD, gradient))
