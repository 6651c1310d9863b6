"""What a report holds, and the check that it does. docs/report-schema.md says the same in prose.

Unknown numbers are None; NaN and infinity are refused because JSON has neither (`report.tidy` makes them None).
Keys not named here are kept and ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict, cast

from ..errors import BadInput, Unsupported

SCHEMA = 1
UNITS = ("latents", "weights", "neurons", "attention", "tokens", "experts", "memory")
ROLES = ("method", "baseline", "dense")


class Made(TypedDict):
    """How the report came to be. `versions` maps a package to its version, `date` is ISO 8601."""

    command: str
    versions: dict[str, str]
    seconds: float
    machine: str
    date: str


class Model(TypedDict):
    """The model judged and the text it was judged on."""

    name: str
    params: int | None
    layers: int | None
    d_model: int | None
    vocab: int | None
    data: str
    heldout: str


class Step(TypedDict):
    """One stage of the work and how long it took."""

    name: str
    seconds: float
    note: NotRequired[str]


class Metric(TypedDict):
    """A measured quantity with its 95 % interval."""

    mean: float | None
    low: NotRequired[float | None]
    high: NotRequired[float | None]


class Point(TypedDict):
    """One method at one budget. `budget` was asked for, `density` measured: fractions of units kept.

    `metrics`: ce_increase, kl, top1, fvu, loss_recovered, ...
    `cost`: flops, bytes, dense_flops, dense_bytes (a token), ms, dense_ms.
    """

    method: str
    role: str
    budget: float
    density: float
    metrics: dict[str, Metric]
    cost: dict[str, float | None]


class Axis(TypedDict):
    """`key` is a metric (y), or density, budget, flops, bytes, ms (x); `better` (y only) is low or high."""

    key: str
    label: str
    better: NotRequired[str]


class Unit(TypedDict):
    """One frontier: the methods that select one kind of unit."""

    unit: str
    question: str
    x: Axis
    y: Axis
    points: list[Point]
    verdict: str


class Curve(TypedDict):
    """Training of one method. `series` has `step` and any of loss, fvu, dead, tokens_per_s, all of one length."""

    method: str
    series: dict[str, list[float | None]]


class Context(TypedDict):
    """A stretch of text: `tokens` index the report's token strings, `acts` runs along, `pos` is the peak."""

    tokens: list[int]
    acts: list[float]
    pos: int
    doc: NotRequired[str]


class Top(TypedDict):
    """One latent. `logits_*` are pairs [token index, value]; `hist` counts activations from 0 to its max."""

    logits_up: NotRequired[list[list[float]]]
    logits_down: NotRequired[list[list[float]]]
    contexts: NotRequired[list[Context]]
    hist: NotRequired[list[int]]


class Latents(TypedDict):
    """The latent browser.

    `table` holds columns of one length: density (required), id, max, concept, precision, recall, f1.

    `concept` indexes `concepts` (-1 or None: no concept); `top` is parallel to the table, None where nothing was kept.
    """

    site: str
    method: str
    width: int
    tokens: list[str]
    concepts: NotRequired[list[str]]
    table: dict[str, list[Any]]
    top: list[Top | None]


class CostRow(TypedDict):
    """Cost of one part next to its dense form, a token; `what` names it."""

    what: str
    flops: NotRequired[float | None]
    dense_flops: NotRequired[float | None]
    bytes: NotRequired[float | None]
    dense_bytes: NotRequired[float | None]
    ms: NotRequired[float | None]
    dense_ms: NotRequired[float | None]
    note: NotRequired[str]


class Table(TypedDict):
    """Words and figures in rows; the first column is the row's head."""

    title: str
    note: str
    verdict: NotRequired[str]
    head: list[str]
    rows: list[list[str]]


class Grid(TypedDict):
    """Shares in [0, 1] as shaded cells: heat maps (labels and figures) and masks (neither). None leaves a cell empty."""

    title: str
    note: str
    columns: list[str]
    rows: list[str]
    values: list[list[float | None]]
    figures: bool


class Report(TypedDict):
    """The whole page. `tables` and `grids` may be missing."""

    schema: int
    title: str
    made: Made
    model: Model
    steps: list[Step]
    units: list[Unit]
    curves: list[Curve]
    latents: Latents | None
    costs: list[CostRow]
    notes: list[str]
    tables: NotRequired[list[Table]]
    grids: NotRequired[list[Grid]]


