"""Convolutional sparse coding with a bank of oriented kernels whose orientation bandwidths differ (Ladret et al. 2023, "Kernel
Heterogeneity Improves Sparseness of Natural Images Representations", arXiv 2312.14685).

    min_z 1/2 ||x - sum_k d_k * z_k||^2 + weight ||z||_1

Kernels are log-Gabors: in polar frequency (f, phi) a Gaussian of log f about f_0 times exp(cos(2 (phi - theta)) / (4 B^2)), a von
Mises density of the axis about theta whose standard deviation is about B where B is small. A homogeneous bank has one B for
all orientations, a heterogeneous one several. Codes are as large as the picture, beyond whose border they are 0.

Shape letters: B = pictures, K = kernels, S = pixels a side of a kernel (odd), H, W = rows and columns, T = orientations,
P = pairs of kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d, normalize

from ...errors import BadInput
from ...method import not_negative, positive
from ...selection import check_finite
from .ista import Operator, Solved, descend


class Bank(NamedTuple):
    """Log-Gabors by their parameters, each a tensor [P]; a pair of kernels, an even and an odd one, has the same."""

    orientation: Tensor
    """theta in degrees, from across to down: the direction in which the wave runs."""
    bandwidth: Tensor
    """B in degrees, > 0."""
    frequency: Tensor
    """f_0 in cycles a pixel, in (0, 0.5)."""
    octaves: Tensor
    """Full width at half height of the radial Gaussian, > 0."""

    def kernels(self, side: int) -> Tensor:
        """[2P, S, S] float64 kernels of length 1 and mean 0, even before odd; differentiable in the parameters.

        The derivative is blind to one thing: an odd kernel jumps where the line across its wave passes a point of the
        frequency grid, by as much as the axis has gain there, which is little unless B is wide.
        """
        axis = torch.fft.fftfreq(side, dtype=torch.float64)
        down, across = torch.meshgrid(axis, axis, indexing="ij")
        f, phi = torch.hypot(down, across), torch.atan2(down, across)
        theta, width, frequency, octaves = (v.double()[:, None, None] for v in (self.orientation.deg2rad(), self.bandwidth.deg2rad(), *self[2:]))
        spread = octaves * math.log(2) / (2 * math.sqrt(2 * math.log(2)))
        radial = torch.where(f > 0, torch.exp(-((f.clamp_min(1e-9).log() - frequency.log()) ** 2) / (2 * spread**2)), 0.0)
        even = radial * torch.exp((torch.cos(2 * (phi - theta)) - 1) / (4 * width**2))
        ahead = torch.cos(phi - theta).detach().sign()          # one half plane against the other makes the odd kernel
        both = torch.fft.ifft2(torch.stack((even.to(torch.complex128), 1j * even * ahead), 1)).real.flatten(0, 1)
        kernels = torch.fft.fftshift(both, (1, 2))
        kernels = kernels - kernels.mean((1, 2), keepdim=True)
        return normalize(kernels.flatten(1), dim=-1).view_as(kernels)


def even_bank(orientations: int, bandwidths: Sequence[float], frequency: float = 0.2, octaves: float = 1.5) -> Bank:
    """T * len(bandwidths) pairs: T orientations evenly over 180 degrees for each bandwidth.

    Raises:
        BadInput: an argument out of range.
    """
    positive("orientations", orientations)
    if not bandwidths or not all(0 < b < 180 for b in bandwidths):
        raise BadInput(f"bandwidths={list(bandwidths)} must be degrees in (0, 180), at least one")
    if not 0 < frequency < 0.5 or not octaves > 0:
        raise BadInput(f"frequency={frequency} must be in (0, 0.5) and octaves={octaves} > 0")
    width = torch.tensor(bandwidths, dtype=torch.float64).repeat_interleave(orientations)
    theta = (torch.arange(orientations, dtype=torch.float64) * 180 / orientations).repeat(len(bandwidths))
    return Bank(theta, width, torch.full_like(width, frequency), torch.full_like(width, octaves))


def check_side(side: int) -> None:
    """Raise BadInput for a kernel without a middle."""
    if positive("side", side) % 2 == 0 or side < 3:
        raise BadInput(f"side={side} must be odd and at least 3, so that a kernel has a middle")


def oriented_bank(
    side: int, orientations: int, bandwidths: Sequence[float], frequency: float = 0.2, octaves: float = 1.5,
) -> Tensor:
    """[T * len(bandwidths) * 2, S, S] kernels of length 1 and mean 0, an even and an odd one for each orientation and bandwidth.

    Args:
        side: S, odd. orientations: T, evenly over 180 degrees. bandwidths: B in degrees, > 0.
        frequency: f_0 in cycles a pixel, in (0, 0.5). octaves: full width at half height of the radial Gaussian.

    Raises:
        BadInput: an argument out of range.
    """
    check_side(side)
    return even_bank(orientations, bandwidths, frequency, octaves).kernels(side).float()


def convolution(kernels_KSS: Tensor, shape: tuple[int, int]) -> Operator:
    """The dictionary of all shifts of the kernels on pictures of `shape`; pictures and codes flat.

    Its bound on ||D||_2^2 is the largest power of the bank at any frequency of a grid on which nothing wraps around.
    """
    k, side, _ = kernels_KSS.shape
    weight, pad = kernels_KSS.flip(1, 2)[None], side // 2
    grid = tuple(n + side - 1 for n in shape)
    bound = float(torch.fft.rfft2(kernels_KSS.double(), s=grid).abs().square().sum(0).max())
    return Operator(
        lambda z: conv2d(z.view(-1, k, *shape), weight, padding=pad).flatten(1),
        lambda r: conv_transpose2d(r.view(-1, 1, *shape), weight, padding=pad).flatten(1), bound,
    )


def convolutional_codes(
    pictures_BHW: Tensor, kernels_KSS: Tensor, weight: float, *, penalty: str = "soft", start: Tensor | None = None,
    tolerance: float = 1e-4, most: int = 500,
) -> Solved:
    """Codes [B, K, H, W] by FISTA; a picture stops by its duality gap over 1/2 ||x||^2.

    Args:
        pictures_BHW: each at least as large as a kernel. kernels_KSS: S odd. weight: of the l1 norm (or another `penalty`).
        start: codes [B, K, H, W] to begin at (default 0).

    Raises:
        BadInput: shapes that do not fit, values that are not finite, or numbers out of range.
    """
    if kernels_KSS.ndim != 3 or kernels_KSS.shape[1] != kernels_KSS.shape[2] or not kernels_KSS.shape[1] % 2 or not len(kernels_KSS):
        raise BadInput(f"kernels have shape {list(kernels_KSS.shape)}; need [kernels, side, side] with an odd side")
    if pictures_BHW.ndim != 3 or min(pictures_BHW.shape[1:]) < kernels_KSS.shape[1]:
        raise BadInput(f"pictures have shape {list(pictures_BHW.shape)}; need [pictures, rows, columns], each at least {kernels_KSS.shape[1]}")
    check_finite(pictures_BHW, "pictures to code")
    check_finite(kernels_KSS, "kernels")
    not_negative("weight", weight)
    not_negative("tolerance", tolerance)
    positive("most", most)
    shape = (pictures_BHW.shape[1], pictures_BHW.shape[2])
    full = (len(pictures_BHW), len(kernels_KSS), *shape)
    if start is not None and start.shape != full:
        raise BadInput(f"start has shape {list(start.shape)}; codes are {list(full)}")
    begin = (pictures_BHW.new_zeros(full) if start is None else start.to(pictures_BHW)).flatten(1)
    got = descend(pictures_BHW.flatten(1), convolution(kernels_KSS.to(pictures_BHW), shape), begin, weight, penalty, False, tolerance, most, True)
    return got._replace(codes=got.codes.view(-1, len(kernels_KSS), *shape))


def reconstructed(codes_BKHW: Tensor, kernels_KSS: Tensor) -> Tensor:
    """[B, H, W] sum of kernels at the codes' places."""
    shape = (codes_BKHW.shape[2], codes_BKHW.shape[3])
    return convolution(kernels_KSS.to(codes_BKHW), shape).synthesis(codes_BKHW.flatten(1)).view(-1, *shape)
