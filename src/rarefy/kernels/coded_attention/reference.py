"""What the fast paths must give: everything written out as dense keys and values.

Shape letters as in __init__.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..block_attention.softmax import attend


def prune_rows_reference(x: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """See prune_rows."""
    index = x.abs().sort(dim=-1, descending=True, stable=True).indices[..., :keep].sort(-1).values
    bits = torch.zeros(x.shape, dtype=torch.uint8, device=x.device).scatter_(-1, index, 1)
    weight = 2 ** torch.arange(8, dtype=torch.uint8, device=x.device)
    return (pad(bits, (0, -x.shape[-1] % 8)).unflatten(-1, (-1, 8)) * weight).sum(-1, dtype=torch.uint8), x.gather(-1, index)


def unpack_rows(bitmap: Tensor, values: Tensor, width: int) -> Tensor:
    """[..., D]: the values at the channels of the bitmap, zeros elsewhere."""
    shift = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    bits = ((bitmap[..., None] >> shift) & 1).flatten(-2)[..., :width].bool()
    # A slot behind a row's last token has an empty bitmap and must not use up values.
    values = values[bits.any(-1)]
    return torch.zeros(bits.shape, dtype=values.dtype, device=bits.device).masked_scatter_(bits, values)


def _over(q_BH1D: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, count_B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    G = k_BGSD.shape[1]
    there = torch.arange(k_BGSD.shape[2], device=q_BH1D.device) < count_B[:, None]
    if not k_BGSD.shape[2]:
        wide = torch.promote_types(q_BH1D.dtype, torch.float32)
        return torch.zeros_like(q_BH1D), q_BH1D.new_full(q_BH1D.shape[:3], -torch.inf, dtype=wide)
    out, lse = attend(q_BH1D.unflatten(1, (G, -1)), k_BGSD[:, :, None], v_BGSD[:, :, None], there[:, None, None, None], scale)
    return out.flatten(1, 2), lse.flatten(1, 2)


def bitmap_attention_reference(
    q_BH1D: Tensor, k_bits_BGSE: Tensor, k_BGSC: Tensor, v_bits_BGSE: Tensor, v_BGSC: Tensor, count_B: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """See bitmap_attention."""
    D = q_BH1D.shape[-1]
    return _over(q_BH1D, unpack_rows(k_bits_BGSE, k_BGSC, D), unpack_rows(v_bits_BGSE, v_BGSC, D), count_B, scale)


def code_attention_reference(
    q_BH1D: Tensor, k_index_BGSK: Tensor, k_BGSK: Tensor, v_index_BGSK: Tensor, v_BGSK: Tensor, k_atoms_AD: Tensor, v_atoms_AD: Tensor,
    count_B: Tensor, *, scale: float,
) -> tuple[Tensor, Tensor]:
    """See code_attention."""
    k, v = ((w[..., None] * a[i.long()]).sum(-2) for i, w, a in ((k_index_BGSK, k_BGSK, k_atoms_AD), (v_index_BGSK, v_BGSK, v_atoms_AD)))
    return _over(q_BH1D, k, v, count_B, scale)
