"""From lines of the attention suite to what can be said: least density kept, worst task, best method by length, and sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

from ..frontier import Point

if TYPE_CHECKING:
    from .attention_suite import Cell

MARGIN = 0.05
"""A task is kept where the upper end of its loss's 95 % interval lies below this; scores are shares, so 5 points."""
TIE = 0.01
"""Scores nearer than this to the best are called equal."""
OVER = 1.1
"""What keeps at most this times a budget counts as within it: methods rarely hit a budget to the digit."""
NAMED = 3
"""Most methods named where several are alike."""

Lines = Mapping["Cell", Point]
T = TypeVar("T")


def in_order(values: Iterable[T]) -> list[T]:
    """Without repeats, as first met."""
    return list(dict.fromkeys(values))


def short(name: str) -> str:
    """A method's name where space is scarce."""
    return name.removeprefix("attention/")


def figure(value: float) -> str:
    """Two digits, and no minus before a zero."""
    return f"{round(value, 2) + 0.0:.2f}"


def telling(lines: Lines) -> Lines:
    """The lines of tasks that the dense model does: where it scores less than twice MARGIN, nothing can be lost, and all would count as kept."""
    return {c: p for c, p in lines.items() if p.metrics["dense_score"].mean >= 2 * MARGIN}


def untelling(lines: Lines) -> dict[str, str]:
    """"task at length" -> why it says nothing, of the lines that `telling` leaves out."""
    said, told = {}, telling(lines)
    for c, p in lines.items():
        if c not in told:
            score = p.metrics["dense_score"].mean
            said.setdefault(f"{c.task} at {c.length}, from the findings", f"the dense model scores {score:.2f}, so there is nothing to lose")
    return said


def levels(lines: Lines) -> list[float]:
    """Budgets that were asked for, without 1, which is dense; [1.0] where nothing has a budget."""
    return sorted({c.budget for c in lines if c.budget < 1}) or [1.0]


