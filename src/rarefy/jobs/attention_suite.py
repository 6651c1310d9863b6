"""`rarefy sweep METHODS MODEL --suite attention`: method x budget x phase x task x length, each a line that a killed run does not lose.

The recall tasks are sat by the small model that ships for them, whose dense accuracy is near 1, so that what a method loses is
the method's; text and induction are sat by the model under test; averaging by attention alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..builtin.corpus import Batch
from ..builtin.model import RECALL_LENGTHS, recall_model
from ..catalogue import FAMILY_OF_UNIT, Entry
from ..errors import BadInput, RarefyError
from ..families import config_of
from ..frontier import Point
from ..method import positive
from ..store.lines import append_line, read_lines
from ..tasks.averaging import Averaging
from .attention_suite_findings import kept_lines, merit, middle, statements, telling, untelling, winners
from .attention_suite_methods import Candidates, card_of, check_settings_of, check_usable, has_budget
from .attention_suite_page import suite_page
from .attention_suite_picture import pictures
from .attention_suite_run import PHASES, Reference, sit, sit_averaging
from .attention_suite_tasks import (
    LEAST_LENGTH,
    RECALL,
    TASKS,
    Sitting,
    averaging_instance,
    check_tasks,
    induction_sitting,
    recall_sitting,
    text_sitting,
)
from .build import check_budget
from .folder import refuse_early, run_folder
from .models import Opened, check_context, digest, opened, read_documents, read_text
from .report import write_report
from .request import Request
from .screen import Screen
from .sweep import role_of

RESULTS = "points.jsonl"
COMMAND = "sweep --suite attention"
MAY_GROW = ("request.methods", "request.budgets", "request.tasks", "request.phases", "request.lengths")


@dataclass
class AttentionRequest(Request):
    """Everything the suite was asked for."""

    methods: list[str]
    model: str
    budgets: list[float]
    out: Path
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    phases: list[str] = field(default_factory=lambda: list(PHASES))
    lengths: list[int] = field(default_factory=lambda: [256, 512])
    sequences: int = 16
    data: str = "stdlib"
    tokens: int = 8192
    settings: dict[str, Any] = field(default_factory=dict)

    def check(self) -> dict[str, Entry]:
        """Cards of the methods. Raises BadInput for whatever can be seen to be wrong without a model or data."""
        if not self.methods:
            raise BadInput("no method named; `rarefy methods` lists them")
        cards = [card_of(name) for name in self.methods]
        for one in cards:
            check_usable(one)
        check_settings_of(cards, self.settings)
        if not self.phases:
            raise BadInput(f"no phase named; there are {', '.join(PHASES)}")
        for named in (self.methods, self.budgets, self.tasks, self.phases, self.lengths):
            if twice := [one for i, one in enumerate(named) if one in named[:i]]:
                raise BadInput(f"{twice[0]} is named twice; name each method, budget, task, phase and length once")
        if not self.budgets:
            raise BadInput("no budget named; give fractions of keys kept, such as 0.1,0.3")
        for budget in self.budgets:
            check_budget(budget)
        for phase in self.phases:
            if phase not in PHASES:
                raise BadInput(f"no phase {phase!r}; there are {', '.join(PHASES)}")
        check_tasks(self.tasks, self.lengths)
        if positive("sequences", self.sequences) < 2:
            raise BadInput("sequences=1 gives no interval, by which alone a task counts as kept; take 2 or more")
        check_context(max(self.lengths), tokens=self.tokens)
        found = {one.name: one for one in cards}
        if not any(True for _ in _cells(self, found)):
            raise BadInput(f"{cards[0].name} is a cache's policy, at work in a model's decoding alone: name phase decode and a task but averaging")
        return found


@dataclass(frozen=True)
class Cell:
    """What one line is of."""

    method: str
    budget: float
    phase: str
    task: str
    length: int

    @classmethod
    def of(cls, record: dict[str, Any]) -> Cell:
        """The cell of a line."""
        return cls(record["method"], round(record["budget"], 6), record["phase"], record["task"], record["length"])


@dataclass
class AttentionResult:
    """Every line of the suite."""

    lines: dict[Cell, Point]
    verdict: str
    left_out: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        points = [{"phase": c.phase, "task": c.task, "length": c.length, **p.as_json()} for c, p in self.lines.items()]
        return {
            "schema": 1, "verdict": self.verdict, "points": points, "left_out": self.left_out, "kept": kept_lines(telling(self.lines)),
            "best": winners(telling(self.lines)),
        }

    def show(self, out: Path) -> None:
        """Print the tables."""
        screen, lines = Screen(), telling(self.lines)
        if lines:
            head = ["task", "phase", "length", "budget", "method", "score"]
            screen.table("best method by task and length, with at most that share of the keys", head, winners(lines))
            head = ["method", "phase", "all tasks from", "worst task", "its loss", "mean loss", "density"]
            title = f"least density that loses under 5 points of each task, and the worst task with {middle(lines):.0%} of the keys"
            screen.table(title, head, kept_lines(lines))
        for name, why in self.left_out.items():
            screen.say(f"left out: {name} ({why})")
        screen.say(self.verdict)
        screen.say(f"rarefy show {out}")


class Sittings:
    """Sittings made when first asked for, each with the dense model's answers on it."""

    def __init__(self, request: AttentionRequest, model: Opened, docs: Sequence[Any]) -> None:
        self.request, self.model, self.docs = request, model, docs
        self._held: dict[tuple[str, int], Reference | Averaging] = {}
        self._recallers: dict[int, Any] = {}

    def recaller(self, length: int) -> Any:
        """The recall model fit for sequences of `length` tokens."""
        fit = next((n for n in RECALL_LENGTHS if length <= n), RECALL_LENGTHS[-1])
        if fit not in self._recallers:
            self._recallers[fit] = recall_model(fit)
        return self._recallers[fit]

    @property
    def longest(self) -> int:
        """Tokens the model under test was built for."""
        return getattr(config_of(self.model.model), "max_position_embeddings", None) or 1 << 30

    def of(self, task: str, length: int) -> Reference | Averaging:
        """The reference of a sitting, or an instance of averaging."""
        if (task, length) not in self._held:
            self._held[task, length] = self._make(task, length)
        return self._held[task, length]

    def _make(self, task: str, length: int) -> Reference | Averaging:
        if task == "averaging":
            return averaging_instance(length, self.request.sequences)
        return Reference(self.sitting(task, length))

    def sitting(self, task: str, length: int) -> Sitting:
        """A task at a length. Raises BadInput where the model or the text is too short for it."""
        if task in RECALL:
            return recall_sitting(task, length, self.request.sequences, self.recaller(length))
        if length > self.longest:
            raise BadInput(f"length={length} is more than the {self.longest} tokens the model was built for")
        if task == "induction":
            return induction_sitting(length, self.request.sequences, self.model.model, config_of(self.model.model).vocab_size)
        return text_sitting(self.text(length), self.model.model)

    def text(self, length: int) -> list[Batch]:
        """Held-out text in windows of `length`."""
        return read_text(self.docs, self.model, context=length, fit_tokens=length, judge_tokens=max(self.request.tokens, 2 * length)).judge


