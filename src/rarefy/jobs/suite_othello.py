"""`rarefy judge --suite othello METHODS`: what dictionaries hold of the board that a model of Othello keeps in mind, layer by layer.

All methods and seeds of a layer are trained in one pass over its residual stream, on positions of some games, and judged on
positions of others, half of which choose latents and half of which measure them. The linear probe is the skyline; a model whose
weights were never trained shows what the tokens alone give away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..builtin.model import othello_model
from ..catalogue import Entry, entry
from ..errors import BadInput
from ..fit import Recipe, train
from ..latents.random import RandomDictionary
from ..method import Sparse, positive
from ..site import capture
from ..store.lines import append_line, read_lines
from ..streams import TensorStream
from ..tasks.board_state import held_state, probed
from ..tasks.codes import Codes
from ..tasks.geometry import fvu_by
from ..tasks.learned import Learned, read
from ..tasks.othello import Games, games, labels
from .build import check_names, check_settings
from .folder import refuse_early, run_folder
from .request import Request
from .screen import Screen
from .suite_plan import build, knob, usable
from .suite_result import figure, short

RESULTS = "results.jsonl"
MAY_GROW = ("request.methods",)
MEASURES = {
    "coverage": "mean over squares and owners of the F1 of the best latent",
    "board": "F1 of the board that latents of precision 0.95 and more tell, mean over positions",
    "auroc": "mean over squares and owners of the best latent's area under the ROC curve",
    "probe": "balanced accuracy of a linear probe on the activations",
    "fvu": "variance of held-out activations unexplained", "l0": "latents on at a position",
}
JUDGED = 600
"""Games judged on; their first half chooses."""


@dataclass
class OthelloRequest(Request):
    """Everything that was asked for; kept in the run."""

    methods: list[str]
    out: Path
    seeds: int = 1
    games: int = 2000
    width: int = 512
    k: int = 16
    steps: int = 1500
    batch: int = 512
    settings: dict[str, Any] = field(default_factory=dict)

    def check(self) -> list[Entry]:
        """Cards of the methods. Raises BadInput for whatever can be seen to be wrong before anything is trained."""
        cards = check_names(self.methods)
        for card in cards:
            usable(card)
        check_settings(cards, self.settings)
        for name in ("seeds", "games", "width", "batch"):
            positive(name, getattr(self, name))
        positive("k", self.k, self.width)
        if self.batch > self.games:
            raise BadInput(f"batch={self.batch} must be at most games={self.games}, which have about 30 positions each")
        self.recipe().check()
        for card in cards:
            self.make(card, 4, 0)
        return cards

    def recipe(self) -> Recipe:
        """How dictionaries are trained."""
        return Recipe(steps=self.steps, lr=2e-3, save_every=self.steps, log_every=max(1, self.steps // 20))

    def make(self, card: Entry, d: int, seed: int) -> Sparse:
        """A dictionary for a layer."""
        return build(card, self.settings, d=d, width=self.width, k=self.k, seed=seed, steps=self.steps, batch=self.batch)


@dataclass
class OthelloResult:
    """Every line of a suite's folder."""

    methods: list[str]
    lines: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"schema": 1, "suite": "othello", "measures": MEASURES, "lines": self.lines}

    def show(self, out: Path) -> None:
        """Print a table a layer."""
        screen = Screen()
        for layer in dict.fromkeys(line["layer"] for line in self.lines):
            rows = [line for line in self.lines if line["layer"] == layer]
            screen.table(f"after layer {layer}", ["", *MEASURES], [[short(r["method"]), *(figure(r, m) for m in MEASURES)] for r in rows])
        screen.say("; ".join(f"{name}: {what}" for name, what in MEASURES.items()))
        if any(knob(entry(name), {}) for name in self.methods):
            screen.say("methods without a k keep as many latents as their penalty's default leaves: compare at like l0")
        screen.say(f"lines in {out / RESULTS}")


