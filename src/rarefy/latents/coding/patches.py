"""Patches of pictures, whitened as in Olshausen & Field (1996, 1997).

Natural images have an amplitude spectrum that falls as 1 / f. The filter f * exp(-(f / f_0)^4), f_0 = 0.4 cycles a pixel,
flattens it and takes out the corner frequencies, which are noise (Olshausen & Field 1997, eq. 13).

Shape letters: H, W = rows and columns of a picture, N = patches, S = pixels a side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import BadInput
from ...method import positive
from ...selection import check_finite

CUT_OFF = 0.4


def whitened(picture_HW: Tensor) -> Tensor:
    """[H, W] the picture filtered, with mean 0 and variance 1. Raises BadInput for another shape or one shade alone."""
    if picture_HW.ndim != 2 or min(picture_HW.shape) < 2:
        raise BadInput(f"a picture has shape {list(picture_HW.shape)}; need grey values [rows, columns]")
    check_finite(picture_HW, "a picture")
    grey = picture_HW.double() - picture_HW.double().mean()
    down = torch.fft.fftfreq(grey.shape[0], dtype=torch.float64)[:, None]
    across = torch.fft.rfftfreq(grey.shape[1], dtype=torch.float64)
    f = torch.hypot(down, across)
    out = torch.fft.irfft2(torch.fft.rfft2(grey) * f * torch.exp(-((f / CUT_OFF) ** 4)), s=grey.shape)
    spread = out.std(correction=0)
    if not spread > 1e-12:
        raise BadInput("a picture is all of one shade; nothing is left after whitening")
    return ((out - out.mean()) / spread).float()


def patches(pictures: Sequence[Tensor], side: int, count: int, seed: int = 0) -> Tensor:
    """[N, S * S] patches cut from pictures [H, W] at places drawn evenly, each less its own mean.

    Raises:
        BadInput: no pictures, or one that is smaller than a patch.
    """
    positive("side", side)
    positive("count", count)
    if not pictures or any(p.ndim != 2 or min(p.shape) < side for p in pictures):
        raise BadInput(f"pictures of shapes {[list(p.shape) for p in pictures]}; need at least one, each at least {side} x {side}")
    generator = torch.Generator().manual_seed(seed)
    which_N = torch.randint(len(pictures), (count,), generator=generator)
    out = []
    for number, picture in enumerate(pictures):
        windows = picture.unfold(0, side, 1).unfold(1, side, 1)
        here = int((which_N == number).sum())
        at = torch.randint(windows.shape[0] * windows.shape[1], (here,), generator=generator)
        out.append(windows[at // windows.shape[1], at % windows.shape[1]].reshape(here, -1))
    rows = torch.cat(out)[torch.randperm(count, generator=generator)]
    return rows - rows.mean(-1, keepdim=True)
