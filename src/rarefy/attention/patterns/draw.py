"""Pictures of patterns: static SVG, a panel a head or layer, and a few lines of text for a terminal.

Rows are queries from the top, columns keys from the left. The members of a union have a colour each, the first that
allows a pair gives it its own; what causality hides is shaded.

Shape letters: T = queries, S = keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from xml.sax.saxutils import escape

import torch
from torch import Tensor

from ...errors import BadInput
from .pattern import Both, Either, Lift, Pattern

SIDE, GAP, MARGIN, LINE = 224, 20, 16, 17
"""Pixels: a panel, between panels, around, a line of text."""
LONGEST = 512
"""Positions that are drawn."""
COLOURS = ("#2f81c4", "#d2601a", "#2f9460", "#a552ab", "#a8830a", "#c43d60", "#5a6bd0", "#1b9092")
PAPER, INK, SOFT, HIDDEN = "#ffffff", "#1f2328", "#59636e", "#eceef1"
MOST = 8
"""Panels."""
WRAP = 108
"""Characters on a line of the picture's text, at a full row of panels."""


@dataclass(frozen=True)
class Panel:
    """One distinct head and layer."""

    title: str
    one: Pattern


def panels(pattern: Pattern, heads: int, layers: int) -> list[Panel]:
    """The distinct patterns among heads and layers, in order, titled by the heads and layers that have them."""
    where: dict[Pattern, list[tuple[int, int]]] = {}
    for layer in range(layers if pattern.by_layer else 1):
        for head in range(heads if pattern.by_head else 1):
            where.setdefault(pattern.at(head, heads, layer), []).append((layer, head))

    def title(at: list[tuple[int, int]]) -> str:
        named = []
        if pattern.by_layer and len({a for a, _ in at}) < layers:
            named.append("layer " + _runs(sorted({a for a, _ in at})))
        if pattern.by_head and len({b for _, b in at}) < heads:
            named.append("head " + _runs(sorted({b for _, b in at})))
        return ", ".join(named)

    return [Panel(title(at), one) for one, at in where.items()]


def _runs(numbers: list[int]) -> str:
    out: list[list[int]] = []
    for n in numbers:
        if out and n == out[-1][1] + 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in out)


def members(pattern: Pattern) -> list[Pattern]:
    """The patterns that a union, or one laid over other coordinates, is made of."""
    if isinstance(pattern, Either) and str(pattern).startswith("("):                # a word such as tokens(0) stays one
        return [m for part in pattern.parts for m in members(part)]
    if isinstance(pattern, Lift):
        below = members(pattern.parts[0])
        return [pattern] if len(below) == 1 else [pattern.of(one) for one in below]
    return [pattern]


def _named(pattern: Pattern) -> str:
    text = str(pattern)
    return text[1:-1] if isinstance(pattern, Either | Both) and text.startswith("(") else text


