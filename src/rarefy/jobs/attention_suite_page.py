"""From lines of the attention suite to what can be said: least density kept, worst task, best method by length, and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..builtin.corpus import Text
from ..frontier import Point
from .attention_suite_tasks import QUESTIONS
from .models import Opened
from .report import page, unit_panel
from .screen import Screen

if TYPE_CHECKING:
    from .attention_suite import AttentionRequest, Cell

MARGIN = 0.05
"""A task is kept where the upper end of its loss's 95 % interval lies below this; scores are shares, so 5 points."""
TIE = 0.01
"""Scores nearer than this to the best are called equal."""

Lines = Mapping["Cell", Point]


def is_kept(point: Point) -> bool:
    """Whether the loss is below MARGIN with its interval."""
    return max(point.metrics["loss"].high, point.metrics["loss"].mean) < MARGIN


def least_kept(lines: Lines, method: str, phase: str, task: str, length: int) -> float | None:
    """Least measured density from which on, up to the largest measured, a task is kept; None if it is not at the largest."""
    mine = sorted(
        (p.density, is_kept(p)) for c, p in lines.items() if (c.method, c.phase, c.task, c.length) == (method, phase, task, length)
    )
    found = None
    for density, kept in reversed(mine):
        if not kept:
            break
        found = density
    return found


def _in_order(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))


def _figure(value: float) -> str:
    """Two digits, and no minus before a zero."""
    return f"{round(value, 2) + 0.0:.2f}"


def _said(density: float | None) -> str:
    """A least density; where no budget measured is enough, that of the dense model."""
    return "1.00" if density is None else f"{density:.2f}"


def kept_table(lines: Lines) -> tuple[list[str], list[list[str]]]:
    """(head, rows): of each method and phase the least density that keeps each task, at the longest length of that task."""
    longest = {task: max(c.length for c in lines if c.task == task) for task in _in_order(c.task for c in lines)}
    rows = []
    for method, phase in _in_order((c.method, c.phase) for c in lines):
        there = {c.task for c in lines if (c.method, c.phase, c.length) == (method, phase, longest[c.task])}
        rows.append([method, phase, *(_said(least_kept(lines, method, phase, t, n)) if t in there else "–" for t, n in longest.items())])
    most = max(longest.values())
    return ["method", "phase", *(t if n == most else f"{t} at {n}" for t, n in longest.items())], rows


def worst(lines: Lines, method: str, phase: str, budget: float, length: int) -> tuple[str, float, float] | None:
    """(worst task, its loss, the mean loss over tasks) of a method at one budget; None where nothing was measured."""
    losses = {c.task: p.metrics["loss"].mean for c, p in lines.items() if (c.method, c.phase, c.budget, c.length) == (method, phase, budget, length)}
    if not losses:
        return None
    task = max(losses, key=lambda t: losses[t])
    return task, losses[task], sum(losses.values()) / len(losses)


def kept_lines(lines: Lines) -> list[list[str]]:
    """Rows of [method, phase, least density that keeps all tasks, worst task at the least budget, its loss, mean loss there]."""
    longest, rows = max(c.length for c in lines), []
    for method, phase in _in_order((c.method, c.phase) for c in lines):
        tasks = _in_order(c.task for c in lines if (c.method, c.phase, c.length) == (method, phase, longest))
        each = [least_kept(lines, method, phase, t, longest) for t in tasks]
        least = min(c.budget for c in lines if (c.method, c.phase) == (method, phase))
        found = worst(lines, method, phase, least, longest)
        if found:
            every = _said(None if None in each else max(d for d in each if d is not None))
            rows.append([method, phase, every, found[0], _figure(found[1]), _figure(found[2])])
    return rows


