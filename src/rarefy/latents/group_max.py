"""GroupMax: the largest latent of each of k equal groups (the "groupmax" activation of EleutherAI's sparsify, 2025).

f_i = ReLU(pre_i) where pre_i = W_enc (x - b_dec) + b_enc is the largest of its run of F / k neighbours, else 0. Nothing is
compared across groups: the choice is k independent maxima, and each group must explain its part of every row.

Shape letters: B = rows, F = latents, G = groups, as many as latents kept.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import BadInput
from ..kernels.sparse_encode import encode_group_max
from ..selection import Selection
from .dictionary import Widths
from .topk import TopK


class GroupMax(TopK):
    """One latent of each of k groups. Arguments as for TopK; width must be a multiple of k."""

    name = "latents/group_max"

    def __init__(
        self, d_in: Widths, width: int, k: int = 32, d_out: Widths = 0, aux_alpha: float = 1 / 32, aux_k: int = 0,
        dead_after: int = 10_000_000, seed: int = 0, skip: bool | str = False,
    ) -> None:
        super().__init__(d_in, width, k, d_out, aux_alpha, aux_k, dead_after, seed, skip)
        if width % k:
            near = ", ".join(str(n) for n in sorted((n for n in range(1, width + 1) if not width % n), key=lambda n: abs(n - k))[:2])
            raise BadInput(f"width={width} does not divide into k={k} equal groups; change one, k to {near} for example")

    def choose(self, scaled: Tensor) -> Selection:
        """select for rows already in the dictionary's units."""
        rows, lead = scaled.reshape(-1, self.d_in), (*scaled.shape[:-1], self.k)
        value_BG, unit_BG = encode_group_max(rows, self.W_enc_FD, self.b_enc_F, self.k, self.centre_D)
        return Selection(self.width, self.weigh(value_BG).view(lead), index=unit_BG.view(lead))