def validate(report: Any) -> Report:
    """The report itself, when the page can show it.

    Raises BadInput with the path of the first thing that is wrong; Unsupported for a schema of another version.
    """
    _is(isinstance(report, Mapping), "report", "an object", report)
    if report.get("schema") != SCHEMA:
        raise Unsupported(
            f"report: schema {report.get('schema')!r}; this version shows schema {SCHEMA}: make the report again"
        )
    _text(report, "title", "report")
    made = _part(report, "made", Mapping, "report")
    for name in ("command", "machine", "date"):
        _text(made, name, "made")
    _number(made.get("seconds"), "made.seconds")
    for name, version in _part(made, "versions", Mapping, "made").items():
        _is(isinstance(version, str), f"made.versions.{name}", "a string", version)
    model = _part(report, "model", Mapping, "report")
    for name in ("name", "data", "heldout"):
        _text(model, name, "model")
    for name in ("params", "layers", "d_model", "vocab"):
        _number(model.get(name), f"model.{name}")
    _each(report, "steps", _step)
    _each(report, "units", _unit)
    _each(report, "curves", _curve)
    if report.get("latents") is not None:
        _latents(report["latents"])
    _each(report, "costs", _cost)
    _each(report, "notes", lambda note, at: _is(isinstance(note, str), at, "a string", note))
    for name, check in (("tables", _table), ("grids", _grid)):
        if name in report:
            _each(report, name, check)
    return report  # type: ignore[return-value]


def _is(true: bool, at: str, wanted: str, got: Any) -> None:
    if not true:
        said = repr(got)
        raise BadInput(f"{at}: {said if len(said) < 60 else said[:57] + '...'} must be {wanted}")


def _part(owner: Mapping[str, Any], name: str, kind: type, at: str) -> Any:
    value = owner.get(name)
    _is(
        isinstance(value, kind) and not isinstance(value, str),
        f"{at}.{name}",
        "an object" if kind is Mapping else "a list",
        value,
    )
    return value


def _text(owner: Mapping[str, Any], name: str, at: str) -> None:
    _is(isinstance(owner.get(name), str), f"{at}.{name}", "a string", owner.get(name))


def _number(value: Any, at: str) -> None:
    if value is None:
        return
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    _is(good, at, "a finite number or null", value)


def _numbers(values: Any, at: str, length: int | None = None) -> None:
    _is(isinstance(values, Sequence) and not isinstance(values, str), at, "a list of numbers", values)
    if length is not None:
        _is(len(values) == length, at, f"a list of {length} values like its neighbours, not {len(values)}", values)
    # One pass in C for the usual case; the slow loop only to name the culprit.
    try:
        if math.isfinite(math.fsum(0.0 if v is None else v for v in cast(Sequence[Any], values))) and bool not in set(map(type, values)):
            return
    except (TypeError, OverflowError):
        pass
    for i, value in enumerate(values):
        _number(value, f"{at}[{i}]")


def _each(report: Mapping[str, Any], name: str, check: Callable[[Any, str], None]) -> None:
    for i, item in enumerate(_part(report, name, Sequence, "report")):
        check(item, f"{name}[{i}]")


def _step(step: Any, at: str) -> None:
    _is(isinstance(step, Mapping), at, "an object", step)
    _text(step, "name", at)
    _number(step.get("seconds"), f"{at}.seconds")


def _unit(unit: Any, at: str) -> None:
    _is(isinstance(unit, Mapping), at, "an object", unit)
    _is(unit.get("unit") in UNITS, f"{at}.unit", "one of " + ", ".join(UNITS), unit.get("unit"))
    for name in ("question", "verdict"):
        _text(unit, name, at)
    for name in ("x", "y"):
        axis = _part(unit, name, Mapping, at)
        for key in ("key", "label"):
            _text(axis, key, f"{at}.{name}")
    _is(unit["y"].get("better") in ("low", "high"), f"{at}.y.better", "low or high", unit["y"].get("better"))
    for i, point in enumerate(_part(unit, "points", Sequence, at)):
        _point(point, f"{at}.points[{i}]")


def _point(point: Any, at: str) -> None:
    _is(isinstance(point, Mapping), at, "an object", point)
    _text(point, "method", at)
    _is(point.get("role") in ROLES, f"{at}.role", "one of " + ", ".join(ROLES), point.get("role"))
    for name in ("budget", "density"):
        _number(point.get(name), f"{at}.{name}")
    for name, metric in _part(point, "metrics", Mapping, at).items():
        _is(isinstance(metric, Mapping), f"{at}.metrics.{name}", "an object with mean, low, high", metric)
        for key in ("mean", "low", "high"):
            _number(metric.get(key), f"{at}.metrics.{name}.{key}")
    for name, value in _part(point, "cost", Mapping, at).items():
        _number(value, f"{at}.cost.{name}")


