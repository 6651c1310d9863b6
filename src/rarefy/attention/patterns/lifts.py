"""Words that put a pattern over other coordinates (blocks, grids, labels) or give heads and layers different ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ...errors import BadInput
from ...method import positive
from .grid import Need, Scene
from .pattern import Choice, Lift, Pattern
from .words import neighbours, own, said, whole, word


def named(name: Any) -> str:
    """`name` if it can name a bound tensor."""
    if not isinstance(name, str) or not name.isidentifier():
        raise BadInput(f"{name!r} names no metadata; it must be a word in quotes, such as \"row\"")
    return name


def _pattern(where: str, given: Any) -> Pattern:
    if not isinstance(given, Pattern):
        raise BadInput(f"{where} takes patterns, not {given!r}; for example {where.replace('...', 'window(8)')}")
    return given


@word
def blocks(size: int, pattern: Pattern) -> Pattern:
    """A pattern over blocks of `size` positions: `blocks(64, window(3))` is the own block and the two before, whole."""
    positive("blocks", size)
    _pattern("blocks(64, ...)", pattern)
    return Lift(
        said("blocks", size, pattern), pattern, lambda x, scene: x.div(size, rounding_mode="floor"),
        lambda scene: None if scene.length is None else -(-scene.length // size), lambda part: blocks(size, part),
        back=lambda n: (n[:, None] * size + torch.arange(size)).flatten(),
    )


@word
def parts(count: int, pattern: Pattern) -> Pattern:
    """A pattern over `count` parts of (nearly) equal size that the sequence is cut into."""
    positive("parts", count)
    _pattern("parts(4, ...)", pattern)
    text = said("parts", count, pattern)
    return Lift(
        text, pattern, lambda x, scene: (x * count).div(scene.size(text), rounding_mode="floor"), lambda scene: count,
        lambda part: parts(count, part),
    )


def sizes(name: str, given: Any) -> tuple[int, ...]:
    """`given` as a tuple of positive whole numbers."""
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise BadInput(f"{name}={given!r} must be sizes in brackets, such as (8, 8)")
    return tuple(positive(name, n) for n in given)


@word
def on(axis: int, shape: Sequence[int], pattern: Pattern, start: int = 0) -> Pattern:
    """A pattern over one coordinate of a grid laid out row by row from position `start` on.

    `on(1, (8, 8), own())` is the same column; positions outside the grid see and are seen by nothing.
    """
    shape = sizes("shape", shape)
    whole("axis", axis, 0)
    whole("start", start, 0)
    if axis >= len(shape):
        raise BadInput(f"axis={axis} of a grid {shape}: allowed are 0..{len(shape) - 1}")
    _pattern(f"on({axis}, {shape}, ...)", pattern)
    total, step = math.prod(shape), math.prod(shape[axis + 1 :])

    def to(x: Tensor, scene: Scene) -> Tensor:
        x = x - start
        return torch.where((x >= 0) & (x < total), x.div(step, rounding_mode="floor") % shape[axis], -1)

    text = said("on", axis, shape, pattern, start=(start, 0))
    return Lift(text, pattern, to, lambda scene: shape[axis], lambda part: on(axis, shape, part, start))


@word
def by(name: str, pattern: Pattern) -> Lift:
    """A pattern over bound labels in place of positions: `by("frame", window(2))` is the own frame and the one before."""
    named(name)
    text = said("by", name, _pattern(f'by("{name}", ...)', pattern))

    def length(scene: Scene) -> int:
        table = scene.table(name, text)
        return int(table.max()) + 1 if table.numel() else 0

    return Lift(text, pattern, lambda x, scene: scene.table(name, text)[x], length, lambda part: by(name, part), (Need(name, 1, True),))


@word
def chunks(n: int, shift: int = 0, wrap: bool = False) -> Pattern:
    """Keys of the query's own chunk of n, cut `shift` positions earlier.

    Args:
        wrap: the first and the last, cut off chunk are one, as where tokens are rolled by `shift` (LongLoRA).
    """
    positive("chunks", n)
    whole("shift", shift, 0)
    text = said("chunks", n, shift=(shift, 0), wrap=(wrap, False))

    def to(x: Tensor, scene: Scene) -> Tensor:
        x = (x + shift) % scene.size(text) if wrap else x + shift
        return x.div(n, rounding_mode="floor")

    return Lift(text, own(), to, lambda scene: None, lambda part: chunks(n, shift, wrap))


@word
def cross_chunks(n: int, shift: int) -> Pattern:
    """Queries in chunks of n, each with the keys that lie in it once all keys are moved `shift` on, the last ones to the front (SCCA)."""
    positive("cross_chunks", n)
    whole("shift", shift, 0)
    text = said("cross_chunks", n, shift)
    return Lift(
        text, own(), lambda q, scene: q.div(n, rounding_mode="floor"), lambda scene: None, lambda part: cross_chunks(n, shift),
        key_to=lambda k, scene: ((k + shift) % scene.size(text)).div(n, rounding_mode="floor"),
    )


def _every_axis(shape: tuple[int, ...], one: Callable[[int], Pattern], start: int) -> Pattern:
    return reduce(lambda a, b: a & b, (on(axis, shape, one(axis), start) for axis in range(len(shape))))


def _per_axis(name: str, given: Any, shape: tuple[int, ...], least: int = 1) -> tuple[int, ...]:
    given = (given,) * len(shape) if isinstance(given, int) else tuple(given)
    if len(given) != len(shape):
        raise BadInput(f"{name}={given!r} must be one number, or one for each of the {len(shape)} axes of {shape}")
    return tuple(whole(name, n, least) for n in given)


@word
def neighbourhood(
    shape: Sequence[int], size: int | Sequence[int], dilation: int | Sequence[int] = 1, border: str = "shift", start: int = 0,
) -> Pattern:
    """`neighbours` on every axis of a grid: the nearest size x size x ... places (NATTEN, arXiv 2204.07143)."""
    shape = sizes("shape", shape)
    n, d = _per_axis("size", size, shape), _per_axis("dilation", dilation, shape)
    return _every_axis(shape, lambda axis: neighbours(n[axis], d[axis], border), start)


@word
def boxes(shape: Sequence[int], size: int | Sequence[int], shift: int | Sequence[int] = 0, start: int = 0) -> Pattern:
    """Windows that do not overlap on a grid, cut `shift` places earlier on every axis (Swin, arXiv 2103.14030)."""
    shape = sizes("shape", shape)
    n, by_ = _per_axis("size", size, shape), _per_axis("shift", shift, shape, 0)
    return _every_axis(shape, lambda axis: chunks(n[axis], by_[axis]), start)


def _chosen(name: str, options: tuple[Pattern, ...]) -> tuple[Pattern, ...]:
    if not options:
        raise BadInput(f"{name}() is empty: give it patterns, as in {name}(window(64), full())")
    return tuple(_pattern(f"{name}(...)", one) for one in options)


@word
def heads(*options: Pattern) -> Pattern:
    """Equal shares of the heads, in order: `heads(a, b)` gives the first half a and the second half b."""
    options = _chosen("heads", options)
    text = said("heads", *options)

    def pick(head: int, count: int, layer: int) -> int:
        if count % len(options):
            raise BadInput(f"{text} gives equal shares of the heads to {len(options)} patterns; there are {count} heads")
        return head * len(options) // count

    return Choice(text, options, pick, "head")


@word
def layers(*options: Pattern) -> Pattern:
    """Layers in turn: `layers(a, b, b)` gives layer 0 a, 1 and 2 b, 3 a, ..."""
    options = _chosen("layers", options)
    return Choice(said("layers", *options), options, lambda head, count, layer: layer % len(options), "layer")


def _some(name: str, which: Any, these: Pattern, others: Pattern, axis: str) -> Pattern:
    if not isinstance(which, Sequence) or isinstance(which, str):
        raise BadInput(f"{name} takes a list of {axis} numbers first, not {which!r}; as in {name}([0, 5], full(), window(64))")
    listed = [whole(axis, n, 0) for n in which]
    place = 0 if axis == "head" else 2
    return Choice(
        said(name, listed, these, others), _chosen(name, (these, others)),
        lambda head, count, layer: int((head, count, layer)[place] not in listed), axis,
    )


@word
def on_heads(which: Sequence[int], these: Pattern, others: Pattern) -> Pattern:
    """The listed heads have one pattern, the others another."""
    return _some("on_heads", which, these, others, "head")


@word
def on_layers(which: Sequence[int], these: Pattern, others: Pattern) -> Pattern:
    """The listed layers have one pattern, the others another: hybrid stacks (MASFormer, LongGen)."""
    return _some("on_layers", which, these, others, "layer")
