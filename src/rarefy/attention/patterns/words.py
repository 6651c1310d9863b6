"""The words that patterns are written in. Each prints as it is written, without the defaults.

Words of position here; of labels and lists in relations.py; of grids, blocks, heads and layers in lifts.py.

Shape letters: L = positions, E = pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...errors import BadInput
from ...method import positive
from .atoms import FAR, Equal, Marked, Run
from .grid import Scene
from .pattern import Either, Pattern, PerHead

WORDS: dict[str, Callable[..., Pattern]] = {}
"""Every word by its name: what `parse` knows."""

F = TypeVar("F", bound=Callable[..., Pattern])


def word(make: F) -> F:
    """Enter a function among the words."""
    WORDS[make.__name__] = make
    return make


def said(name: str, *values: Any, **options: tuple[Any, Any]) -> str:
    """The text of a call: values as they are, options (value, default) where they differ from the default."""
    shown = [_shown(v) for v in values] + [f"{k}={_shown(v)}" for k, (v, default) in options.items() if v != default]
    return f"{name}({', '.join(shown)})"


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return '"' + value + '"'
    return f"{value:g}" if isinstance(value, float) and f"{value:g}" == repr(value) else str(value)


def whole(name: str, value: Any, least: int = -FAR) -> int:
    """`value` if it is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < FAR:
        raise BadInput(f"{name}={value!r} must be a whole number{f' >= {least}' if least > -FAR else ''}")
    return value


def _ends(q: Tensor) -> tuple[Tensor, Tensor]:
    return torch.full_like(q, -FAR), torch.full_like(q, FAR)


@word
def full() -> Pattern:
    """Every pair."""
    return Run("full()", lambda q, scene: _ends(q))


@word
def none() -> Pattern:
    """No pair."""
    return Run("none()", lambda q, scene: (_ends(q)[1], _ends(q)[0]))


@word
def causal() -> Pattern:
    """Keys up to and with the query's own."""
    return Run("causal()", lambda q, scene: (_ends(q)[0], q))


@word
def own() -> Pattern:
    """The query's own key; of lifted coordinates, keys with the same one."""
    return Equal("own()")


@word
def lag(n: int) -> Pattern:
    """The key n before the query; ahead of it where n is negative."""
    whole("lag", n)
    return Run(said("lag", n), lambda q, scene: (q - n, q - n))


@word
def band(least: int, most: int) -> Pattern:
    """Keys from `most` to `least` before the query, both included: a diagonal band."""
    whole("least", least)
    whole("most", most, least)
    return Run(said("band", least, most), lambda q, scene: (q - most, q - least))


@word
def window(n: int, dilation: int = 1) -> Pattern:
    """The n nearest keys up to and with the query's own; with a dilation, every so many-th (Longformer, arXiv 2004.05150)."""
    positive("window", n)
    positive("dilation", dilation)
    return Run(said("window", n, dilation=(dilation, 1)), lambda q, scene: (q - (n - 1) * dilation, q), dilation)


@word
def around(n: int, dilation: int = 1) -> Pattern:
    """n keys before the query, its own, and n behind it."""
    whole("around", n, 0)
    positive("dilation", dilation)
    return Run(said("around", n, dilation=(dilation, 1)), lambda q, scene: (q - n * dilation, q + n * dilation), dilation)


@word
def elastic(least: int, share: float) -> Pattern:
    """A window of least + share * length keys, the own among them (MoA, arXiv 2406.14909): it grows with the sequence."""
    whole("least", least, 0)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise BadInput(f"share={share!r} must be in [0, 1]: the part of the sequence that the window grows by")
    text = said("elastic", least, share)
    return Run(text, lambda q, scene: (q + 1 - max(1, least + math.floor(share * scene.size(text))), q))