def winners(lines: Lines) -> list[list[str]]:
    """Rows of [task, phase, length, budget, best method, its score] at each budget.

    What has no budget (patterns) stands among a budget's methods where it keeps at most a tenth more than that.
    """
    rows = []
    for task, phase, length in _in_order((c.task, c.phase, c.length) for c in lines):
        here = {c: p for c, p in lines.items() if (c.task, c.phase, c.length) == (task, phase, length)}
        for budget in sorted({c.budget for c in here}):
            level: dict[str, float] = {}
            for c, p in here.items():
                if c.budget == budget or (p.density <= 1.1 * budget and c.budget == 1):
                    level[c.method] = p.metrics["score"].mean
            top = max(level.values())
            best = [m for m, score in level.items() if score >= top - TIE]
            name = best[0] if len(best) == 1 else f"{len(best)} alike" if len(best) > 3 else " = ".join(m.partition("/")[2] for m in best)
            rows.append([task, phase, str(length), f"{budget:g}", name, f"{top:.2f}"])
    return rows


def by_length(lines: Lines) -> tuple[list[str], list[list[str]]]:
    """(head, rows): of each method, phase and task the least density that keeps it, length by length; those measured at one length are left out."""
    lengths, rows = sorted({c.length for c in lines}), []
    for method, phase, task in _in_order((c.method, c.phase, c.task) for c in lines):
        there = {c.length for c in lines if (c.method, c.phase, c.task) == (method, phase, task)}
        if len(there) > 1:
            said = [_said(least_kept(lines, method, phase, task, n)) if n in there else "–" for n in lengths]
            rows.append([method, phase, task, *said])
    return ["method", "phase", "task", *(f"{n} tokens" for n in lengths)], rows


def with_length(lines: Lines) -> str:
    """Whether a longer context tolerates more sparsity: how often the least density that keeps a task falls, from the shortest length to the longest.

    Only densities met at both ends count: a task that no budget keeps at either says nothing.
    """
    falls, rises, level = [], [], 0
    for method, phase, task in _in_order((c.method, c.phase, c.task) for c in lines if lines[c].role == "method"):
        there = sorted({c.length for c in lines if (c.method, c.phase, c.task) == (method, phase, task)})
        if len(there) < 2:
            continue
        short, long = (least_kept(lines, method, phase, task, n) or 1.0 for n in (there[0], there[-1]))
        if short == long == 1:
            continue
        if abs(long - short) <= 0.1 * short:
            level += 1
        else:
            (falls if long < short else rises).append(f"{method} in {phase} of {task}: {short:.2f} at {there[0]} tokens, {long:.2f} at {there[-1]}")
    if not falls and not rises and not level:
        return ""
    said = "From the shortest length to the longest the least density that keeps a task "
    said += f"falls in {len(falls)} cases, rises in {len(rises)} and stays in {level}"
    return f"{said} ({'; '.join([*falls[:1], *rises[:1]])})." if falls or rises else f"{said}."


def statements(lines: Lines) -> str:
    """In the spirit of The Sparse Frontier (Nawrot et al. 2025): how sparse each phase may be, and what the mean over tasks hides."""
    said, longest = [], max(c.length for c in lines)
    methods = _in_order(c.method for c in lines if lines[c].role == "method") or _in_order(c.method for c in lines)
    for phase in _in_order(c.phase for c in lines):
        whole = {}
        for method in methods:
            tasks = _in_order(c.task for c in lines if (c.method, c.phase, c.length) == (method, phase, longest))
            each = [least_kept(lines, method, phase, t, longest) for t in tasks]
            if tasks and None not in each:
                whole[method] = max(d for d in each if d is not None)
        if whole:
            best = min(whole, key=lambda m: whole[m])
            said.append(f"In {phase}, {best} keeps every task within {MARGIN:.0%} from a density of {whole[best]:.2f} on.")
        else:
            said.append(f"In {phase}, no method measured here keeps every task within {MARGIN:.0%} at any of its budgets.")
    gaps = []
    for c in lines:
        found = worst(lines, c.method, c.phase, c.budget, longest)
        if found and c.method in methods:
            gaps.append((found[1] - found[2], c.method, c.phase, c.budget, found))
    if gaps:
        _, method, phase, budget, (task, most, mean) = max(gaps, key=lambda g: g[0])
        said.append(f"The mean hides most for {method} at budget {budget:g} in {phase}: it loses {mean:.0%} on average and {most:.0%} of {task}.")
    return " ".join(part for part in (*said, with_length(lines)) if part)