def svg(
    pattern: Pattern, length: int = 64, *, heads: int = 1, layers: int = 1, causal: bool = True, tables: Mapping[str, Tensor] | None = None,
    title: str = "",
) -> str:
    """An SVG picture of every distinct head and layer; nothing in it but shapes and text.

    Args:
        title: above the panels; by default the expression.

    Raises:
        BadInput: a length that cannot be drawn, metadata that is missing.
    """
    if not 2 <= length <= LONGEST:
        raise BadInput(f"length={length} cannot be drawn; 2..{LONGEST} positions can")
    shown = panels(pattern, heads, layers)
    more, shown = len(shown) - MOST, shown[:MOST]
    colour: dict[str, str] = {}
    for panel in shown:
        for member in members(panel.one):
            colour.setdefault(_named(member), COLOURS[len(colour) % len(COLOURS)])
    columns = min(4, len(shown))
    width = 2 * MARGIN + max(columns * (SIDE + GAP) - GAP, 2 * SIDE + GAP)
    wrap = WRAP * width // (2 * MARGIN + 4 * (SIDE + GAP) - GAP)
    head = _wrapped(title or _named(pattern), wrap)
    named, y = any(panel.title for panel in shown), MARGIN + LINE * len(head) + 6
    body = [_text(MARGIN, MARGIN + 12 + LINE * n, line, INK, 13, mono=not title) for n, line in enumerate(head)]
    left = MARGIN + (width - 2 * MARGIN - (columns * (SIDE + GAP) - GAP)) / 2
    for n, panel in enumerate(shown):
        px, py = left + n % columns * (SIDE + GAP), y + n // columns * (SIDE + GAP + LINE * named)
        body += [_text(px, py + 12, panel.title, SOFT, 12)] if panel.title else []
        body.append(_panel(panel.one, length, causal, tables, px, py + LINE * named, colour))
    y += -(-len(shown) // columns) * (SIDE + GAP + LINE * named)
    if more > 0:
        body.append(_text(MARGIN, y + 10, f"and {more} more", SOFT, 12))
        y += LINE
    if len(colour) > 1:
        for name, ink in colour.items():
            for n, line in enumerate(_wrapped(name, wrap - 3)):
                body += [f'<rect x="{MARGIN}" y="{y + 2}" width="11" height="11" rx="2" fill="{ink}"/>'] if n == 0 else []
                body.append(_text(MARGIN + 18, y + 12, line, INK, 12, mono=True))
                y += LINE
    size = f'viewBox="0 0 {width:g} {y + MARGIN - 6:g}" width="{width:g}" height="{y + MARGIN - 6:g}"'
    paper = f'<title>{escape(str(pattern))}</title><rect width="100%" height="100%" rx="8" fill="{PAPER}"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">{paper}{"".join(body)}</svg>\n'


def _panel(
    one: Pattern, length: int, causal: bool, tables: Mapping[str, Tensor] | None, x: float, y: float, colour: Mapping[str, str]
) -> str:
    cell = SIDE / length
    out = [f'<g transform="translate({x:g} {y:g})" shape-rendering="crispEdges">']
    out.append(f'<rect width="{SIDE}" height="{SIDE}" fill="{HIDDEN if causal else PAPER}"/>')
    if causal:                     # white staircase of what may be seen
        steps = "".join(f"h{cell:.4g}v{cell:.4g}" for _ in range(length))
        out.append(f'<path d="M0 0{steps}H0z" fill="{PAPER}"/>')
    taken = torch.zeros(length, length, dtype=torch.bool)
    for member in members(one):
        mask = member.mask(length, length, causal=causal, tables=tables)
        out.append(f'<path d="{_cells(mask & ~taken, cell)}" fill="{colour[_named(member)]}"/>' if bool((mask & ~taken).any()) else "")
        taken |= mask
    return "".join(out) + f'<rect width="{SIDE}" height="{SIDE}" fill="none" stroke="#c4c9d0"/></g>'


def _cells(mask: Tensor, cell: float) -> str:
    """Runs of cells in a row, as boxes; equal rows that follow each other are drawn as one."""
    path, rows, start = [], mask.tolist(), 0
    for end in range(1, len(rows) + 1):
        if end < len(rows) and rows[end] == rows[start]:
            continue
        k = 0
        while k < len(rows[start]):
            if not rows[start][k]:
                k += 1
                continue
            first = k
            while k < len(rows[start]) and rows[start][k]:
                k += 1
            high, wide = (end - start) * cell, (k - first) * cell
            path.append(f"M{first * cell:.5g} {start * cell:.5g}h{wide:.4g}v{high:.4g}h-{wide:.4g}z")
        start = end
    return "".join(path)


def _text(x: float, y: float, text: str, ink: str, size: int, *, mono: bool = False) -> str:
    family = "ui-monospace,SFMono-Regular,Menlo,DejaVu Sans Mono,monospace" if mono else "system-ui,Segoe UI,DejaVu Sans,sans-serif"
    return f'<text x="{x:g}" y="{y:g}" font-family="{family}" font-size="{size}" fill="{ink}">{escape(text)}</text>'


def _wrapped(text: str, most: int) -> list[str]:
    """Lines of at most `most` characters, broken at spaces; five of them at most."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) + 1 > most:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines if len(lines) <= 5 else [*lines[:4], lines[4] + " ..."]


def terminal(mask: Tensor, columns: int = 64) -> str:
    """A mask [T, S] in half-block characters: two queries a line; a longer one is shrunk, a cell being set where any of its pairs is."""
    step = -(-max(mask.shape) // columns)
    T, S = (-(-n // step) for n in mask.shape)
    small = torch.zeros(T + T % 2, S, dtype=torch.bool)
    at = mask.nonzero() // step
    small[at[:, 0], at[:, 1]] = True
    return "\n".join("".join(" ▀▄█"[a + 2 * b] for a, b in zip(*pair, strict=True)) for pair in small.int().view(-1, 2, S).tolist())
