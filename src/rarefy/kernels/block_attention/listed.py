"""Products of each query with its own list of keys, which are read where they lie.

Shape letters: B = batch, H = query heads, G = key heads (H is a multiple of G), T = queries, S = keys, D = head width, X = places in a list;
N = B * H * T.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import native
from .decode import available, memory


def listed_products(q_BHTD: Tensor, k_BGSD: Tensor, index_BHTX: Tensor) -> Tensor:
    """[B, H, T, X] q . k of each listed key, -inf at index -1; float32 at least. Without gradients."""
    (B, H, T, D), G = q_BHTD.shape, k_BGSD.shape[1]
    wide = torch.promote_types(q_BHTD.dtype, torch.float32)
    q, k = q_BHTD.detach(), k_BGSD.detach()
    if not available(q, k) or not index_BHTX.numel():
        batch, head = torch.arange(B, device=q.device)[:, None, None, None], torch.arange(H, device=q.device)[:, None, None] // (H // G)
        near = k[batch, head, index_BHTX.clamp_min(0)].to(wide)
        return (near @ q[..., None].to(wide))[..., 0].masked_fill(index_BHTX < 0, -torch.inf)
    from .listed_loops import products

    index = index_BHTX.reshape(B * H * T, -1).long().contiguous().numpy()
    out = np.empty(index.shape, np.float32)
    native.spread(products, len(index), q.float().contiguous().view(-1).numpy(), *memory(k), index, (H, G, T, D), out, least=1)
    return torch.from_numpy(out).view(B, H, T, -1)