def othello(request: OthelloRequest, *, screen: Screen) -> OthelloResult:
    """Do it; lines already in the folder are kept, also where more methods are asked for now."""
    cards = request.check()
    refuse_early(request.out, "othello", request.record(), MAY_GROW)
    with run_folder(request.out, {"command": "othello", "request": request.record()}, MAY_GROW):
        with screen.stage("play games") as update:
            seen, held = games(request.games, seed=11), games(JUDGED, seed=12)
            update(f"{int(seen.live.sum()):,} positions to train on, {int(held.live.sum()):,} to judge on")
        model = othello_model()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            blank = type(model)(model.config).eval()
        for layer in range(model.config.num_hidden_layers):
            with screen.stage(f"layer {layer}") as update:
                _Layer(request, layer, held, update).run(cards, model, blank, seen)
        return OthelloResult(request.methods, _lines(request.out))


def _lines(out: Path) -> list[dict[str, Any]]:
    return read_lines(out / RESULTS) if (out / RESULTS).exists() else []


def _rows(model: Any, layer: int, of: Games) -> Tensor:
    """[N, D] residual stream after a layer, at positions after which somebody moves."""
    site, parts = f"layers.{layer}.resid_post", []
    for ids_BT, live_BT in zip(of.input_ids.split(256), of.live.split(256), strict=True):
        parts.append(capture(model, [site], input_ids=ids_BT)[site][live_BT])
    return torch.cat(parts)


class _Layer:
    """One layer: what is known of it, and the truth that is judged against."""

    def __init__(self, request: OthelloRequest, layer: int, held: Games, update: Callable[[str], None]) -> None:
        self.request, self.layer, self.held, self.update = request, layer, held, update
        told, names = labels(held)
        discs = [i for i, name in enumerate(names) if not name.startswith("empty")]      # who moved where is plain to see from the tokens
        truth_NC = told[held.live][:, discs]
        self.choose_N = (torch.arange(len(held.live)) < len(held.live) // 2)[:, None].expand_as(held.live)[held.live]
        both = [(truth_NC[side].sum(0) >= 10) & ((~truth_NC[side]).sum(0) >= 10) for side in (self.choose_N, ~self.choose_N)]
        self.truth_NC = truth_NC[:, both[0] & both[1]]

    def run(self, cards: list[Entry], model: Any, blank: Any, seen: Games) -> None:
        """Train and judge what is missing."""
        known = {line["method"] for line in _lines(self.request.out) if line["layer"] == self.layer}
        wanted = [card for card in cards if card.name not in known]
        if not wanted and {"untrained model", "neurons", "latents/random"} <= known:
            return
        x_train, x_held = _rows(model, self.layer, seen), _rows(model, self.layer, self.held)
        if "untrained model" not in known:
            self._keep("untrained model", [{"probe": probed(_rows(blank, self.layer, self.held), self.truth_NC, self.choose_N)}])
        if "neurons" not in known:
            away = x_held - x_train.mean(0)
            codes = Codes.of(torch.cat([away.relu(), (-away).relu()], 1))
            self._keep("neurons", [{**self._held(codes), "probe": probed(x_held, self.truth_NC, self.choose_N)}])
        plan: dict[str, Sparse] = {}
        if "latents/random" not in known:
            for seed in range(self.request.seeds):
                made = RandomDictionary(x_train.shape[1], self.request.width, self.request.k, seed=seed).eval()
                made.initialise(x_train)
                plan[f"latents/random@{seed}"] = made
        learnt = {f"{card.name}@{seed}": self.request.make(card, x_train.shape[1], seed) for card in wanted for seed in range(self.request.seeds)}
        if learnt:
            train(learnt, TensorStream(x_train, self.request.batch), self.request.recipe(), on_log=lambda r: self.update(
                f"{len(learnt)} dictionaries, step {r['step']}/{r['of']}"))
        plan |= learnt
        for name in dict.fromkeys(key.rpartition("@")[0] for key in plan):
            self._keep(name, [self._judged(read(m, x_held), x_held) for key, m in plan.items() if key.rpartition("@")[0] == name])

    def _held(self, codes: Codes) -> dict[str, float]:
        found = held_state(codes, self.truth_NC, self.choose_N)
        return {"coverage": found.coverage, "board": found.reconstruction, "auroc": found.auroc, "l0": codes.l0}

    def _judged(self, learned: Learned, x_held: Tensor) -> dict[str, float]:
        return {**self._held(learned.codes), "fvu": float(fvu_by(x_held, learned.x_hat, torch.zeros(len(x_held), dtype=torch.long)))}

    def _keep(self, method: str, seeds: list[dict[str, float]]) -> None:
        append_line(self.request.out / RESULTS, {"layer": self.layer, "method": method, "seeds": seeds})
