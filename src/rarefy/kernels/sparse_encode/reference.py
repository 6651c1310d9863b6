"""The definition: all pre-activations, then a sort."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


def encode_top_k_reference(
    x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor, k: int, centre_D: Tensor | None = None, *, absolute: bool = False,
) -> tuple[Tensor, Tensor]:
    """See encode_top_k."""
    pre_NF = linear(x_ND if centre_D is None else x_ND - centre_D, weight_FD, bias_F)
    index_NK = (pre_NF.abs() if absolute else pre_NF).sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return pre_NF.gather(-1, index_NK), index_NK


def encode_group_max_reference(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor, groups: int, centre_D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See encode_group_max."""
    pre_NF = linear(x_ND if centre_D is None else x_ND - centre_D, weight_FD, bias_F)
    index_NG = torch.stack([group_NU.sort(dim=-1, descending=True, stable=True).indices[:, 0] for group_NU in pre_NF.chunk(groups, -1)], -1)
    index_NG = index_NG + torch.arange(groups) * (len(weight_FD) // groups)
    return pre_NF.gather(-1, index_NG), index_NG


def encode_batch_top_k_reference(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor, keep: int, centre_D: Tensor | None = None) -> Tensor:
    """[N, F]: the pre-activations that are kept, 0 elsewhere. See encode_batch_top_k."""
    pre_NF = linear(x_ND if centre_D is None else x_ND - centre_D, weight_FD, bias_F)
    flat = pre_NF.reshape(-1)
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.sort(descending=True, stable=True).indices[:keep]] = True
    return torch.where(kept.view_as(pre_NF) & (pre_NF > 0), pre_NF, 0.0)
