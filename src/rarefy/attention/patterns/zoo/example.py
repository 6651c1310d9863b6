"""What the gallery shows of a pattern: how it is laid over sequences of several lengths, with metadata where it reads some."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..pattern import Pattern


@dataclass(frozen=True)
class Example:
    """A pattern of the zoo at a length."""

    name: str
    """Its card: patterns/<name>."""
    at: Callable[[int], Pattern]
    """Length -> the pattern with sizes that suit it."""
    tables: Callable[[int], Mapping[str, Tensor]] = field(default=lambda length: {})
    """Length -> metadata, made up."""
    causal: bool = True
    heads: int = 1
    layers: int = 1


def square(length: int) -> tuple[int, int]:
    """Rows and columns of a picture of `length` patches."""
    side = math.isqrt(length)
    return side, length // side


def video(length: int) -> tuple[int, int, int]:
    """Frames, rows and columns: (4, 4, 4) for 64, (4, 16, 16) for 1024, (16, 32, 32) for 16384."""
    most = round(length ** (1 / 3) + 1e-9)
    fits = [f for f in range(most, 0, -1) if length % f == 0 and math.isqrt(length // f) ** 2 * f == length]
    frames = fits[0] if fits else most
    return (frames, *square(length // frames))


def pieces(length: int, least: int, most: int, seed: int = 0) -> list[int]:
    """Sizes in least..most that fill the length."""
    generator, out = torch.Generator().manual_seed(seed), []
    while length:
        out.append(min(length, int(torch.randint(least, most + 1, (1,), generator=generator))))
        length -= out[-1]
    return out


def labels(sizes: list[int]) -> Tensor:
    """[sum] piece number of each position."""
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
