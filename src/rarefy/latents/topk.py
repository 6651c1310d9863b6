"""TopK sparse autoencoder with the AuxK loss (Gao et al. 2024, arXiv 2406.04093).

f = ReLU(TopK(W_enc (x - b_dec) + b_enc)) (eq. 4); dead latents are asked to explain the error (appendix A.2).

Shape letters: B = rows, D = input width, E = output width, F = latents, K = kept, G = dead latents.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear, mse_loss

from ..kernels.sparse_decode import rows_of
from ..kernels.sparse_encode import encode_top_k
from ..method import Loss, not_negative, positive
from ..selection import Selection, check_finite
from .dictionary import Dictionary, diagnostics


class TopK(Dictionary):
    """The k largest pre-activations of each row.

    Args:
        k: latents kept a row. aux_k: dead latents that share in explaining the error; 0 means D / 2.
        aux_alpha: weight of that loss (1/32 in the paper). dead_after: rows without firing after which a latent is dead.
    """

    name = "latents/topk"

    def __init__(
        self, d_in: int, width: int, k: int = 32, d_out: int = 0, aux_alpha: float = 1 / 32, aux_k: int = 0,
        dead_after: int = 10_000_000, seed: int = 0,
    ) -> None:
        super().__init__(d_in, width, d_out, seed)
        self.k, self.aux_alpha = positive("k", k, width), not_negative("aux_alpha", aux_alpha)
        self.aux_k = positive("aux_k", aux_k) if aux_k else max(1, d_in // 2)
        self.dead_after = not_negative("dead_after", dead_after)

    @property
    def budget(self) -> float:
        """k / F."""
        return self.k / self.width

    def select(self, x: Tensor) -> Selection:
        """The k largest, ReLU applied to their weights."""
        check_finite(x, f"input of {self.name}")
        return self.choose(self.scaled(x))

    def choose(self, scaled: Tensor) -> Selection:
        """select for rows already in the dictionary's units."""
        rows, lead = scaled.reshape(-1, self.d_in), (*scaled.shape[:-1], self.k)
        value, index = encode_top_k(rows, self.W_enc_FD, self.b_enc_F, self.k, self.centre_D)
        return Selection(self.width, value.relu().view(lead), index=index.view(lead))

    def aux_loss(self, scaled_BD: Tensor, error_BE: Tensor) -> Tensor | None:
        """|| e - e_hat ||^2 with e_hat from the aux_k strongest dead latents; None while no latent is dead."""
        dead_G = (self.idle_F > self.dead_after).nonzero()[:, 0]
        if not len(dead_G) or not self.aux_alpha:
            return None
        W_enc_GD, b_enc_G = rows_of(self.W_enc_FD, dead_G), self.b_enc_F[dead_G]
        if len(dead_G) > self.aux_k:
            value_BK, index_BK = encode_top_k(scaled_BD, W_enc_GD, b_enc_G, self.aux_k, self.centre_D)
            e_hat_BE = self.combine(Selection(self.width, value_BK.relu(), index=dead_G[index_BK]))
        else:
            centred_BD = scaled_BD if self.centre_D is None else scaled_BD - self.centre_D
            e_hat_BE = linear(centred_BD, W_enc_GD, b_enc_G).relu() @ rows_of(self.W_dec_FD, dead_G)
        return self.aux_alpha * mse_loss(e_hat_BE.to(error_BE.dtype), error_BE)

    def loss(self, x: Tensor, y: Tensor) -> Loss:
        """mse + aux, of rows and targets in the dictionary's units."""
        self.check_rows(x, y)
        x_BD, y_BE = self.scaled(x), y * self.scale_out.to(y.dtype)
        chosen = self.choose(x_BD)
        y_hat_BE = self.combine(chosen, self.b_dec_D)
        mse = mse_loss(y_hat_BE, y_BE)
        assert chosen.index is not None
        aux = self.aux_loss(x_BD, (y_BE - y_hat_BE).detach())
        on = chosen.weight > 0
        self.fired(chosen.index[on], len(x))
        parts = {"mse": mse, **({} if aux is None else {"aux": aux}), **diagnostics(y_BE, y_hat_BE, on.sum() / max(1, len(x)))}
        parts["dead"] = (self.idle_F > self.dead_after).float().mean()
        return Loss(mse if aux is None else mse + aux, parts)
