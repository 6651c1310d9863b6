"""`rarefy judge --suite planted|phase METHODS`: dictionaries on ground truth, many in one pass, each paper's kind of data beside the others.

A cell is one planted dictionary with its rows. In a cell all methods and seeds are trained in one pass over the same rows, at
one L0, judged on held-out rows, and written as lines that a killed run does not lose; a pass that was cut off goes on from its
checkpoint. Seeds differ in the methods' initialisation alone, so that what they share can be counted.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from ..catalogue import Entry
from ..errors import BadInput
from ..fit import Recipe, train
from ..method import Sparse, positive
from ..store.lines import append_line, read_lines
from ..streams import TensorStream
from ..tasks.learned import decoder_of, read
from ..tasks.planted import check_sizes
from ..tasks.planted_kinds import KINDS, Truth, plant
from .build import check_names, check_settings
from .folder import refuse_early, run_folder
from .request import Request
from .screen import Screen
from .suite_measures import fixed, measures, shared
from .suite_plan import Search, build, knob, usable
from .suite_result import SuiteResult, write_pictures

RESULTS, PENALTIES, TRAINING = "results.jsonl", "penalties.jsonl", "training"
MAY_GROW = ("request.methods", "request.kinds")
BASELINES = ("truth", "pca", "neurons", "latents/random")
"""Rows beside the methods asked for: the planted codes themselves, and what must be beaten."""
GRID = {"l0": (1.0, 2.0, 4.0, 8.0), "ratio": (1, 2, 4, 8)}
"""Of the phase diagram: codes a row, and features over d."""


@dataclass(frozen=True)
class Cell:
    """One planted dictionary and its rows."""

    kind: str
    features: int
    l0: float

    @property
    def name(self) -> str:
        """What results are kept under."""
        return f"{self.kind}-{self.features}-{self.l0:g}"


@dataclass
class SuiteRequest(Request):
    """Everything that was asked for; kept in the run."""

    methods: list[str]
    out: Path
    suite: str = "planted"
    """planted: every kind at one size. phase: independent features at a grid of L0 and features / d."""
    kinds: list[str] = field(default_factory=list)
    """Empty means all."""
    seeds: int = 3
    seed: int = 0
    """Of the planted dictionaries, their rows and the order of rows."""
    d: int = 32
    features: int = 64
    width: int = 0
    """0: as many latents as features."""
    l0: float = 4.0
    steps: int = 1500
    batch: int = 256
    rows: int = 40_000
    judged: int = 8192
    lr: float = 0.01
    settings: dict[str, Any] = field(default_factory=dict)

    def cells(self) -> list[Cell]:
        """What is to be judged, in order."""
        if self.suite == "planted":
            return [Cell(kind, self.features, self.l0) for kind in self.kinds or KINDS]
        sizes = [(ratio * self.d, l0) for ratio in GRID["ratio"] for l0 in GRID["l0"]]
        return [Cell(kind, features, l0) for kind in self.kinds or ["independent"] for features, l0 in sizes if l0 <= features]

    def check(self) -> list[Entry]:
        """Cards of the methods. Raises BadInput for whatever can be seen to be wrong before anything is trained."""
        cards = check_names(self.methods)
        for card in cards:
            usable(card)
        check_settings(cards, self.settings)
        if self.suite not in ("planted", "phase"):
            raise BadInput(f"no suite {self.suite!r}; there are planted, phase, othello and, for runs, latents")
        for kind in self.kinds:
            if kind not in KINDS or self.kinds.count(kind) > 1:
                raise BadInput(f"kinds: {kind!r} is {'named twice' if kind in KINDS else 'no kind'}; there are {', '.join(KINDS)}")
        for name in ("seeds", "batch", "judged"):
            positive(name, getattr(self, name))
        positive("rows", self.rows)
        if self.batch > self.rows:
            raise BadInput(f"batch={self.batch} must be at most rows={self.rows}")
        if self.width:
            positive("width", self.width)
        self.recipe().check()
        for cell in self.cells():
            check_sizes(self.rows, self.d, cell.features, cell.l0, 0.0)
            plant(cell.kind, 1, self.d, cell.features, cell.l0)
            for card in cards:
                decoder_of(self.make(card, self.settings, 0, cell), self.d)
        return cards

    def recipe(self) -> Recipe:
        """How dictionaries are trained."""
        return Recipe(steps=self.steps, lr=self.lr, save_every=max(1, self.steps // 4), log_every=max(1, self.steps // 20))

    def make(self, card: Entry, settings: dict[str, Any], seed: int, cell: Cell) -> Sparse:
        """A dictionary for a cell, at its L0."""
        k = max(1, round(cell.l0))
        return build(card, settings, d=self.d, width=self.width or cell.features, k=k, seed=seed, steps=self.steps, batch=self.batch)


def suite(request: SuiteRequest, *, screen: Screen) -> SuiteResult:
    """Do it; lines already in the folder are kept, also where more methods or kinds are asked for now."""
    cards = request.check()
    refuse_early(request.out, "suite", request.record(), MAY_GROW)
    made = {"command": "suite", "request": request.record()}
    with run_folder(request.out, made, MAY_GROW):
        for cell in request.cells():
            with screen.stage(cell.name) as update:
                _Bench(request, cell, update).run(cards)
        shutil.rmtree(request.out / TRAINING, ignore_errors=True)
        result = SuiteResult(request.suite, request.methods, request.cells(), _lines(request.out / RESULTS))
        write_pictures(request.out, result)
        return result


def _lines(path: Path) -> list[dict[str, Any]]:
    return read_lines(path) if path.exists() else []


class _Bench:
    """One cell: its rows, and what is already known of it."""

    def __init__(self, request: SuiteRequest, cell: Cell, update: Callable[[str], None]) -> None:
        self.request, self.cell, self.update = request, cell, update
        self.results = request.out / RESULTS
        self.known = {r["method"] for r in _lines(self.results) if r["cell"] == cell.name}

    def run(self, cards: list[Entry]) -> None:
        """Train and judge what is missing."""
        wanted = [card for card in cards if card.name not in self.known]
        missing = [name for name in BASELINES if name not in self.known]
        if not wanted and not missing:
            return
        request, cell = self.request, self.cell
        whole = plant(cell.kind, request.rows + request.judged, request.d, cell.features, cell.l0, seed=request.seed)
        self.x_train, self.truth = whole.x[: request.rows], whole.rows(request.rows, len(whole.x))
        self.stream = TensorStream(self.x_train, request.batch, seed=request.seed)
        for name in missing:
            self._baseline(name)
        if wanted:
            self._train(wanted)

    def _keep(self, method: str, read_by_seed: list[Any], arguments: list[dict[str, Any]]) -> None:
        """One line with every seed, so that a method is there whole or not at all."""
        signed = KINDS[self.cell.kind].signed
        found = [measures(learned, self.truth, signed=signed) for learned in read_by_seed]
        for values, share in zip(found, shared(read_by_seed), strict=False):
            values["shared"] = share
        append_line(self.results, {"cell": self.cell.name, **asdict(self.cell), "method": method, "seeds": found, "arguments": arguments})

    def _baseline(self, name: str) -> None:
        truth: Truth = self.truth
        k = max(1, round(self.cell.l0))
        if name != "latents/random":
            self._keep(name, [fixed(name, self.x_train, truth, k)], [{}])
            return
        from ..latents.random import RandomDictionary

        made = [RandomDictionary(self.request.d, self.request.width or self.cell.features, k=k, seed=s).eval() for s in range(self.request.seeds)]
        for method in made:
            method.initialise(self.x_train)
        self._keep(name, [read(method, truth.x) for method in made], [m.arguments for m in made])

    def _train(self, cards: list[Entry]) -> None:
        settings = {card.name: dict(self.request.settings) for card in cards}
        for name, (argument, value) in self._penalties(cards).items():
            settings[name][argument] = value
        plan = {
            f"{card.name}@{seed}": self.request.make(card, settings[card.name], seed, self.cell)
            for card in cards for seed in range(self.request.seeds)
        }
        self._pass(plan, "seeds")
        for card in cards:
            made = [plan[f"{card.name}@{seed}"] for seed in range(self.request.seeds)]
            self._keep(card.name, [read(m, self.truth.x) for m in made], [m.arguments for m in made])

    def _pass(self, plan: dict[str, Sparse], what: str) -> None:
        def on_log(record: dict[str, Any]) -> None:
            self.update(f"{what}: {len(plan)} dictionaries, step {record['step']}/{self.request.steps}")

        name = xxhash.xxh3_64_hexdigest("\n".join(f"{key} {m.arguments}" for key, m in plan.items()).encode())
        train(plan, self.stream, self.request.recipe(), self.request.out / TRAINING / f"{self.cell.name}-{name}", on_log=on_log)

    def _penalties(self, cards: list[Entry]) -> dict[str, tuple[str, float]]:
        """Name of each method that has a penalty -> (argument, value) that gives the cell's L0."""
        path = self.request.out / PENALTIES
        found = {r["method"]: (r["argument"], r["value"]) for r in _lines(path) if r["cell"] == self.cell.name}
        searched = [card for card in cards if knob(card, self.request.settings) and card.name not in found]
        if searched:
            search = Search(lambda card, own, seed: self.request.make(card, own, seed, self.cell), self._pass, self.truth.x, self.cell.l0)
            for name, (argument, value, l0) in search.run(searched, self.request.settings).items():
                append_line(path, {"cell": self.cell.name, "method": name, "argument": argument, "value": value, "l0": l0})
                found[name] = argument, value
        return {card.name: found[card.name] for card in cards if card.name in found}