def attention_suite(request: AttentionRequest, *, screen: Screen) -> AttentionResult:
    """Do it; lines already in the folder are kept, also where more methods, budgets, tasks, phases or lengths are asked for now."""
    cards = request.check()
    refuse_early(request.out, COMMAND, request.record(), MAY_GROW)
    docs = read_documents(request.data, screen)
    model = opened(request.model, screen, causal=True)
    sittings = Sittings(request, model, docs)
    too_long = _too_long(request, sittings.longest, model.info.name)
    context = min(LEAST_LENGTH, sittings.longest)              # of no length asked for, so that shorter ones may be added to a run
    text = read_text(docs, model, context=context, fit_tokens=context, judge_tokens=request.tokens)
    made = {"command": COMMAND, "request": request.record(), "model": model.card(), "text": digest(text.judge)}
    with run_folder(request.out, made, MAY_GROW):
        path = request.out / RESULTS
        lines = _read(path)
        left_out = too_long | _no_place(request, cards)
        candidates = Candidates(request.settings)
        todo = [cell for cell in _cells(request, cards) if cell not in lines and f"{cell.task} at {cell.length}" not in too_long]
        with screen.stage(f"measure {len(cards)} methods at {len(request.budgets)} budgets") as update:
            for at, cell in enumerate(todo):
                update(f"{at + 1} of {len(todo)}: {cell.method} {cell.budget:g}, {cell.phase} of {cell.task} at {cell.length}")
                try:
                    point = _measure(cards[cell.method], cell, sittings, candidates)
                except RarefyError as error:                # a model or task that this method cannot serve: said, and the others go on
                    left_out[f"{cell.method}, {cell.phase} of {cell.task} at {cell.length}"] = str(error)
                    continue
                lines[cell] = point
                append_line(path, {"phase": cell.phase, "task": cell.task, "length": cell.length, **point.as_json()})
        if not lines:
            raise BadInput(f"nothing could be measured: {next(iter(left_out.values()), 'no cell')}")
        verdict, left_out = statements(telling(lines)), left_out | untelling(lines)
        with screen.stage("draw what heads keep"):
            grids = pictures({name: cards[name] for name in merit(lines) if name in cards}, request, sittings)
        write_report(request.out, suite_page(lines, verdict, left_out, grids, request, model, text, screen))
        return AttentionResult(lines, verdict, left_out)