def panels(lines: Lines) -> list[dict[str, Any]]:
    """A frontier a task and phase, at the longest length it was measured at."""
    out = []
    for task, phase in _in_order((c.task, c.phase) for c in lines):
        length = max(c.length for c in lines if (c.task, c.phase) == (task, phase))
        mine = [p for c, p in lines.items() if (c.task, c.phase, c.length) == (task, phase, length)]
        dense = Point("dense", "key", "dense", 1.0, 1.0, {"score": mine[0].metrics["dense_score"]})
        said = _panel_said(mine, dense)
        panel = unit_panel("attention", [dense, *mine], said, y=("score", "score", "high"))
        for point in panel["points"]:
            point["metrics"].pop("dense_score", None)
        out.append(panel | {"title": f"{task}, {phase}", "question": f"{QUESTIONS[task]} {length} tokens, {phase}.", "headline": said})
    return out


def _panel_said(points: Sequence[Point], dense: Point) -> str:
    budget = min(p.budget for p in points)
    row = sorted((p for p in points if p.budget == budget), key=lambda p: -p.metrics["score"].mean)
    first = row[0]
    more = f", {row[1].method} {row[1].metrics['score'].mean:.2f}" if len(row) > 1 else ""
    best, full = first.metrics["score"].mean, dense.metrics["score"].mean
    return f"With {first.density:.0%} of the keys {first.method} scores {best:.2f}{more}; dense {full:.2f}."


def tables(lines: Lines) -> list[dict[str, Any]]:
    """What the page shows as tables."""
    head, rows = kept_table(lines)
    worst_head = ["method", "phase", "all tasks kept from", "worst task at its least budget", "its loss", "mean loss"]
    note = f"Least density from which on a task stays within {MARGIN:.0%} of dense, by the upper end of its interval; 1.00: only dense does."
    return [
        {"title": "How sparse is still good", "note": note, "head": head, "rows": rows},
        {"title": "The worst task, not only the mean", "note": "", "head": worst_head, "rows": kept_lines(lines)},
        *_length_tables(lines, note),
    ]


def _length_tables(lines: Lines, note: str) -> list[dict[str, Any]]:
    table = winners(lines)
    lengths = sorted({int(r[2]) for r in table})
    rows = [
        [task, phase, budget, *(next((f"{r[4]} {r[5]}" for r in table if r[:4] == [task, phase, str(n), budget]), "–") for n in lengths)]
        for task, phase, budget in _in_order((r[0], r[1], r[3]) for r in table)
    ]
    made = [{"title": "Which method wins at which length", "note": f"Best score at each budget; methods within {TIE:.0%} of the best are alike.",
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
    units[0]["verdict"] = f"{verdict} {units[0]['verdict']}"
    costs = [
        {"what": f"{c.method} at {c.budget:g}, {c.phase} of {c.task} at {c.length}", **{k: v for k, v in p.cost.items() if "peak" not in k}}
        for c, p in lines.items() if c.length == max(request.lengths) and c.task in ("mqar", "text") and p.cost
    ]
    notes = [
        "mqar, needle, needles, variables and turns are sat by the small recall models that ship with rarefy, one for up to 512 tokens and one for "
        "up to 8,192, text and induction by the model named above, averaging by attention alone, with queries and keys in closed form.",
        "Prefill: the whole sequence in one pass with the method in every layer. Decode: the context dense, the rest one token at a time with the "
        "method (or the cache's policy) in every layer; at most 64 tokens a sequence.",
        "Score: share of right answers; of text the dense perplexity over the method's; of averaging the share of the answer explained. Intervals "
        "are 95 % over sequences or documents; losses are paired within them.",
        "Density is measured: pairs of query and key kept, of those seen. FLOPs and bytes are counted a query in the layers served, choosing "
        "included; of a cache's policy, bytes are those held at the end. ms is the whole model a sequence, the dense model timed in turn with it.",
        *(f"Left out: {name} ({why})." for name, why in left_out.items()),
    ]
    title = f"Sparse attention: {', '.join(dict.fromkeys(c.method.partition('/')[2] for c in lines))}"
    made = page(title, model, text, request.data, units, screen, notes=notes)
    return made | {"costs": costs, "tables": tables(lines), "grids": grids}
