"""SparseGSA (Li et al. 2023, DLGSANet, arXiv 2301.02031): attention between channels, rectified where softmax would be.

Shape letters: B = batch, H = heads, N = pixels or tokens, C = channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import BadInput


def channel_attention(q_BHCN: Tensor, k_BHCN: Tensor, v_BHCN: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """relu(scale * q k^T) v with rows of q and k at unit length: [B, H, C, N].

    A channel looks at channels, so the cost is linear in N; similarities below zero give exactly no weight.

    Args:
        scale: learned temperature, a number or [H, 1, 1].

    Raises:
        BadInput: shapes that differ.
    """
    if not q_BHCN.shape == k_BHCN.shape == v_BHCN.shape or q_BHCN.ndim != 4:
        raise BadInput(f"q {list(q_BHCN.shape)}, k {list(k_BHCN.shape)} and v {list(v_BHCN.shape)} must be one shape [B, heads, channels, pixels]")
    similarity_BHCC = normalize(q_BHCN, dim=-1) @ normalize(k_BHCN, dim=-1).mT
    return torch.relu(similarity_BHCC * scale) @ v_BHCN
