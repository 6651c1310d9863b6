"""CPU decoding: one query a head reads its chosen pages in place, with an online softmax; float32, no gather.

Shape letters as in __init__.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def _kernel() -> Any:
    try:
        import numba
    except ImportError:
        return None
    import numpy as np

    @numba.njit(cache=True, nogil=True, fastmath={"contract", "reassoc"})
    def run(q, k, v, mask, block, scale, out):  # type: ignore[no-untyped-def]
        B, H, D = q.shape
        S, share = k.shape[2], H // k.shape[1]
        score = np.empty(S, np.float32)
        for b in range(B):
            for h in range(H):
                g = h // share
                top = np.float32(-np.inf)
                for n in range(mask.shape[2]):
                    if mask[b, h, n]:
                        for s in range(n * block, min(S, (n + 1) * block)):
                            dot = np.float32(0.0)
                            for d in range(D):
                                dot += q[b, h, d] * k[b, g, s, d]
                            score[s] = dot * scale
                            top = max(top, score[s])
                total = np.float32(0.0)
                for d in range(D):
                    out[b, h, d] = 0.0
                for n in range(mask.shape[2]):
                    if mask[b, h, n]:
                        for s in range(n * block, min(S, (n + 1) * block)):
                            w = np.exp(score[s] - top)
                            total += w
                            for d in range(D):
                                out[b, h, d] += w * v[b, g, s, d]
                if total > 0:
                    for d in range(D):
                        out[b, h, d] /= total

    return run


def available(*tensors: Tensor) -> bool:
    """Whether this path serves these tensors: float32 on CPU, rows contiguous, no gradient wanted, numba installed."""
    plain = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.stride(-1) == 1 for t in tensors)
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return plain and not grad and not torch.compiler.is_compiling() and _kernel() is not None


def decode_pages(q_BH1D: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_BHN: Tensor, block: int, scale: float) -> Tensor:
    """[B, H, 1, D] for one query a head, which sees every key of its chosen pages."""
    q = q_BH1D[:, :, 0].contiguous()
    out = torch.empty_like(q)
    args = (t.detach().contiguous().numpy() for t in (q, k_BGSD, v_BGSD, mask_BHN))
    _kernel()(*args, block, scale, out.numpy())
    return out[:, :, None]
