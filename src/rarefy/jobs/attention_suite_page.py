"""The attention suite's page: a frontier a task and phase, findings as tables, what heads keep, costs and notes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..builtin.corpus import Text
from ..frontier import Point
from .attention_suite_findings import (
    MARGIN,
    OVER,
    TIE,
    Lines,
    by_length,
    in_order,
    kept_lines,
    kept_table,
    levels,
    middle,
    short,
    statements,
    telling,
    winners,
)
from .attention_suite_tasks import QUESTIONS
from .models import Opened
from .report import page, unit_panel
from .screen import Screen

if TYPE_CHECKING:
    from .attention_suite import AttentionRequest

TITLED = 6
"""Most methods that the title names."""
LONG = 24
"""Rows of a table from which on those that say nothing are left out."""
LISTED = 60
"""Most rows of costs; where there are more, those at the middle budget."""


def panels(lines: Lines) -> list[dict[str, Any]]:
    """A frontier a task and phase, at the longest length it was measured at."""
    out = []
    for task, phase in in_order((c.task, c.phase) for c in lines):
        length = max(c.length for c in lines if (c.task, c.phase) == (task, phase))
        mine = [p for c, p in lines.items() if (c.task, c.phase, c.length) == (task, phase, length)]
        dense = Point("dense", "key", "dense", 1.0, 1.0, {"score": mine[0].metrics["dense_score"]})
        said = _panel_said(mine, dense, levels(lines)[0])
        panel = unit_panel("attention", [dense, *mine], said, y=("score", "score", "high"))
        for point in panel["points"]:
            point["metrics"].pop("dense_score", None)
        out.append(panel | {"title": f"{task}, {phase}", "question": f"{QUESTIONS[task]} {length} tokens, {phase}.", "headline": said})
    return out


def _panel_said(points: Sequence[Point], dense: Point, level: float) -> str:
    within = [p for p in points if p.density <= OVER * level] or [min(points, key=lambda p: p.density)]
    best: dict[str, Point] = {}
    for p in sorted(within, key=lambda p: (-p.metrics["score"].mean, p.density)):
        best.setdefault(p.method, p)
    first, *row = best.values()
    more = f", {short(row[0].method)} {row[0].metrics['score'].mean:.2f}" if row else ""
    score, full = first.metrics["score"].mean, dense.metrics["score"].mean
    return f"With {first.density:.0%} of the keys {short(first.method)} scores {score:.2f}{more}; dense {full:.2f}."


def tables(lines: Lines) -> list[dict[str, Any]]:
    """What the page shows as tables, of tasks that the dense model does."""
    lines = telling(lines)
    if not lines:
        return []
    head, rows = kept_table(lines)
    level = middle(lines)
    worst_head = ["method", "phase", "all tasks kept from", "worst task", "its loss", "mean loss", "density"]
    note = f"Least density from which on a task stays within {MARGIN:.0%} of dense, by the upper end of its interval; 1.00: only dense does."
    worst_note = f"Where a method keeps at most {level:.0%} of the keys, or the most below that."
    some, more = _cut(rows, lambda row: any(cell not in ("1.00", "–") for cell in row[2:]), "keep nothing of these short of dense")
    few, over = _cut(kept_lines(lines), lambda row: row[3] != "–", "keep more than that whatever they are told")
    return [
        {"title": "How sparse is still good", "verdict": statements(lines), "note": " ".join([note, *more]), "head": head, "rows": some},
        {"title": "The worst task, not only the mean", "note": " ".join([worst_note, *over]), "head": worst_head, "rows": few},
        *_length_tables(lines, note),
    ]


def _cut(rows: list[list[str]], telling: Callable[[list[str]], bool], why: str) -> tuple[list[list[str]], list[str]]:
    """(rows, a sentence on those cut away) of a long table, without the rows that say nothing."""
    some = [row for row in rows if telling(row)]
    if len(rows) <= LONG or not some:
        return rows, []
    cut = [f"{sum(row[1] == phase and row not in some for row in rows)} in {phase}" for phase in in_order(row[1] for row in rows if row not in some)]
    return some, [f"Left out: {' and '.join(cut)} that {why}."]


def _length_tables(lines: Lines, note: str) -> list[dict[str, Any]]:
    table = winners(lines)
    lengths = sorted({int(r[2]) for r in table})
    rows = [
        [task, phase, budget, *(next((f"{r[4]} {r[5]}" for r in table if r[:4] == [task, phase, str(n), budget]), "–") for n in lengths)]
        for task, phase, budget in in_order((r[0], r[1], r[3]) for r in table)
    ]
    best = f"Best score with at most that share of the keys; methods within {TIE:.0%} of the best are alike, the sparsest first."
    made = [{"title": "Which method wins at which length", "note": best,
             "head": ["task", "phase", "budget", *(f"{n} tokens" for n in lengths)], "rows": rows}]
    head, rows = by_length(lines)
    if rows:
        made.append({"title": "Does a longer context tolerate more sparsity?", "note": note, "head": head, "rows": rows})
    return made


def suite_page(
    lines: Lines, verdict: str, left_out: Mapping[str, str], grids: list[dict[str, Any]], request: AttentionRequest, model: Opened, text: Text,
    screen: Screen,
) -> dict[str, Any]:
    """The whole report."""
    units = panels(lines)
    if not telling(lines):
        units[0]["verdict"] = f"{verdict} {units[0]['verdict']}"
    notes = [
        "mqar, needle, needles, variables and turns are sat by the small recall models that ship with rarefy, one for up to 512 tokens and one for "
        "up to 8,192, text and induction by the model named above, averaging by attention alone, with queries and keys in closed form.",
        "Prefill: the whole sequence in one pass with the method in every layer. Decode: the context dense, the rest one token at a time with the "
        "method (or the cache's policy) in every layer; at most 64 tokens a sequence.",
        "Score: share of right answers; of text the dense perplexity over the method's; of averaging the share of the answer explained. Intervals "
        "are 95 % over sequences or documents; losses are paired within them.",
        "Density is measured: pairs of query and key kept, of those seen. FLOPs and bytes are counted a query in the layers served, choosing "
        "included; of a cache's policy, bytes are those held at the end. ms is the whole model a sequence, the dense model timed in turn with it.",
        "Where every sequence answers alike an interval has no width: with few sequences that is little evidence. Methods made for prefill alone "
        "decode densely, at a density of 1. Intervals over text of a single document are over its windows.",
        *(f"Left out: {name} ({why})." for name, why in left_out.items()),
    ]
    names = in_order(short(c.method) for c in lines)
    title = f"Sparse attention: {', '.join(names) if len(names) <= TITLED else f'{len(names)} methods'}"
    made = page(title, model, text, request.data, units, screen, notes=notes)
    return made | {"costs": _costs(lines), "tables": tables(lines), "grids": grids}


def _costs(lines: Lines) -> list[dict[str, Any]]:
    """What mqar and text cost at their greatest length; of many methods at the middle budget alone, and by what they keep there."""
    longest = {task: max(c.length for c in lines if c.task == task) for task in ("mqar", "text") if any(c.task == task for c in lines)}
    longest = longest or {next(iter(lines)).task: max(c.length for c in lines)}
    found = [(c, p) for c, p in lines.items() if longest.get(c.task) == c.length and p.cost]
    if len(found) > LISTED:
        found = [(c, p) for c, p in found if c.budget in (middle(lines), 1.0)]
    return [
        {"what": f"{c.method} at {p.density:.2f}, {c.phase} of {c.task} at {c.length}", **{k: v for k, v in p.cost.items() if "peak" not in k}}
        for c, p in found
    ]
