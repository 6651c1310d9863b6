"""Penalties on codes and their proximal operators, convex and not (after Rentzeperis et al. 2023, "Beyond l1 sparse coding in V1").

    prox(u) = argmin_z 1/2 (z - u)^2 + step * weight * phi(z)

phi is even, so each penalty is given on magnitudes and `proximal` puts the sign back. Closed forms: soft (l1), hard (l0),
half and two_thirds (l_q with q = 1/2: Xu et al. 2012, eq. 11; q = 2/3: Cao et al. 2013, eq. 9), cel0 (Soubies, Blanc-Feraud
& Aubert 2015, eq. 4 and 20, for atoms of length 1: the continuous penalty under which l0's global minima stay where they are).

Shape letters: any; everything is elementwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import BadInput

Curve = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Penalty:
    """weight * phi and what solvers need of it, all as functions of magnitudes >= 0."""

    name: str
    value: Curve
    """(magnitude, weight) -> weight * phi, 0 at 0."""
    shrink: Callable[[Tensor, float, float], Tensor]
    """(magnitude, step, weight) -> proximal point; 0 or positive."""
    slope: Curve
    """First derivative at magnitudes > 0."""
    bend: Curve
    """Second derivative at magnitudes > 0."""
    convex: bool = False


def _nothing(size: Tensor, weight: float) -> Tensor:
    return torch.zeros_like(size)


def _soft(size: Tensor, step: float, weight: float) -> Tensor:
    return (size - step * weight).clamp_min(0)


def _hard(size: Tensor, step: float, weight: float) -> Tensor:
    return torch.where(size > math.sqrt(2 * step * weight), size, 0.0)


def _half(size: Tensor, step: float, weight: float) -> Tensor:
    w = step * weight
    angle = torch.arccos((w / 4 * (size / 3).clamp_min(1e-30).pow(-1.5)).clamp(max=1.0))
    return torch.where(size > 1.5 * w ** (2 / 3), 2 / 3 * size * (1 + torch.cos(2 / 3 * (math.pi - angle))), 0.0)


def _two_thirds(size: Tensor, step: float, weight: float) -> Tensor:
    w = 2 * step * weight
    if not w:
        return size
    above = torch.where(size > 2 * (w / 3) ** 0.75, size, 2 * (w / 3) ** 0.75)       # the formula is real from the threshold on
    a = 2 / math.sqrt(3) * w**0.25 * torch.cosh(torch.arccosh(27 / 16 * above.square() / w**1.5) / 3).sqrt()
    return torch.where(size > 2 * (w / 3) ** 0.75, ((a + (2 * above / a - a.square()).sqrt()) / 2).pow(3), 0.0)


def _cel0(size: Tensor, step: float, weight: float) -> Tensor:
    if step >= 1:
        return _hard(size, step, weight)
    return torch.minimum(size, (size - step * math.sqrt(2 * weight)).clamp_min(0) / (1 - step))


def _short(size: Tensor, weight: float) -> Tensor:
    """How far a magnitude is below cel0's knee, from which on the penalty is flat."""
    return (math.sqrt(2 * weight) - size).clamp_min(0)


PENALTIES = {p.name: p for p in (
    Penalty("soft", lambda z, w: w * z, _soft, lambda z, w: torch.full_like(z, w), _nothing, convex=True),
    Penalty("hard", lambda z, w: w * (z != 0).to(z), _hard, _nothing, _nothing),
    Penalty("half", lambda z, w: w * z.sqrt(), _half, lambda z, w: w / 2 * z.pow(-0.5), lambda z, w: -w / 4 * z.pow(-1.5)),
    Penalty(
        "two_thirds", lambda z, w: w * z.pow(2 / 3), _two_thirds, lambda z, w: w * 2 / 3 * z.pow(-1 / 3), lambda z, w: -w * 2 / 9 * z.pow(-4 / 3),
    ),
    Penalty("cel0", lambda z, w: w - _short(z, w).square() / 2, _cel0, _short, lambda z, w: -(_short(z, w) > 0).to(z)),
)}


def penalty(name: str) -> Penalty:
    """The penalty of that name; BadInput listing the names there are."""
    if name not in PENALTIES:
        raise BadInput(f"penalty={name!r} must be one of {', '.join(PENALTIES)}")
    return PENALTIES[name]


def proximal(name: str, u: Tensor, step: float, weight: float, positive: bool = False) -> Tensor:
    """argmin_z 1/2 (z - u)^2 + step * weight * phi(z), elementwise; over z >= 0 where `positive`.

    Where two points are equally good (the threshold of a penalty that jumps) it is 0.

    Raises:
        BadInput: an unknown name, or step or weight below 0.
    """
    if not (step >= 0 and weight >= 0):
        raise BadInput(f"step={step} and weight={weight} must be >= 0")
    size = u.clamp_min(0) if positive else u.abs()
    out = penalty(name).shrink(size, step, weight)
    return out if positive else torch.copysign(out, u)