@word
def strided(n: int, offset: int = 0) -> Pattern:
    """Every n-th key back from the query (Sparse Transformer, arXiv 1904.10509)."""
    positive("stride", n)
    whole("offset", offset)
    return Run(said("strided", n, offset=(offset, 0)), lambda q, scene: _ends(q), n, offset)


@word
def block(n: int) -> Pattern:
    """Keys of the query's own block of n."""
    positive("block", n)
    return Run(said("block", n), lambda q, scene: (q.div(n, rounding_mode="floor") * n, q.div(n, rounding_mode="floor") * n + n - 1))


@word
def sinks(n: int) -> Pattern:
    """The first n keys (StreamingLLM, arXiv 2309.17453)."""
    positive("sinks", n)
    return Marked(said("sinks", n), lambda k, scene: (k >= 0) & (k < n), "key", places=lambda L: torch.arange(min(n, L)))


@word
def every(n: int, offset: int = 0) -> Pattern:
    """Keys whose position leaves `offset` when divided by n: the same ones for every query."""
    positive("every", n)
    whole("offset", offset)
    text = said("every", n, offset=(offset, 0))
    return Marked(text, lambda k, scene: (k - offset) % n == 0, "key", places=lambda L: torch.arange(offset % n, max(L, offset % n), n))


@word
def summaries(n: int, c: int) -> Pattern:
    """The last c keys of each block of n (Sparse Transformer's fixed heads)."""
    positive("summaries", n)
    positive("c", c, n)
    return Marked(said("summaries", n, c), lambda k, scene: k % n >= n - c, "key")


def _at(ids: tuple[int, ...], text: str) -> Callable[[Tensor, Scene], Tensor]:
    if not ids:
        raise BadInput(f"{text} names no position; give some, as in tokens(0, -1)")
    for i in ids:
        whole("position", i)

    def mark(x: Tensor, scene: Scene) -> Tensor:
        places = torch.tensor([i if i >= 0 else scene.size(text) + i for i in ids])
        return torch.isin(x, places)

    return mark


@word
def keys(*ids: int) -> Pattern:
    """These positions are seen by every query; negative ones count from the end."""
    return Marked(said("keys", *ids), _at(ids, said("keys", *ids)), "key")


@word
def queries(*ids: int) -> Pattern:
    """Queries at these positions see every key; negative ones count from the end."""
    return Marked(said("queries", *ids), _at(ids, said("queries", *ids)), "query")


@word
def tokens(*ids: int) -> Pattern:
    """Global tokens: seen by every query, and seeing every key."""
    out = Either(keys(*ids), queries(*ids))
    out.text = said("tokens", *ids)
    return out


@word
def shards(n: int) -> Pattern:
    """Every n-th key, head h from the h-th on: n heads see all between them (S2-Attention, arXiv 2407.17678)."""
    positive("shards", n)
    return PerHead(said("shards", n), lambda head, heads: every(n, head % n))


@word
def neighbours(n: int, dilation: int = 1, border: str = "shift") -> Pattern:
    """The n nearest keys on both sides, of those at multiples of the dilation (neighbourhood attention, arXiv 2209.15001).

    Args:
        border: "shift" moves the window inward at either end, so that every query has n keys (NATTEN); "cut" leaves
            the outer part away.
    """
    positive("neighbours", n)
    positive("dilation", dilation)
    if border not in ("shift", "cut"):
        raise BadInput(f"border={border!r} must be 'shift' or 'cut'")
    text = said("neighbours", n, dilation=(dilation, 1), border=(border, "shift"))

    def span(q: Tensor, scene: Scene) -> tuple[Tensor, Tensor]:
        phase, at = q % dilation, q.div(dilation, rounding_mode="floor")
        first = at - n // 2
        if border == "shift":
            count = (scene.size(text) - phase + dilation - 1).div(dilation, rounding_mode="floor")     # places of the query's own phase
            first = first.minimum((count - n).clamp_min(0)).clamp_min(0)
        return first * dilation + phase, (first + n - 1) * dilation + phase

    return Run(text, span, dilation)
