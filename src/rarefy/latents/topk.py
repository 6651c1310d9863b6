"""TopK sparse autoencoder with the AuxK loss (Gao et al. 2024, arXiv 2406.04093).

f = ReLU(TopK(W_enc (x - b_dec) + b_enc)) (eq. 4); dead latents are asked to explain the error (appendix A.2).

What other selections share with it is here too: they say in `choose` which latents a row keeps and with what weight, which
may be negative, and the loss follows.

Shape letters: B = rows, D = input width, E = output width, F = latents, K = kept, G = dead latents, M = pairs that fire.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn.functional import linear, mse_loss

from ..kernels.sparse_decode import rows_of
from ..kernels.sparse_encode import encode_top_k
from ..method import Loss, not_negative, positive
from ..selection import Selection, check_finite
from ..world import Shards
from .dictionary import Dictionary, Widths


class TopK(Dictionary):
    """The k largest pre-activations of each row.

    Args:
        k: latents kept a row. aux_k: dead latents that share in explaining the error; 0 means D / 2.
        aux_alpha: weight of that loss (1/32 in the paper). dead_after: rows without firing after which a latent is dead.
    """

    name = "latents/topk"
    absolute: ClassVar[bool] = False
    """Whether latents are ranked by the absolute value of their pre-activation."""

    def __init__(
        self, d_in: Widths, width: int, k: int = 32, d_out: Widths = 0, aux_alpha: float = 1 / 32, aux_k: int = 0,
        dead_after: int = 10_000_000, seed: int = 0, skip: bool | str = False,
    ) -> None:
        super().__init__(d_in, width, d_out, seed, skip)
        self.k, self.aux_alpha = positive("k", k, width), not_negative("aux_alpha", aux_alpha)
        self.aux_k = positive("aux_k", aux_k) if aux_k else max(1, self.d_in // 2)
        self.dead_after = not_negative("dead_after", dead_after)

    @property
    def budget(self) -> float:
        """k / F."""
        return self.k / self.width

    @property
    def keeps(self) -> int:
        """Latents kept a row now; k, but for methods that keep more while they learn."""
        return self.k

    def select(self, x: Tensor) -> Selection:
        """Latents kept and their weights, of rows [..., D] in the input's units."""
        check_finite(x, f"input of {self.name}")
        return self.choose(self.scaled(x))

    def choose(self, scaled: Tensor) -> Selection:
        """select for rows already in the dictionary's units."""
        rows, lead = scaled.reshape(-1, self.d_in), (*scaled.shape[:-1], self.keeps)
        value, index = self.strongest(rows, self.keeps)
        return Selection(self.width, value.view(lead), index=index.view(lead))

    def weigh(self, pre: Tensor) -> Tensor:
        """What a latent that is kept weighs, from its pre-activation: ReLU."""
        return pre.relu()

    def strongest(self, rows_BD: Tensor, k: int, dead_G: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(weights, units), each [B, k]: the latents ranked first, of all or of `dead_G`, for rows in the dictionary's units."""
        if dead_G is None:
            value_BK, unit_BK = encode_top_k(rows_BD, self.W_enc_FD, self.b_enc_F, k, self.centre_D, absolute=self.absolute)
            return self.weigh(value_BK), unit_BK
        W_enc_GD, b_enc_G = rows_of(self.W_enc_FD, dead_G), self.b_enc_F[dead_G]
        value_BK, index_BK = encode_top_k(rows_BD, W_enc_GD, b_enc_G, k, self.centre_D, absolute=self.absolute)
        return self.weigh(value_BK), dead_G[index_BK]

    def needy(self) -> Tensor:
        """[G] latents that are asked to explain the error: the dead ones."""
        return (self.idle_F > self.dead_after).nonzero()[:, 0]

    def aux_loss(self, scaled_BD: Tensor, error_BE: Tensor) -> Tensor | None:
        """|| e - e_hat ||^2 with e_hat from the aux_k strongest dead latents; None while no latent is dead."""
        dead_G = self.needy()
        if not len(dead_G) or not self.aux_alpha:
            return None
        if len(dead_G) > self.aux_k:
            value_BK, unit_BK = self.strongest(scaled_BD, self.aux_k, dead_G)
            e_hat_BE = self.combine(Selection(self.width, value_BK, index=unit_BK))
        else:
            centred_BD = scaled_BD if self.centre_D is None else scaled_BD - self.centre_D
            pre_BG = linear(centred_BD, rows_of(self.W_enc_FD, dead_G), self.b_enc_F[dead_G])
            e_hat_BE = self.weigh(pre_BG) @ rows_of(self.W_dec_FD, dead_G)
        return self.aux_alpha * mse_loss(e_hat_BE.to(error_BE.dtype), error_BE)

    def penalties(self, scaled_BD: Tensor, chosen: Selection) -> dict[str, Tensor]:
        """Further parts of the loss, by name, each with its weight applied. Default: none."""
        return {}

    def latent_loss(self, x: Tensor, y: Tensor) -> Loss:
        """mse + penalties + aux, of rows and targets in the dictionary's units."""
        x_BD = self.scaled(x)
        return self.learned(x_BD, y * self.scale_out.to(y.dtype), self.choose(x_BD))

    def learned(self, x_BD: Tensor, y_BE: Tensor, chosen: Selection) -> Loss:
        """The loss of a choice; counts which latents fired."""
        y_hat_BE = self.combine(chosen, self.b_dec_D)
        trained = {"mse": mse_loss(y_hat_BE, y_BE), **self.penalties(x_BD, chosen)}
        aux = self.aux_loss(x_BD, (y_BE - y_hat_BE).detach())
        if aux is not None:
            trained["aux"] = aux
        on = chosen.on
        unit_M = chosen.index[on] if chosen.index is not None else on.any(0).nonzero()[:, 0]
        return self.ended(trained, y_BE, y_hat_BE, unit_M, on.sum(), self.dead_after)

    def shard(self, shards: Shards) -> TopK:
        """See Sparse.shard."""
        from .sharded import ShardedTopK

        return ShardedTopK.of(self, shards)
