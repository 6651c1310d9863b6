"""CPU decoding: the largest logit that each page can give, in one pass over the keys; float32.

sum_d max(q_d m_d, q_d M_d) with m, M the channel-wise minimum and maximum of a page's keys, which are formed and
used page by page and never stored. Shape letters as in __init__.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def _kernel() -> Any:
    import numba
    import numpy as np

    # Without "nnan" the comparisons do not vectorise; callers refuse NaN before.
    @numba.njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nnan", "nsz"})
    def run(q, k, block, out):  # type: ignore[no-untyped-def]
        B, H, D = q.shape
        G, S = k.shape[1], k.shape[2]
        share = H // G
        low, high = np.empty(D, np.float32), np.empty(D, np.float32)
        for b in range(B):
            for g in range(G):
                for n in range(out.shape[2]):
                    first = n * block
                    for d in range(D):
                        low[d] = high[d] = k[b, g, first, d]
                    for s in range(first + 1, min(S, first + block)):
                        for d in range(D):
                            x = k[b, g, s, d]
                            low[d] = x if x < low[d] else low[d]
                            high[d] = x if x > high[d] else high[d]
                    for h in range(g * share, (g + 1) * share):
                        total = np.float32(0.0)
                        for d in range(D):
                            total += max(q[b, h, d] * low[d], q[b, h, d] * high[d])
                        out[b, h, n] = total

    return run


def page_scores(q_BH1D: Tensor, k_BGSD: Tensor, block: int) -> Tensor:
    """[B, H, 1, N] for one query a head. Needs `decode.available(q, k)` and finite input."""
    q, k = q_BH1D[:, :, 0].detach().contiguous(), k_BGSD.detach().contiguous()
    out = torch.empty(*q.shape[:2], -(-k.shape[2] // block))
    _kernel()(q.numpy(), k.numpy(), block, out.numpy())
    return out[:, :, None]