def _curve(curve: Any, at: str) -> None:
    _is(isinstance(curve, Mapping), at, "an object", curve)
    _text(curve, "method", at)
    series = _part(curve, "series", Mapping, at)
    _is("step" in series, f"{at}.series", "an object with step", sorted(series))
    for name, values in series.items():
        _numbers(values, f"{at}.series.{name}", len(series["step"]))


def _cost(row: Any, at: str) -> None:
    _is(isinstance(row, Mapping), at, "an object", row)
    _text(row, "what", at)
    for name in ("flops", "dense_flops", "bytes", "dense_bytes", "ms", "dense_ms"):
        _number(row.get(name), f"{at}.{name}")


def _table(table: Any, at: str) -> None:
    _is(isinstance(table, Mapping), at, "an object", table)
    _text(table, "title", at)
    _text(table, "note", at)
    if "verdict" in table:
        _text(table, "verdict", at)
    head = _part(table, "head", Sequence, at)
    for i, row in enumerate([head, *_part(table, "rows", Sequence, at)]):
        good = isinstance(row, Sequence) and not isinstance(row, str) and len(row) == len(head) and all(isinstance(v, str) for v in row)
        _is(good, f"{at}.rows[{i - 1}]" if i else f"{at}.head", f"a list of {len(head)} strings", row)


def _grid(grid: Any, at: str) -> None:
    _is(isinstance(grid, Mapping), at, "an object", grid)
    _text(grid, "title", at)
    _text(grid, "note", at)
    _is(isinstance(grid.get("figures"), bool), f"{at}.figures", "true or false", grid.get("figures"))
    values = _part(grid, "values", Sequence, at)
    for name, count in (("rows", len(values)), ("columns", len(values[0]) if values else 0)):
        labels = _part(grid, name, Sequence, at)
        _is(len(labels) in (0, count) and all(isinstance(v, str) for v in labels), f"{at}.{name}", f"no label or {count}", labels)
    for i, row in enumerate(values):
        _numbers(row, f"{at}.values[{i}]", len(values[0]))


def _latents(latents: Any) -> None:
    _is(isinstance(latents, Mapping), "latents", "an object or null", latents)
    for name in ("site", "method"):
        _text(latents, name, "latents")
    _number(latents.get("width"), "latents.width")
    tokens = _part(latents, "tokens", Sequence, "latents")
    _is(all(isinstance(t, str) for t in tokens), "latents.tokens", "a list of strings", tokens)
    concepts = latents.get("concepts", [])
    _is(
        isinstance(concepts, Sequence) and all(isinstance(c, str) for c in concepts),
        "latents.concepts",
        "a list of strings",
        concepts,
    )
    table = _part(latents, "table", Mapping, "latents")
    _is("density" in table, "latents.table", "an object of columns with density", sorted(table))
    rows = len(_part(table, "density", Sequence, "latents.table"))
    for name, column in table.items():
        _numbers(column, f"latents.table.{name}", rows)
    for row, concept in enumerate(table.get("concept", ())):
        _is(
            concept is None or -1 <= concept < len(concepts),
            f"latents.table.concept[{row}]",
            f"null, -1 or an index below {len(concepts)}",
            concept,
        )
    top = _part(latents, "top", Sequence, "latents")
    _is(len(top) in (0, rows), "latents.top", f"empty or a list of {rows}, one entry a row of the table", len(top))
    for row, entry in enumerate(top):
        if entry is not None:
            _top(entry, f"latents.top[{row}]", len(tokens))


def _top(top: Any, at: str, tokens: int) -> None:
    _is(isinstance(top, Mapping), at, "an object or null", top)
    for name in ("logits_up", "logits_down"):
        for i, pair in enumerate(top.get(name) or ()):
            _is(isinstance(pair, Sequence) and len(pair) == 2, f"{at}.{name}[{i}]", "[token index, value]", pair)
            _index(pair[0], tokens, f"{at}.{name}[{i}][0]")
            _number(pair[1], f"{at}.{name}[{i}][1]")
    if top.get("hist"):
        _numbers(top["hist"], f"{at}.hist")
    for i, context in enumerate(top.get("contexts") or ()):
        here = f"{at}.contexts[{i}]"
        _is(isinstance(context, Mapping), here, "an object", context)
        ids = _part(context, "tokens", Sequence, here)
        for j, token in enumerate(ids):
            _index(token, tokens, f"{here}.tokens[{j}]")
        _numbers(context.get("acts"), f"{here}.acts", len(ids))
        _index(context.get("pos"), len(ids), f"{here}.pos")


def _index(value: Any, below: int, at: str) -> None:
    _is(type(value) is int and 0 <= value < below, at, f"an index below {below}", value)
