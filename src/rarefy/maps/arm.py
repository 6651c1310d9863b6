"""ARM-Net's cross features (Cai et al. 2021, arXiv 2107.01830): products of powers of a table's fields, chosen by entmax.

Shape letters: B = rows, F = fields, E = embedding width, K = heads, O = cross features of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import BadInput
from .entmax import entmax


class CrossFeatures(nn.Module):
    """exp(sum_f w_f e_f) with w_f = g_f * v_f: which fields g (entmax of a bilinear score, anew for each row), to which power v.

    Args:
        fields, width: F and E of the embeddings.
        heads, crosses: K heads of O cross features each.
        alpha: of entmax; above 1 most fields have no part in a cross.
    """

    def __init__(self, fields: int, width: int, heads: int = 1, crosses: int = 8, alpha: float = 1.7) -> None:
        super().__init__()
        for name, value in (("fields", fields), ("width", width), ("heads", heads), ("crosses", crosses)):
            if value < 1:
                raise BadInput(f"{name}={value} must be at least 1")
        self.alpha = float(alpha)
        self.query_KOE = nn.Parameter(torch.randn(heads, crosses, width) / width**0.5)
        self.bilinear_KEE = nn.Parameter(torch.eye(width).expand(heads, -1, -1) + 0.01 * torch.randn(heads, width, width))
        self.power_KOF = nn.Parameter(torch.randn(heads, crosses, fields) / fields**0.5)

    def gates(self, x_BFE: Tensor) -> Tensor:
        """[B, K, O, F] how much each field takes part in each cross of each row; rows sum to one, most of it zeros."""
        score_BKOF = torch.einsum("koe,ked,bfd->bkof", self.query_KOE, self.bilinear_KEE, x_BFE)
        return entmax(score_BKOF, self.alpha)

    def forward(self, x_BFE: Tensor) -> Tensor:
        """[B, K * O, E] cross features of embeddings [B, F, E]."""
        if x_BFE.ndim != 3 or x_BFE.shape[1] != self.power_KOF.shape[-1]:
            raise BadInput(f"embeddings {list(x_BFE.shape)} must be [B, {self.power_KOF.shape[-1]}, width]")
        weight_BKOF = self.gates(x_BFE) * self.power_KOF
        return torch.einsum("bkof,bfe->bkoe", weight_BKOF, x_BFE).exp().flatten(1, 2)