def _too_long(request: AttentionRequest, longest: int, name: str) -> dict[str, str]:
    """Tasks of the model under test at lengths that it was not built for, to be left out. BadInput where a task has no other length."""
    own = [task for task in ("induction", "text") if task in request.tasks]
    if own and min(request.lengths) > longest:
        raise BadInput(f"length={min(request.lengths)} is more than the {longest} tokens that {name} was built for; leave it or {own[0]} out")
    return {f"{task} at {n}": f"{name} was built for {longest} tokens" for task in own for n in request.lengths if n > longest}


def _no_place(request: AttentionRequest, cards: dict[str, Entry]) -> dict[str, str]:
    """Parts of the run that policies have no place in."""
    out = {}
    for one in cards.values():
        if one.kind == "cache":
            out |= {f"{one.name}, prefill": "a cache's policy is at work in decoding alone"} if "prefill" in request.phases else {}
            out |= {f"{one.name}, averaging": "it lives in a model's cache, and averaging has no model"} if "averaging" in request.tasks else {}
    return out


def _cells(request: AttentionRequest, cards: dict[str, Entry]) -> Iterator[Cell]:
    """Tasks outermost, so that a run cut short has whole tasks. What has no budget is measured once, a cache's policy in decoding alone."""
    for task in request.tasks:
        for length in request.lengths:
            for name, one in cards.items():
                for budget in request.budgets if has_budget(one) else [1.0]:
                    for phase in request.phases:
                        if one.kind != "cache" or (phase == "decode" and task != "averaging"):
                            yield Cell(name, round(budget, 6), phase, task, length)


def _measure(one: Entry, cell: Cell, sittings: Sittings, candidates: Candidates) -> Point:
    asked = sittings.of(cell.task, cell.length)
    if isinstance(asked, Averaging):
        method = candidates.of(one, cell.budget, averaging=asked)
        metrics, kept, cost = sit_averaging(asked, cell.phase, method.methods[0])
    else:
        candidate = candidates.of(one, cell.budget, sitting=asked.sitting)
        metrics, kept, cost = sit(asked, cell.phase, candidate)
    return Point(cell.method, one.unit if FAMILY_OF_UNIT.get(one.unit) == "attention" else "key", role_of(one), cell.budget, kept, metrics, cost)


def _read(path: Path) -> dict[Cell, Point]:
    out = {}
    for record in read_lines(path) if path.exists() else []:
        point = Point.from_json({k: v for k, v in record.items() if k not in ("phase", "task", "length")})
        out[Cell.of(record)] = point
    return out
