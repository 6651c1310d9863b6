"""TopK sparse autoencoder with the AuxK loss (Gao et al. 2024, arXiv 2406.04093).

f = ReLU(TopK(W_enc (x - b_dec) + b_enc)) (eq. 4); dead latents are asked to explain the error (appendix A.2).

Shape letters: B = rows, D = input width, E = output width, F = latents, K = kept, G = dead latents.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

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
        rows = self.centred(x).reshape(-1, self.d_in)
        value, index = encode_top_k(rows, self.W_enc_FD, self.b_enc_F, self.k)
        lead = x.shape[:-1]
        return Selection(self.width, value.relu().view(*lead, self.k), index=index.view(*lead, self.k))

    def aux_loss(self, x_BD: Tensor, error_BE: Tensor) -> Tensor | None:
        """|| e - e_hat ||^2 with e_hat from the aux_k strongest dead latents; None while fewer than one is dead."""
        dead_G = (self.idle_F > self.dead_after).nonzero()[:, 0]
        if not len(dead_G) or not self.aux_alpha:
            return None
        pre_BG = linear(self.centred(x_BD), self.W_enc_FD[dead_G], self.b_enc_F[dead_G])
        top = pre_BG.topk(min(self.aux_k, len(dead_G)), dim=-1)
        selection = Selection(self.width, top.values.relu(), index=dead_G[top.indices])
        e_hat_BE = self.in_units(self.combine(selection))
        return self.aux_alpha * self.error(e_hat_BE, error_BE)

    def loss(self, x: Tensor, y: Tensor) -> Loss:
        """mse + aux."""
        self.check_rows(x, y)
        chosen = self.select(x)
        y_hat = self.decode(chosen)
        mse = self.error(y_hat, y)
        assert chosen.index is not None
        aux = self.aux_loss(x, (y - y_hat).detach())
        on = chosen.weight > 0
        self.fired(chosen.index[on], len(x))
        parts = {"mse": mse, **({} if aux is None else {"aux": aux}), **diagnostics(y, y_hat, on.sum() / max(1, len(x)))}
        parts["dead"] = (self.idle_F > self.dead_after).float().mean()
        return Loss(mse if aux is None else mse + aux, parts)
