"""Patterns of pictures and videos, whose patches are laid out row by row and frame by frame.

Shapes are (rows, columns) or (frames, rows, columns); a video without need of rows is (frames, patches).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from ....errors import BadInput
from ....method import positive
from ..lifts import blocks, heads, layers, neighbourhood, on, sizes
from ..pattern import Pattern
from ..relations import edges, random
from ..words import around, block, every, full, keys, lag, own, sinks, strided, tokens, word
from .example import Example, square, video


@word
def dinat(shape: Sequence[int] = (32, 32), size: int = 7, dilation: int = 4) -> Pattern:
    """DiNAT (Hassani, Shi 2022, arXiv 2209.15001): the nearest size x size patches, in every second layer dilated."""
    return layers(neighbourhood(shape, size), neighbourhood(shape, size, dilation))


@word
def favit(shape: Sequence[int] = (32, 32), size: int = 7, dilations: Sequence[int] = (1, 2, 4)) -> Pattern:
    """FaViT (Qin et al. 2023, arXiv 2312.08614): windows of size x size patches, in each head group spread by another dilation."""
    shape = sizes("shape", shape)

    def spread(d: int) -> Pattern:
        per_axis = (on(a, shape, block(size * positive("dilation", d)) & strided(d)) for a in range(len(shape)))
        return reduce(lambda a, b: a & b, per_axis)

    return heads(*(spread(d) for d in dilations))


@word
def godiva(shape: Sequence[int] = (4, 16, 16), text: int = 32) -> Pattern:
    """GODIVA (Wu et al. 2021, arXiv 2104.14806): layers along time, rows and columns in turn, and the text before the video."""
    shape = sizes("shape", shape)
    positive("text", text)

    def along(axis: int) -> Pattern:
        return reduce(lambda a, b: a & b, (on(other, shape, own(), text) for other in range(len(shape)) if other != axis))

    return layers(*(along(axis) | sinks(text) for axis in range(len(shape))))


def _frames(shape: Sequence[int]) -> tuple[int, int]:
    shape = sizes("shape", shape)
    return shape[0], math.prod(shape[1:])


@word
def tune_a_video(shape: Sequence[int] = (8, 256)) -> Pattern:
    """Tune-A-Video (Wu et al. 2022, arXiv 2212.11565, eq. 5): every frame sees the first and the one before."""
    return on(0, _frames(shape), keys(0) | lag(1))


@word
def condition_video(shape: Sequence[int] = (8, 256), step: int = 3) -> Pattern:
    """ConditionVideo's sBiST-Attn (Peng et al. 2023, arXiv 2310.07697): the own frame and every step-th, in both directions of time."""
    return on(0, _frames(shape), every(step) | own())


@word
def mind_animator(shape: Sequence[int] = (8, 256), past: int = 2, seed: int = 0) -> Pattern:
    """Mind-Animator's sparse causal attention (Lu et al. 2024, arXiv 2405.03280): the own frame and a random part of those before."""
    return on(0, _frames(shape), own() | random(past, seed, past=True))


@word
def efficient_vdit(shape: Sequence[int] = (8, 256), reference: Sequence[int] = (0, 4)) -> Pattern:
    """Efficient-vDiT's attention tile (Ding et al. 2025, arXiv 2502.06155): the own frame, and frames that see and are seen by all.

    How many there are in each layer, the paper searches for; here they are given.
    """
    return on(0, _frames(shape), own() | tokens(*reference))


@word
def sparse_vdit(shape: Sequence[int] = (8, 256), width: int = 32, stripe: int = 16) -> Pattern:
    """Sparse-vDiT's four kinds (Chen et al. 2025, arXiv 2506.03065): dense, a diagonal, a diagonal in every frame, vertical stripes.

    Which head has which, the paper searches for (skipped heads are `none()`); here each kind has a quarter of the heads.
    """
    return heads(full(), around(width), on(1, _frames(shape), around(width)), every(stripe))


@word
def osp_next(shape: Sequence[int] = (4, 16, 16), skip: int = 2) -> Pattern:
    """OSP-Next's Skiparse-2D (Ge et al. 2026, arXiv 2605.28691): every skip-th row and column, of patches and, in every second layer, of groups."""
    shape = sizes("shape", shape)
    if len(shape) != 3:
        raise BadInput(f"shape={shape} must be (frames, rows, columns)")
    by_token, by_group = strided(skip), blocks(skip, strided(skip))
    return layers(*(on(1, shape, one) & on(2, shape, one) for one in (by_token, by_group)))


@word
def pemf_vvto() -> Pattern:
    """PEMF-VVTO (Chang et al. 2024, arXiv 2412.03021): patches at points matched beforehand, between cloth and frames and between frames."""
    return edges("matches", both=True) | own()


@word
def mv2d() -> Pattern:
    """MV2D (Wang et al. 2023, arXiv 2301.02364): object queries see the features inside their own boxes and those matched in other views."""
    return edges("inside")


def _matches(length: int) -> Mapping[str, Tensor]:
    """Every fourth patch has a match in each later frame, a few patches aside."""
    frames, patches = _frames(video(length))
    at = torch.arange(0, patches, 4)
    pairs = [torch.stack([at + f * patches, (at + 3 * (g - f)) % patches + g * patches], 1) for f in range(frames) for g in range(f + 1, frames)]
    return {"matches": torch.cat(pairs)}


def _inside(length: int) -> Mapping[str, Tensor]:
    """Boxes on the first seven eighths of the sequence, a picture; the object queries are the last eighth."""
    rows, columns = square(length * 7 // 8)
    first, pairs = length * 7 // 8, []
    for n in range(length - first):
        top, left = (2 * n) % max(1, rows - 2), (3 * n) % max(1, columns - 2)
        y, x = torch.meshgrid(torch.arange(top, min(rows, top + 3)), torch.arange(left, min(columns, left + 3)), indexing="ij")
        key = (y * columns + x).flatten()
        pairs.append(torch.stack([torch.full_like(key, first + n), key], 1))
    return {"inside": torch.cat(pairs)}


def _godiva(length: int) -> Pattern:
    """A video whose first row of each frame gave its place to the text."""
    frames, rows, columns = video(length)
    return godiva((frames, rows - 1, columns), frames * columns)


EXAMPLES = (
    Example("dinat", lambda n: dinat(square(n), 3 if n < 256 else 7, 2 if n < 256 else 4), causal=False, layers=2),
    Example("favit", lambda n: favit(square(n), 2 if n < 256 else 4, (1, 2, 4)), causal=False, heads=3),
    Example("godiva", _godiva, layers=3),
    Example("tune_a_video", lambda n: tune_a_video(video(n)), causal=False),
    Example("condition_video", lambda n: condition_video((8, n // 8), 3), causal=False),
    Example("mind_animator", lambda n: mind_animator((8, n // 8), 2), causal=False),
    Example("efficient_vdit", lambda n: efficient_vdit((8, n // 8), (0, 4)), causal=False),
    Example("sparse_vdit", lambda n: sparse_vdit(video(n), max(2, n // 64), 8), causal=False, heads=4),
    Example("osp_next", lambda n: osp_next(video(n), 2), causal=False, layers=2),
    Example("pemf_vvto", lambda n: pemf_vvto(), _matches, causal=False),
    Example("mv2d", lambda n: mv2d(), _inside, causal=False),
)
