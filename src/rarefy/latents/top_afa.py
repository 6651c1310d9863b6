"""top-AFA sparse autoencoder (Lee, Davies, Canby & Hockenmaier 2025, arXiv 2503.24277): every input finds its own k.

Where decoder rows are nearly orthogonal, the latents' norm is nearly that of what they reconstruct. So of the ReLU latents,
each times the norm of its decoder row, the k largest are kept for which || f || comes nearest to || x - b_dec ||. Loss:
squared error, AuxK, and afa * (|| f || - || x - b_dec ||)^2.

Departures: the authors' code compares with || x || in the loss, though with || x - b_dec || in the choice; both are the latter
here, or the two would pull apart wherever b_dec is not 0. The encoder has a bias, as every dictionary here.

Measured on planted codes with 6 features a row (256 features in 128 dimensions): with the true dictionary k is 5.6 on
average, off by 1.4 a row; with a dictionary that it learned k is 71. Nothing in the loss asks for few latents.

Shape letters: N = B = rows, D = width, F = latents, K = latents looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm

from ..kernels.top_k import top_k
from ..method import not_negative
from ..selection import Selection
from .topk import TopK

_FIRST = 64
"""Largest latents looked at before all those of a row are."""


def nearest_norm(score_NF: Tensor, target_N: Tensor) -> Tensor:
    """[N, F] bool: the k largest scores of each row, with the k >= 1, of equals the least, whose norm lies nearest to the target.

    Norms only grow with k, so that a row is settled once the largest few reach its target.

    Args:
        score_NF: >= 0.
    """
    mask_NF = torch.zeros_like(score_NF, dtype=torch.bool)
    if torch.compiler.is_compiling():
        index_NK, take_NK, _ = _among(score_NF, target_N, score_NF.shape[1])
        return mask_NF.scatter(-1, index_NK, take_NK)
    left_N, k = torch.arange(len(score_NF), device=score_NF.device), min(_FIRST, score_NF.shape[1])
    while len(left_N):
        index_NK, take_NK, settled_N = _among(score_NF[left_N], target_N[left_N], k)
        done_N = left_N[settled_N]
        mask_NF[done_N] = mask_NF[done_N].scatter(-1, index_NK[settled_N], take_NK[settled_N])
        left_N, k = left_N[~settled_N], min(8 * k, score_NF.shape[1])
    return mask_NF


def _among(score_NF: Tensor, target_N: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(units, whether taken, whether the row is settled), of the k largest of each row."""
    index_NK = top_k(score_NF, k)
    value_NK, order_NK = score_NF.gather(-1, index_NK).sort(dim=-1, descending=True, stable=True)
    norm_NK = value_NK.square().cumsum(-1).sqrt()
    count_N = (norm_NK - target_N[:, None]).abs().argmin(-1) + 1
    take_NK = torch.arange(k, device=score_NF.device) < count_N[:, None]
    settled_N = (norm_NK[:, -1] >= target_N) | (value_NK[:, -1] == 0) | (k == score_NF.shape[1])
    return index_NK.gather(-1, order_NK), take_NK, settled_N


class TopAFA(TopK):
    """As many of the largest latents as bring their norm nearest to that of the centred input.

    Args:
        afa: weight of the squared difference of the two norms, a row. Others as for TopK, which has k besides.
    """

    name = "latents/top_afa"

    def __init__(
        self, d_in: int, width: int, afa: float = 1 / 32, aux_alpha: float = 1 / 32, aux_k: int = 0, dead_after: int = 10_000_000,
        seed: int = 0,
    ) -> None:
        super().__init__(d_in, width, width, 0, aux_alpha, aux_k, dead_after, seed)
        self.afa = not_negative("afa", afa)

    def choose(self, scaled: Tensor) -> Selection:
        """select for rows already in the dictionary's units."""
        centred = scaled - self.b_dec_D
        weight = self.weigh(torch.nn.functional.linear(centred, self.W_enc_FD, self.b_enc_F))
        with torch.no_grad():
            wide = torch.promote_types(scaled.dtype, torch.float32)
            score_NF = (weight.to(wide) * self.W_dec_FD.to(wide).norm(dim=-1)).reshape(-1, self.width)
            mask_NF = nearest_norm(score_NF, vector_norm(centred.to(wide), dim=-1).reshape(-1))
        return Selection(self.width, weight, mask_=mask_NF.view(weight.shape))

    def penalties(self, scaled_BD: Tensor, chosen: Selection) -> dict[str, Tensor]:
        """{"afa"}: afa * (|| f || - || x - b_dec ||)^2, mean over rows."""
        f_BF = chosen.dense * self.W_dec_FD.norm(dim=-1)
        gap_B = vector_norm(f_BF, dim=-1) - vector_norm(scaled_BD - self.b_dec_D, dim=-1)
        return {"afa": self.afa * gap_B.square().mean()}
