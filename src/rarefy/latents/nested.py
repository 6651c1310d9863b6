"""Reconstructions that contain each other: every kept pair decoded once, at its own level, and levels added up.

Shape letters: B = rows, E = output width, F = latents, L = levels, M = kept (row, latent) pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import BadInput
from ..kernels.routes import Routes
from ..kernels.sparse_decode import sparse_decode


def nested_sums(value_M: Tensor, routes: Routes, level_M: Tensor, levels: int, table_FE: Tensor, begin_E: Tensor) -> Tensor:
    """[L, B, E]: at level l `begin` plus value * table row of the pairs whose level is at most l.

    Forward and backward take the work of decoding all pairs once, and L * B * E additions.

    Args:
        level_M: in 0..L-1 of each pair.
    """
    place_M = level_M * routes.rows + routes.row_M
    order_M = place_M.argsort(stable=True)
    edges = pad(torch.bincount(place_M, minlength=levels * routes.rows).cumsum(0), (1, 0))
    blocks = Routes(routes.unit_M[order_M], edges, routes.units)
    part_LBE = sparse_decode(value_M[order_M], blocks, table_FE).view(levels, routes.rows, table_FE.shape[1])
    return begin_E + part_LBE.cumsum(0)


def sizes(name: str, text: str | float, width: int) -> tuple[int, ...]:
    """Rising whole numbers up to `width` from text such as "16, 64" (counts) or "1/8, 0.5" (fractions of the width), or from one number.

    Fractions are rounded, to at least 1; those that come out equal count once.

    Raises:
        BadInput: naming `name` and the text, if a part is no such number, out of range, or not above the one before it.
    """
    found: list[int] = []
    last = 0.0
    for part in str(text).split(","):
        try:
            above, _, below = part.partition("/")
            whole = part.strip().isdecimal()
            exact = float(int(part)) if whole else float(above) / float(below or "1") * width
        except (ValueError, ZeroDivisionError):
            exact = float("nan")
        if not last < exact <= width:
            raise BadInput(
                f"{name}={text!r}: {part.strip()!r} is out of place; give rising counts in 1..{width}, such as \"16, 64\", "
                "or fractions of the width, such as \"1/8, 0.5\""
            )
        last = exact
        size = max(1, round(exact))
        if not found or size > found[-1]:
            found.append(size)
    return tuple(found)
