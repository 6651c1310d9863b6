"""CPU: alpha-entmax of contiguous rows, one at a time in the nearest cache; float32 and float64, sums in float64.

Only scores within 1 / (alpha - 1) of the maximum can have weight: they are copied aside, v is found on them, and only they are written.

Shape letters: R = rows, N = scores of a row.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import compiled
from .rows import NEAR_ONE, STEPS


@cache
def _weigh() -> Any:
    import math

    @compiled.loop(fastmath={"contract", "reassoc", "nsz"})
    def weigh(z, m, e, v, p):  # type: ignore[no-untyped-def]
        """Weights of the first m scores into p; their sum, and the slope -d sum / dv."""
        total, slope = 0.0, 0.0
        if e == 1.0:
            for j in range(m):
                t = max(1.0 + z[j] - v, 0.0)
                p[j] = t
                total += t
                slope += 1.0 if t > 0.0 else 0.0
        elif e == 0.5:
            for j in range(m):
                t = max(1.0 + 0.5 * (z[j] - v), 0.0)
                p[j] = t * t
                total += t * t
                slope += t
        else:
            for j in range(m):
                u = z[j] - v
                t = 1.0 + e * u
                if e < NEAR_ONE:
                    p[j] = math.exp(u)
                    slope += p[j]
                elif t > 0.0:
                    p[j] = math.exp(math.log1p(e * u) / e)
                    slope += p[j] / t
                else:
                    p[j] = 0.0
                total += p[j]
        return total, slope

    return weigh


@cache
def _kernel() -> Any:
    if not compiled.available():
        return None
    import math

    import numpy as np

    weigh = _weigh()

    @compiled.loop()
    def run(x, alphas, out):  # type: ignore[no-untyped-def]
        R, N = x.shape
        z, p, at = np.empty(N), np.empty(N), np.empty(N, np.int64)
        for r in range(R):
            e = alphas[r]
            top = x[r, 0]
            for i in range(1, N):
                top = max(top, x[r, i])
            out[r, :] = 0.0
            if top == -np.inf:
                continue
            least = top - 1.0 / e if e >= NEAR_ONE else -np.inf
            m = 0
            for i in range(N):
                if x[r, i] > least:
                    z[m] = x[r, i] - top
                    at[m] = i
                    m += 1
            low, v = 0.0, 0.0
            high = math.log(m) if e < NEAR_ONE else -math.expm1(-e * math.log(m)) / e
            total = 1.0
            for _ in range(STEPS):
                total, slope = weigh(z, m, e, v, p)
                if total >= 1.0:
                    low = v
                if total <= 1.0:
                    high = v
                if abs(total - 1.0) <= 4e-16 * m or high - low <= 4e-16 * (1.0 + high):
                    break
                step = v + math.log(total) * total / slope if total > 0.0 and slope > 0.0 else low
                if not low < step < high:
                    step = 0.5 * (low + high)
                if step == v:
                    break
                v = step
            for j in range(m):
                out[r, at[j]] = p[j] / total

    return run


def available(x: Tensor) -> bool:
    """Whether this path serves these scores: float32 or float64 on the CPU, numba installed."""
    plain = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.numel() > 0
    return plain and not torch.compiler.is_compiling() and _kernel() is not None


def entmax_rows(x: Tensor, e: Tensor) -> Tensor:
    """Weights [..., N] of scores free of NaN and +inf; e = alpha - 1 broadcasts against [..., 1]."""
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
    alphas = e.detach().double().expand(*x.shape[:-1], 1).reshape(-1).contiguous()
    out = torch.empty_like(rows)
    _kernel()(rows.numpy(), alphas.numpy(), out.numpy())
    return out.view(x.shape)
