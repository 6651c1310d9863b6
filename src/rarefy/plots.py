"""Frontiers as static SVG, for README and notebooks: quality against cost, no script and no library.

Readable on light and dark paper; methods differ by shape and label, not only by colour.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from .errors import BadInput


class Frame(NamedTuple):
    """Size of a picture and its margins, in pixels."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    small: bool = False
    """One of several: method names without their unit, no key."""


FULL = Frame(760, 430, 70, 26, 46, 56)
PANEL = Frame(430, 290, 52, 14, 54, 44, small=True)
GAP = 22
COLOURS = ("#2f81c4", "#d2601a", "#2f9460", "#a552ab", "#a8830a", "#c43d60", "#5a6bd0", "#1b9092")
GREY, FRONT = "#7d858d", "#e0a92e"
CELLS = (226, 238, 248), (18, 78, 136)
"""Colour of a cell at 0 and at 1."""
SHAPES = (
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "M-4-4h8v8h-8z",
    "M0-5.4L5 3.6H-5z",
    "M0-5.6L5.6 0L0 5.6L-5.6 0z",
    "M0 5.4L5-3.6H-5z",
    "M-5 0L-2.5-4.4H2.5L5 0L2.5 4.4H-2.5z",
)
SAME_COST = 0.02
_COSTS = ("flops", "bytes", "ms")
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufffe\uffff\ud800-\udfff]")

Point = Mapping[str, Any]


def axis_value(point: Point, key: str) -> float | None:
    """A point's place on an axis: density, budget, a cost as fraction of dense, or a metric's mean; None if unknown."""
    if key in _COSTS:
        cost = point["cost"]
        dense, sparse = cost.get("dense_" + key), cost.get(key)
        return 1.0 if point["role"] == "dense" else sparse / dense if dense and sparse is not None else None
    if key in ("density", "budget"):
        return point[key]
    return (point["metrics"].get(key) or {}).get("mean")


def _place(point: Point, key: str) -> float:
    """`axis_value` of a point that has one."""
    value = axis_value(point, key)
    assert value is not None
    return value


def pareto_front(points: Sequence[Point], x: str, y: str, better: str = "low") -> list[Point]:
    """Points that no other beats in quality at a cost at most 2 % above theirs, by rising cost; dense stands aside."""
    sign = 1 if better == "low" else -1
    known = [(axis_value(p, x), axis_value(p, y), p) for p in points if p["role"] != "dense"]
    placed = [(a, sign * b, p) for a, b, p in known if a is not None and b is not None]

    def beaten(a: float, b: float, p: Point) -> bool:
        return any(q is not p and (d < b and c <= a + SAME_COST * abs(a) or d == b and c < a) for c, d, q in placed)

    return [p for a, b, p in sorted(placed, key=lambda t: t[:2]) if not beaten(a, b, p)]


def frontier_svg(unit: Mapping[str, Any]) -> str:
    """SVG text of one entry of a report's `units`. Raises BadInput where no point has both quantities."""
    title = escape(_clean(f"{unit['y']['label']} against {unit['x']['label']}"))
    return _document(FULL.width, FULL.height, title, _drawn(unit, FULL))


