"""What atoms learned from pictures look like: each fitted by a Gabor function, its orientation, frequency and bandwidth.

    g(u) = exp(-a^2 / 2 s_a^2 - b^2 / 2 s_b^2) * (p cos(2 pi f a) + q sin(2 pi f a))

with a along the direction in which the wave runs and b across it, measured from a centre. For given centre, direction, f, s_a,
s_b the best p and q are those of least squares, so the six others are all that is searched (variable projection), from the peak
of the atom's spectrum, by Adam over all atoms at once.

Shape letters: F = atoms, S = pixels a side, P = S * S pixels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import BadInput
from ...selection import check_finite

_PAD = 64


class Gabors(NamedTuple):
    """Fits, one an atom; each [F]."""

    r2: Tensor
    """Share of the atom's square that the fit explains."""
    orientation: Tensor
    """Degrees in [0, 180) of the stripes: 0 horizontal, 90 vertical."""
    frequency: Tensor
    """Cycles a pixel."""
    octaves: Tensor
    """Frequency bandwidth at half the height of the spectrum; inf where the spectrum's half height reaches frequency 0."""
    aspect: Tensor
    """Length of the envelope along the stripes over that across them."""


def fit_gabors(atoms_FP: Tensor, steps: int = 400) -> Gabors:
    """Fit square atoms [F, S * S], row by row of pixels.

    Args:
        steps: of the search.

    Raises:
        BadInput: atoms that are not square, empty, all zero, or not finite.
    """
    side = math.isqrt(atoms_FP.shape[-1]) if atoms_FP.ndim == 2 else 0
    if not side or side * side != atoms_FP.shape[-1] or not len(atoms_FP):
        raise BadInput(f"atoms have shape {list(atoms_FP.shape)}; need [atoms, side * side] with at least one atom")
    check_finite(atoms_FP, "atoms to fit")
    if not bool((atoms_FP != 0).any(-1).all()):
        raise BadInput(f"atom {int((atoms_FP == 0).all(-1).nonzero()[0])} is all zero; leave such atoms out")
    target_FP = torch.nn.functional.normalize(atoms_FP.detach().double(), dim=-1)
    where_P2 = torch.cartesian_prod(*[torch.arange(side, dtype=torch.float64)] * 2).flip(-1)         # (across, down)
    best, searched = torch.full((len(target_FP),), -1.0, dtype=torch.float64), None
    with torch.enable_grad():
        for width in (0.15, 0.3):                   # two sizes of envelope to begin with: the error has local minima
            raw_F6 = _start(target_FP, where_P2, side, width * side).requires_grad_()
            optimiser = torch.optim.Adam([raw_F6], lr=0.05)
            for _ in range(steps):
                optimiser.zero_grad()
                (1 - _explained(raw_F6, target_FP, where_P2)).sum().backward()
                optimiser.step()
            r2 = _explained(raw_F6, target_FP, where_P2).detach()
            searched = raw_F6.detach().clone() if searched is None else torch.where((r2 > best)[:, None], raw_F6.detach(), searched)
            best = torch.maximum(best, r2)
    assert searched is not None
    _, _, theta, frequency, along, across = _unpacked(searched)
    half = math.sqrt(2 * math.log(2)) / (2 * math.pi) / along
    octaves = torch.where(frequency > half, torch.log2((frequency + half) / (frequency - half).clamp_min(1e-12)), torch.inf)
    return Gabors(best, (90 - torch.rad2deg(theta)) % 180, frequency, octaves, across / along)


def _unpacked(raw_F6: Tensor) -> tuple[Tensor, ...]:
    """Centre (across, down), direction, and f, s_a, s_b from what is searched; widths stay above 0.4 pixels."""
    across, down, theta, frequency, along, wide = raw_F6.unbind(-1)
    return across, down, theta, 0.5 * torch.sigmoid(frequency), 0.4 + along.exp(), 0.4 + wide.exp()


def _start(target_FP: Tensor, where_P2: Tensor, side: int, width: float) -> Tensor:
    """[F, 6] centre of the atom's energy, and the peak of its spectrum."""
    energy_FP = target_FP.square()
    centre_F2 = energy_FP @ where_P2
    spectrum = torch.fft.rfft2(target_FP.view(-1, side, side), s=(_PAD, _PAD)).abs()
    spectrum[:, 0, 0] = 0
    peak_F = spectrum.flatten(1).argmax(-1)
    down = torch.fft.fftfreq(_PAD, dtype=torch.float64)[peak_F // spectrum.shape[-1]]
    across = torch.fft.rfftfreq(_PAD, dtype=torch.float64)[peak_F % spectrum.shape[-1]]
    frequency = torch.hypot(across, down).clamp(0.02, 0.48)
    size = torch.full_like(frequency, math.log(width))
    return torch.stack((centre_F2[:, 0], centre_F2[:, 1], torch.atan2(down, across), torch.logit(frequency * 2), size, size), -1)


def _explained(raw_F6: Tensor, target_FP: Tensor, where_P2: Tensor) -> Tensor:
    """[F] share of each atom's square that the best Gabor of these parameters explains."""
    across, down, theta, frequency, along, wide = (v[:, None] for v in _unpacked(raw_F6))
    dx, dy = where_P2[:, 0] - across, where_P2[:, 1] - down
    a, b = dx * theta.cos() + dy * theta.sin(), dy * theta.cos() - dx * theta.sin()
    envelope = torch.exp(-(a / along).square() / 2 - (b / wide).square() / 2)
    wave = 2 * math.pi * frequency * a
    basis_F2P = torch.stack((envelope * wave.cos(), envelope * wave.sin()), 1)
    pull_F2 = (basis_F2P @ target_FP[:, :, None])[:, :, 0]
    gram_F22 = basis_F2P @ basis_F2P.mT + 1e-9 * torch.eye(2, dtype=target_FP.dtype)
    return (pull_F2 * torch.linalg.solve(gram_F22, pull_F2)).sum(-1)