def middle(lines: Lines) -> float:
    """The budget at which methods are compared where one has to do."""
    found = levels(lines)
    return found[len(found) // 2]


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


def said(density: float | None) -> str:
    """A least density; where no budget measured is enough, that of the dense model."""
    return "1.00" if density is None else f"{density:.2f}"


def kept_table(lines: Lines) -> tuple[list[str], list[list[str]]]:
    """(head, rows): of each method and phase the least density that keeps each task, at the longest length of that task; the best first."""
    longest = {task: max(c.length for c in lines if c.task == task) for task in in_order(c.task for c in lines)}
    ranked = []
    for method, phase in in_order((c.method, c.phase) for c in lines):
        there = {c.task for c in lines if (c.method, c.phase, c.length) == (method, phase, longest[c.task])}
        if there:
            each = {t: least_kept(lines, method, phase, t, n) for t, n in longest.items() if t in there}
            rank = sum(1.0 if d is None else d for d in each.values()) / len(each)
            ranked.append((phase, rank, [method, phase, *(said(each[t]) if t in there else "–" for t in longest)]))
    phases, most = in_order(phase for phase, _, _ in ranked), max(longest.values())
    rows = [row for _, _, row in sorted(ranked, key=lambda r: (phases.index(r[0]), r[1]))]
    return ["method", "phase", *(t if n == most else f"{t} at {n}" for t, n in longest.items())], rows


def within(lines: Lines, method: str, phase: str, task: str, length: int, level: float) -> Point | None:
    """The densest point of a method on a task that keeps no more than a level allows; None where it keeps more at every budget."""
    mine = [p for c, p in lines.items() if (c.method, c.phase, c.task, c.length) == (method, phase, task, length) and p.density <= OVER * level]
    return max(mine, key=lambda p: p.density, default=None)


def worst(lines: Lines, method: str, phase: str, level: float, length: int) -> tuple[str, float, float, float] | None:
    """(worst task, its loss, mean loss over tasks, mean density) of a method that keeps at most `level`; None if on some task it keeps more."""
    tasks = in_order(c.task for c in lines if (c.method, c.phase, c.length) == (method, phase, length))
    points = {task: within(lines, method, phase, task, length, level) for task in tasks}
    there = {task: p for task, p in points.items() if p is not None}
    if not there or len(there) < len(points):
        return None
    losses = {task: p.metrics["loss"].mean for task, p in there.items()}
    task = max(losses, key=lambda t: losses[t])
    return task, losses[task], sum(losses.values()) / len(losses), sum(p.density for p in there.values()) / len(there)


def sat_all(lines: Lines, method: str, phase: str, length: int) -> bool:
    """Whether a method sat every task that any sat; averaging, which has no model, is not asked of cache policies."""
    there = [(c.method, c.task) for c in lines if (c.phase, c.length) == (phase, length)]
    mine = {task for name, task in there if name == method} | ({"averaging"} if method.startswith("cache/") else set())
    return {task for _, task in there} <= mine


def whole(lines: Lines, method: str, phase: str, length: int) -> float | None:
    """Least density that keeps every task measured at a length; None where none does, or some were not sat."""
    if not sat_all(lines, method, phase, length):
        return None
    tasks = in_order(c.task for c in lines if (c.method, c.phase, c.length) == (method, phase, length))
    each = [least_kept(lines, method, phase, t, length) for t in tasks]
    found = [d for d in each if d is not None]
    return max(found) if tasks and len(found) == len(each) else None


def kept_lines(lines: Lines) -> list[list[str]]:
    """Rows of [method, phase, least density that keeps all tasks, worst task at the middle budget, its loss, mean loss, density there].

    Sorted by mean loss; at the end what keeps more than that budget whatever it is told. – stands for all tasks where some were not sat.
    """
    if not lines:
        return []
    longest, level, ranked = max(c.length for c in lines), middle(lines), []
    for method, phase in in_order((c.method, c.phase) for c in lines):
        if not any((c.method, c.phase, c.length) == (method, phase, longest) for c in lines):
            continue
        every = said(whole(lines, method, phase, longest)) if sat_all(lines, method, phase, longest) else "–"
        found = worst(lines, method, phase, level, longest)
        row = [found[0], *(figure(x) for x in found[1:])] if found else ["–"] * 4
        ranked.append((phase, found[2] if found else 2.0, [method, phase, every, *row]))
    phases = in_order(phase for phase, _, _ in ranked)
    return [row for _, _, row in sorted(ranked, key=lambda r: (phases.index(r[0]), r[1]))]


def merit(lines: Lines) -> list[str]:
    """Methods, those that lose least at the middle budget first."""
    order = [row[0] for row in sorted(kept_lines(lines), key=lambda r: float(r[5]) if r[5] != "–" else 2.0)]
    return in_order([*order, *(c.method for c in lines)])


def _alike(names: list[str]) -> str:
    rest = len(names) - NAMED
    return " = ".join(names) if rest <= 1 else f"{' = '.join(names[:NAMED])} and {rest} more"


def winners(lines: Lines) -> list[list[str]]:
    """Rows of [task, phase, length, budget, best method, its score]: the best score with at most that share of the keys, by what was kept.

    Of methods alike the sparsest is named first. A method that keeps more than it was told competes at the budgets that it keeps.
    """
    rows = []
    for task, phase, length in in_order((c.task, c.phase, c.length) for c in lines):
        here = {c: p for c, p in lines.items() if (c.task, c.phase, c.length) == (task, phase, length)}
        for level in levels(lines):
            best: dict[str, Point] = {}
            for c, p in here.items():
                if p.density <= OVER * level and (c.method not in best or p.metrics["score"].mean > best[c.method].metrics["score"].mean):
                    best[c.method] = p
            top = max((p.metrics["score"].mean for p in best.values()), default=0.0)
            alike = sorted((m for m, p in best.items() if p.metrics["score"].mean >= top - TIE), key=lambda m: best[m].density)
            name = alike[0] if len(alike) == 1 else _alike([short(m) for m in alike])
            rows.append([task, phase, str(length), f"{level:g}", name or "–", figure(top) if best else "–"])
    return rows


def by_length(lines: Lines) -> tuple[list[str], list[list[str]]]:
    """(head, rows): of each method, phase and task the least density that keeps it, length by length; those measured at one length are left out."""
    lengths, rows = sorted({c.length for c in lines}), []
    for method, phase, task in in_order((c.method, c.phase, c.task) for c in lines):
        there = {c.length for c in lines if (c.method, c.phase, c.task) == (method, phase, task)}
        if len(there) > 1:
            row = [said(least_kept(lines, method, phase, task, n)) if n in there else "–" for n in lengths]
            rows.append([method, phase, task, *row])
    return ["method", "phase", "task", *(f"{n} tokens" for n in lengths)], rows


def with_length(lines: Lines) -> str:
    """Whether a longer context tolerates more sparsity: how often the least density that keeps a task falls, from the shortest length to the longest.

    Only densities met at both ends count: a task that no budget keeps at either says nothing.
    """
    falls, rises, level = [], [], 0
    for method, phase, task in in_order((c.method, c.phase, c.task) for c in lines if lines[c].role == "method"):
        there = sorted({c.length for c in lines if (c.method, c.phase, c.task) == (method, phase, task)})
        if len(there) < 2:
            continue
        near, far = (least_kept(lines, method, phase, task, n) or 1.0 for n in (there[0], there[-1]))
        if near == far == 1:
            continue
        if abs(far - near) <= 0.1 * near:
            level += 1
        else:
            (falls if far < near else rises).append(f"{method} in {phase} of {task}: {near:.2f} at {there[0]} tokens, {far:.2f} at {there[-1]}")
    if not falls and not rises and not level:
        return ""
    cases = f"{len(falls)} case{'' if len(falls) == 1 else 's'}"
    text = "From the shortest length to the longest the least density that keeps a task "
    text += f"falls in {cases}, rises in {len(rises)} and stays in {level}"
    return f"{text} ({'; '.join([*falls[:1], *rises[:1]])})." if falls or rises else f"{text}."


def statements(lines: Lines) -> str:
    """In the spirit of The Sparse Frontier (Nawrot et al. 2025): how sparse each phase may be, and what the mean over tasks hides."""
    if not lines:
        return "The dense model does none of these tasks, so that nothing can be said of what a method loses."
    text, longest = [], max(c.length for c in lines)
    methods = in_order(c.method for c in lines if lines[c].role == "method") or in_order(c.method for c in lines)
    for phase in in_order(c.phase for c in lines):
        kept = {m: d for m in methods if (d := whole(lines, m, phase, longest)) is not None and d < 0.995}
        if kept:
            first, *more = sorted(kept, key=lambda m: kept[m])
            then = f"; then {', '.join(f'{m} {kept[m]:.2f}' for m in more[:NAMED])}" if more else ""
            text.append(f"In {phase}, {first} keeps every task within {MARGIN:.0%} from a density of {kept[first]:.2f} on{then}.")
        else:
            text.append(f"In {phase}, no method measured here keeps every task within {MARGIN:.0%} at any of its budgets.")
    gaps = [
        (found[1] - found[2], method, phase, found)
        for method, phase in in_order((c.method, c.phase) for c in lines if c.method in methods) for level in levels(lines)
        if (found := worst(lines, method, phase, level, longest))
    ]
    if gaps and max(g[0] for g in gaps) >= MARGIN:
        _, method, phase, (task, most, mean, density) = max(gaps, key=lambda g: g[0])
        loses = f"it loses {mean:.0%} on average and {most:.0%} of {task}"
        text.append(f"The mean hides most for {method} in {phase}: with {density:.0%} of the keys {loses}.")
    return " ".join(part for part in (*text, with_length(lines)) if part)
