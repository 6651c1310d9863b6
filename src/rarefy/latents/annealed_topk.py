"""The TopK dictionary of Llama Scope (He et al. 2024, arXiv 2410.20526).

Latents are ranked by pre-activation times the norm of their decoder row, which is what they would add to the reconstruction
in length; the decoder needs no unit norm then, and dividing an encoder row by what its decoder row is multiplied with
changes nothing. k falls linearly from the width of the input to its target over the first steps (the first tenth in the
paper). `rarefy.latents.convert.to_jumprelu` is the third step, taken after training. Departure: AuxK, which the paper does
without, is there as in TopK; aux_alpha = 0, the default, leaves it out.

Measured on planted codes (256 features in 64 dimensions, 1,024 latents, k 8, 1,500 steps, three seeds), annealing from 64
over 150 steps did not help: FVU 0.40 against 0.25 with anneal = 0, silent latents 3.5 % against 1.5 %.

Shape letters: B = rows, F = latents, K = kept, G = dead latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.sparse_decode import rows_of
from ..kernels.sparse_encode import encode_top_k
from .annealing import Annealing
from .dictionary import Widths


class AnnealedTopK(Annealing):
    """TopK by contribution, with a free decoder and an annealed k. Arguments as for TopK, and

    Args:
        k_begin: latents kept at the first step; 0 means d_in. anneal: steps until k is reached.
    """

    name = "latents/annealed_topk"

    def __init__(
        self, d_in: Widths, width: int, k: int = 32, d_out: Widths = 0, aux_alpha: float = 0.0, aux_k: int = 0,
        dead_after: int = 10_000_000, k_begin: int = 0, anneal: int = 100, seed: int = 0, skip: bool | str = False,
    ) -> None:
        super().__init__(d_in, width, k, d_out, aux_alpha, aux_k, dead_after, k_begin, anneal, seed, skip)

    def strongest(self, rows_BD: Tensor, k: int, dead_G: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See TopK. The norms rank and have no gradient; they are taken out of the values again."""
        W_enc_GD, b_enc_G = self.W_enc_FD, self.b_enc_F
        norm_G = self.W_dec_FD.detach().norm(dim=-1).clamp_min(torch.finfo(self.W_dec_FD.dtype).tiny)
        if dead_G is not None:
            W_enc_GD, b_enc_G, norm_G = rows_of(W_enc_GD, dead_G), b_enc_G[dead_G], norm_G[dead_G]
        value_BK, index_BK = encode_top_k(rows_BD, W_enc_GD * norm_G[:, None], b_enc_G * norm_G, k, self.centre_D)
        return self.weigh(value_BK / norm_G[index_BK]), index_BK if dead_G is None else dead_G[index_BK]

    def before_step(self) -> None:
        """Nothing: decoder norms are free."""

    def after_step(self, step: int) -> None:
        """Count steps; decoder norms are free."""
        self.steps += 1