def overview_svg(units: Sequence[Mapping[str, Any]]) -> str:
    """SVG text of all a report's `units` side by side, two in a row. Raises BadInput for none, and as `frontier_svg`."""
    if not units:
        raise BadInput("no units to draw: the report has no frontier")
    body = []
    for i, unit in enumerate(units):
        at = f"translate({(i % 2) * (PANEL.width + GAP):g} {i // 2 * (PANEL.height + GAP):g})"
        body += [f'<g transform="{at}">', *_drawn(unit, PANEL), "</g>"]
    rows = -(-len(units) // 2)
    width = PANEL.width if len(units) == 1 else 2 * PANEL.width + GAP
    title = escape(_clean("Frontiers of " + ", ".join(_name(unit) for unit in units)))
    return _document(width, rows * PANEL.height + (rows - 1) * GAP, title, body)


def grid_svg(title: str, columns: Sequence[str], rows: Sequence[str], values: Sequence[Sequence[float]], *, across: str = "") -> str:
    """SVG text of a table of shares as coloured cells with their figures: phase diagrams, methods by kinds of data.

    Args:
        columns, rows: labels. values: a list of numbers in [0, 1] a row; NaN leaves the cell empty. across: what columns are.

    Raises:
        BadInput: nothing to draw, or lists that do not fit the labels.
    """
    if not rows or not columns or len(values) != len(rows) or any(len(row) != len(columns) for row in values):
        raise BadInput(f"a grid of {len(rows)} rows and {len(columns)} columns needs as many lists of as many numbers, and at least one")
    left = 24 + 7 * max(len(label) for label in rows)
    wide, high, top = max(64, 14 + 7 * max(len(label) for label in columns)), 30, 66
    body = [_text(12, 22, title, "start", weight="600")]
    body += [_text(left + (i + 0.5) * wide, top - 10, label, "middle") for i, label in enumerate(columns)]
    body += [_text(left + len(columns) * wide, top + len(rows) * high + 24, f"{across} →", "end")] if across else []
    for j, (label, row) in enumerate(zip(rows, values, strict=True)):
        body.append(_text(left - 12, top + (j + 0.5) * high + 4, label, "end"))
        for i, value in enumerate(row):
            if math.isnan(value):
                continue
            x, y, share = left + i * wide, top + j * high, min(1.0, max(0.0, value))
            red, green, blue = (round(a + (b - a) * share) for a, b in zip(*CELLS, strict=True))      # opaque: the same on any paper
            fill = f"#{red:02x}{green:02x}{blue:02x}"
            body.append(f'<rect x="{x + 1:g}" y="{y + 1:g}" width="{wide - 2:g}" height="{high - 2:g}" rx="3" fill="{fill}"/>')
            body.append(_text(x + wide / 2, y + high / 2 + 4, f"{value:.2f}", "middle", "#ffffff" if share > 0.5 else "#14324c"))
    return _document(left + len(columns) * wide + 16, top + len(rows) * high + (36 if across else 12), escape(_clean(title)), body)


def _name(unit: Mapping[str, Any]) -> str:
    return str(unit.get("title") or unit["unit"].capitalize())


def _document(width: float, height: float, title: str, body: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        'font-family="system-ui, sans-serif" font-size="12.5">'
        f"<title>{title}</title>\n" + "\n".join(body) + "\n</svg>\n"
    )


def _drawn(unit: Mapping[str, Any], box: Frame) -> list[str]:
    x, y = unit["x"]["key"], unit["y"]["key"]
    points = [p for p in unit["points"] if axis_value(p, x) is not None and axis_value(p, y) is not None]
    sparse = [p for p in points if p["role"] != "dense"]
    if not sparse:
        raise BadInput(f"frontier of {unit['unit']}: no point has both {x!r} and {y!r}")
    at_x, at_y, grid = _axes(sparse, points, x, y, box, shares=unit["y"].get("better", "low") == "high")
    spot = lambda p: (at_x(_place(p, x)), at_y(_place(p, y)))  # noqa: E731
    body = [*grid, *_frame(unit, box)]
    front = [spot(p) for p in pareto_front(points, x, y, unit["y"].get("better", "low"))]
    if len(front) > 1:
        round_ends = 'stroke-linecap="round" stroke-linejoin="round"'
        body.append(
            f'<path d="{_line(front)}" fill="none" stroke="{FRONT}" stroke-width="9" {round_ends} opacity=".45"/>'
        )
    for p in points:
        if p["role"] == "dense":
            v = spot(p)[1]
            body.append(f'<path d="M{box.left} {v:.1f}H{box.width - box.right}" stroke="{GREY}" stroke-dasharray="2 4"/>')
            body.append(_text(box.left + 4, v - 5, "dense", "start"))
            break
    names = list(dict.fromkeys(p["method"] for p in sparse))
    runs = [sorted((p for p in sparse if p["method"] == name), key=lambda p: _place(p, x)) for name in names]
    counts = {"method": 0, "baseline": 0}
    ranked = []
    for run in runs:
        ranked.append((run, counts[run[0]["role"]]))
        counts[run[0]["role"]] += 1
    taken: list[float] = []
    for run, place in sorted(ranked, key=lambda pair: spot(pair[0][0])[1]):  # labels are placed from the top down
        body += _series(run, spot, at_y, y, place, taken, box)
    return body


def _axes(
    sparse: Sequence[Point], points: Sequence[Point], x: str, y: str, box: Frame, shares: bool
) -> tuple[Callable[..., float], Callable[..., float], list[str]]:
    xs, ys = [_place(p, x) for p in sparse], [_place(p, y) for p in points]
    sizes = sorted(abs(v) for v in ys if v)
    log_x = min(xs) > 0 and max(xs) / min(xs) > 20
    log_y = not shares and bool(sizes) and sizes[-1] / sizes[0] > 10
    knee = max(sizes[len(sizes) // 4], sizes[-1] / 1000) if sizes else 1.0
    warp_x = math.log if log_x else lambda v: v
    warp_y = (lambda v: math.asinh(v / knee)) if log_y else lambda v: v
    gutter = min(240, max(len(_label(p, box)) for p in sparse) * 7 + 16)
    at_x = _scale(warp_x, min(xs), max(xs), box.left + gutter, box.width - box.right - 16)
    span = max(ys) - min(ys) or abs(max(ys)) or 1.0
    low, high = min(ys) - 0.06 * span, max(ys) + 0.06 * span
    if log_y:
        low, high = min(ys) - 0.15 * knee, max(ys) * (1.15 if max(ys) > 0 else 0.85)
    at_y = _scale(warp_y, low, high, box.height - box.bottom, box.top)
    percent = x in _COSTS or x in ("density", "budget")
    out = []
    for v in _ticks(low, high, log_y, at_y, 30):
        out.append(f'<path d="M{box.left} {at_y(v):.1f}H{box.width - box.right}" stroke="{GREY}" opacity=".22"/>')
        out.append(_text(box.left - 8, at_y(v) + 4, f"{v:.4g}", "end"))
    for v in _ticks(min(xs), max(xs), log_x, at_x, 56):
        out.append(_text(at_x(v), box.height - box.bottom + 18, f"{100 * v:.3g} %" if percent else f"{v:.4g}", "middle"))
    return at_x, at_y, out


def _scale(
    warp: Callable[[float], float], low: float, high: float, start: float, stop: float
) -> Callable[[float], float]:
    if not high > low:
        middle = (start + stop) / 2
        return lambda v: middle
    a, b = warp(low), warp(high)
    return lambda v: start + (warp(v) - a) / (b - a) * (stop - start)


def _ticks(low: float, high: float, log: bool, at: Callable[[float], float], gap: float) -> list[float]:
    if not high > low:
        return [low]
    if log:
        ranked = [0.0] + [s * m * 10.0**e for m in (1, 2, 5) for e in range(-9, 13) for s in (1, -1)]
    else:
        step = 10 ** math.floor(math.log10((high - low) / 4))
        step *= next(m for m in (1, 2, 2.5, 5, 10) if (high - low) / (step * m) <= 5)
        ranked = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    kept: list[float] = []
    for v in ranked:
        if low <= v <= high and all(abs(at(v) - at(k)) >= gap for k in kept):
            kept.append(v)
    return sorted(kept)


def _series(
    mine: Sequence[Point],
    spot: Callable[[Point], tuple[float, float]],
    at_y: Callable[..., float],
    y: str,
    place: int,
    taken: list[float],
    box: Frame,
) -> list[str]:
    baseline = mine[0]["role"] == "baseline"
    colour = GREY if baseline else COLOURS[place % len(COLOURS)]
    shape = SHAPES[(place + (1 if baseline else place // len(COLOURS))) % len(SHAPES)]
    spots = [spot(p) for p in mine]
    dash = ' stroke-dasharray="5 4"' if baseline else ""
    out = [f'<path d="{_line(spots)}" fill="none" stroke="{colour}" stroke-width="1.6"{dash}/>']
    for p, (px, py) in zip(mine, spots, strict=True):
        m = p["metrics"].get(y) or {}
        if m.get("low") is not None and m.get("high") is not None and abs(at_y(m["low"]) - at_y(m["high"])) > 4:
            out.append(f'<path d="M{px:.1f} {at_y(m["low"]):.1f}V{at_y(m["high"]):.1f}" stroke="{colour}"/>')
        fill = f'fill="#fff" fill-opacity=".6" stroke="{colour}" stroke-width="1.6"' if baseline else f'fill="{colour}"'
        out.append(f'<path d="{shape}" transform="translate({px:.1f} {py:.1f})" {fill}/>')
    px, py = spots[0]
    shifts = [0.0] + [s * d for d in range(3, 240, 3) for s in (-1, 1)]
    spare = (py + s for s in shifts if box.top <= py + s <= box.height - box.bottom - 4)
    free = next((v for v in spare if all(abs(v - t) >= 15 for t in taken)), py)
    taken.append(free)
    return [*out, _text(px - 12, free + 4, _label(mine[0], box), "end", colour)]


def _label(point: Point, box: Frame) -> str:
    if box.small:
        return str(point["method"]).rpartition("/")[2]
    return point["method"] + (" (baseline)" if point["role"] == "baseline" else "")


def _frame(unit: Mapping[str, Any], box: Frame) -> list[str]:
    floor, better = box.height - box.bottom, "lower is better" if unit["y"].get("better", "low") == "low" else "higher is better"
    axis = f'<path d="M{box.left} {floor}H{box.width - box.right}" stroke="{GREY}" opacity=".6"/>'
    across = _text(box.width - box.right, box.height - (6 if box.small else 10), unit["x"]["label"] + " →", "end")
    said = f"{unit['y']['label']} ({better})"
    if box.small:
        return [axis, across, _text(4, 16, _name(unit), "start", weight="700"), _text(4, 34, said, "start")]
    return [
        axis, across, _text(box.left - 54, 22, said, "start", weight="600"),
        f'<path d="M{box.left} {box.height - 14}h24" stroke="{FRONT}" stroke-width="8" opacity=".45"/>',
        _text(box.left + 32, box.height - 10, "Pareto front", "start"),
    ]


def _line(spots: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in spots)


def _text(x: float, y: float, text: str, anchor: str, colour: str = GREY, weight: str = "400") -> str:
    look = f'text-anchor="{anchor}" fill="{colour}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {look}>{escape(_clean(text))}</text>'


def _clean(text: str) -> str:
    return _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text)
