"""Units for a dictionary that was read from elsewhere and is to be trained on: the same function with another `scale`.

Learning rates, penalties and kernel widths mean the same at every site only where a dictionary works on rows of about unit
spread. Scales are powers of two, so that nothing is rounded: every output keeps its bits, and a scale measured once more on
other hardware comes out the same.

Shape letters: N = rows, D = input width, E = output width, F = latents.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from ..latents.dictionary import Dictionary


@torch.no_grad()
def settle(method: Dictionary, x_ND: Tensor, y_NE: Tensor) -> None:
    """Give a dictionary whose scales are 1 those that rows of its site ask for; what it gives for any row stays the same.

    One that has scales already, or is made for several sites, is left as it is.
    """
    if method.scale.numel() > 1 or method.scale_out.numel() > 1 or float(method.scale) != 1 or float(method.scale_out) != 1:
        return
    scale = _power_of_two(x_ND)
    out = scale if y_NE is x_ND else _power_of_two(y_NE)
    own = cast(Any, method)
    for name in ("b_enc_F", "b_dec_D", "b_mag_F", "tau"):
        if getattr(own, name, None) is not None:
            getattr(own, name).mul_(out)
    if hasattr(own, "log_theta_F"):
        own.log_theta_F.add_(math.log(out))
    for matrix in (own.W_enc_FD, own.W_skip_ED):
        if matrix is not None:
            matrix.mul_(out / scale)
    method.scale.fill_(scale)
    method.scale_out.fill_(out)


def _power_of_two(x_ND: Tensor) -> float:
    """The power of two nearest to what makes the mean squared channel of the centred rows 1."""
    spread = float((x_ND.double() - x_ND.double().mean(0)).square().mean())
    return 2.0 ** max(-60, min(60, round(-math.log2(max(spread, 1e-30)) / 2)))
