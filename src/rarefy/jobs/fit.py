"""`rarefy fit`: train dictionaries on activations, or calibrate methods, into a run folder.

Shape letters: N = contexts or rows, T = tokens of a context, D = width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from .. import world
from ..builtin.corpus import Text
from ..catalogue import Entry
from ..errors import BadInput, Damaged, Unsupported
from ..fit import Recipe, calibrate, train
from ..formats import layout_of
from ..gradient_stream import GradientStream
from ..method import Sparse, positive
from ..selection import kept
from ..store.layout import CLOSED, store_name
from ..store.lines import read_lines
from ..store.methods import load, save
from ..store.shards import ActivationStore
from ..store.writer import ActivationWriter
from ..streams import Flow, LiveStream, StoreStream, Stream, windows
from .build import check_budget, check_names, check_settings, dictionary, fixes_k, make_plan, places, refuse_untrained, settings_for
from .flows import check_gradients, check_joined, flow_of, open_beside, plain, reads_gradients
from .folder import joint_folder, refuse_early, run_folder
from .foreign import check_foreign, settle_all, take_up_foreign
from .models import Opened, check_context, cut_text, digest, opened, probe, read_documents
from .objective import check_objective, check_plain, in_model, take_up, window_stream
from .request import Request
from .screen import Screen, silent

ACTIVATIONS = "activations"
AT_ONCE, SKIP = 16, 1
"""Contexts a forward pass of writing a store, and positions left out of each: see LiveStream."""


@dataclass
class FitRequest(Request):
    """Everything `rarefy fit` was asked for; kept in the run."""

    methods: list[str]
    model: str
    out: Path
    site: str = ""
    data: str = "stdlib"
    width: int = 4096
    k: int | None = None
    """None: from the budget, or 32."""
    budget: float | None = None
    """None: 0.5, or of dictionaries k / width. `check` fills both in."""
    steps: int = 1000
    batch: int = 2048
    lr: float = 0.0
    precision: str = "float32"
    context: int = 512
    tokens: int = 400_000
    seed: int = 0
    target: str = ""
    join: str = ""
    beside: str = ""
    """A second model, read at the same sites."""
    store: bool = False
    objective: str = "local"
    downstream: float | None = None
    """None: 1.0, where the objective has it."""
    resume_from: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Mapping[str, Any], out: Path) -> Self:
        """The reverse of `record`."""
        try:
            return cls(**record, out=out)
        except TypeError as error:
            raise Damaged(f"{out} was made by another version of rarefy ({error}); make the run again") from None

    def check(self) -> list[Entry]:
        """Cards of the methods. Raises BadInput for whatever can be seen to be wrong without a model or data."""
        cards = check_names(self.methods)
        latent = [card.unit == "latent" for card in cards]
        if any(latent) and not all(latent):
            raise BadInput("fit trains dictionaries or calibrates other methods, not both in one run; give them in two")
        check_settings(cards, self.settings)
        check_context(self.context, tokens=self.tokens)
        if not 0 <= self.seed < 2**63:
            raise BadInput(f"seed={self.seed} must be a whole number in 0..2**63 - 1")
        refuse_untrained(cards)
        if not all(latent):
            if self.k is not None:
                raise BadInput(f"--k is for dictionaries; say how many {cards[0].unit}s are kept with --budget")
            self.budget = 0.5 if self.budget is None else self.budget
            check_budget(self.budget)
            if len(cards) > 1:
                raise BadInput("calibrate one method a run; `rarefy sweep` compares several")
            for name in ("target", "store", "join", "beside"):
                if getattr(self, name):
                    raise BadInput(f"--{name} is for dictionaries, and {cards[0].name} selects {cards[0].unit}s; leave it out")
            check_plain(self, cards[0].unit, cards[0].name)
            return cards
        self.recipe().check()
        positive("batch", self.batch)
        self._fix_k(cards)
        check_objective(self)
        check_joined(self, cards)
        check_gradients(self, cards)
        return cards

    def _fix_k(self, cards: list[Entry]) -> None:
        positive("width", self.width)
        if self.budget is not None:
            check_budget(self.budget)
            if self.k is not None and self.k != kept(self.budget, self.width):
                raise BadInput(f"--k {self.k} and --budget {self.budget} contradict each other at a width of {self.width}; give one of them")
            if learnt := [card.name for card in cards if not fixes_k(card)]:
                raise BadInput(f"--budget: {learnt[0]} learns how many latents are active; steer it with --set, see `rarefy methods`")
        self.k = positive("k", kept(self.budget, self.width) if self.budget is not None else 32 if self.k is None else self.k)
        self.budget = self.k / self.width

    def recipe(self) -> Recipe:
        """How dictionaries are trained."""
        return Recipe(steps=self.steps, lr=self.lr, precision=self.precision)


@dataclass
class FitResult:
    """What was fitted and where it is."""

    run: Path
    plan: dict[str, Sparse]
    sites: list[str]
    last: dict[str, Any]
    """The last training record; empty for methods that are not trained."""
    before: bool = False
    """Whether the run was found finished."""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        fitted = {key: {"method": m.name, "arguments": m.arguments} for key, m in self.plan.items()}
        return {"schema": 1, "run": str(self.run), "finished_before": self.before, "sites": self.sites, "fitted": fitted, "last": self.last}

    def show(self, out: Path) -> None:
        """Say where the run is and what to do with it."""
        what = f"{len(self.plan)} method{'s' if len(self.plan) > 1 else ''}"
        done = f"{out} is finished already, with {what}" if self.before else f"fitted {what} into {out}"
        Screen().say(f"{done}; next: rarefy judge {out}")


def method_folder(run: Path, key: str) -> Path:
    """Where a run keeps one method; keys are site names or method names."""
    return run / "methods" / key.replace("/", "__")


def saved_plan(run: Path, keys: Iterable[str]) -> dict[str, Sparse]:
    """A run's methods by key. Raises BadInput where one was not fitted yet."""
    plan = {}
    for key in keys:
        try:
            plan[key] = load(method_folder(run, key))
        except BadInput:
            if method_folder(run, key).exists():
                raise
            raise BadInput(f"{run} holds no fitted {key} yet; run its `rarefy fit` to the end first") from None
    return plan


def fit(request: FitRequest, *, screen: Screen) -> FitResult:
    """Do it. Training that finds its own run in `request.out` goes on where that stopped.

    Processes of torch.distributed train dictionaries together, as `rarefy.train` says; the first alone writes and shows.
    """
    cards = request.check()
    screen = screen if world.first() else silent()
    if cards[0].unit != "latent" and world.place()[1] > 1:
        raise Unsupported(f"{cards[0].name} is calibrated, by one process alone, and {world.place()[1]} were started; run it without torchrun")
    with world.together():
        if world.first():
            refuse_early(request.out, "fit", request.record())
        check_foreign(request.resume_from)
        docs = read_documents(request.data, screen)
        model = opened(request.model, screen)
        text = cut_text(docs, model, screen, context=request.context, fit_tokens=request.tokens, judge_tokens=1)
    made = {"command": "fit", "request": request.record(), "model": model.card(), "seed": request.seed, "text": digest(text.fit)}
    if cards[0].unit != "latent":
        found = list(places(model.model, cards[0], request.site))
        return _calibrated(request, {**made, "sites": found, "target": ""}, cards, model, text, screen)
    with world.together():
        beside = open_beside(request.beside, model, screen)
        flow = flow_of(request, cards, model, beside)
    made |= {"sites": list(flow.sites), "target": flow.targets[0] if flow.transcodes else ""}
    if flow.join:
        made |= {"target": list(flow.targets) if flow.transcodes else "", "join": flow.join}
    if beside:
        made["beside"] = beside.card()
    return _dictionaries(request, made, cards, model, text, screen, flow, beside)


def _finished(run: Path, keys: Iterable[str]) -> dict[str, Sparse] | None:
    """The run's methods, if all of them were saved and are whole."""
    with contextlib.suppress(BadInput, Damaged):
        return saved_plan(run, keys)
    return None


# ----------------------------------------------------------------------------------------------------- calibration


def _calibrated(
    request: FitRequest, made: dict[str, Any], cards: list[Entry], model: Opened, text: Text, screen: Screen,
) -> FitResult:
    plan = make_plan(model.model, cards[0], request.site, request.budget or 1.0, request.settings)
    probe(model, text)
    with run_folder(request.out, made) as run:
        if run.resumed and (there := _finished(request.out, plan)):
            return FitResult(request.out, there, list(there), {}, True)
        with screen.stage(f"fit {cards[0].name} at {len(plan)} sites") as update:
            calibrate(model.model, plan, text.fit, on_progress=lambda site, n: update(f"{site}, batch {n}"))
        for name, method in plan.items():
            save(method, method_folder(request.out, name))
    return FitResult(request.out, plan, list(plan), {})


# ------------------------------------------------------------------------------------------------------- training


def _dictionaries(
    request: FitRequest, made: dict[str, Any], cards: list[Entry], model: Opened, text: Text, screen: Screen, flow: Flow, beside: Opened | None,
) -> FitResult:
    with world.together():
        plan, live, begun, width = _prepared(request, cards, model, text, flow, beside)
    found, site, target = list(flow.sites), ", ".join(flow.sites), flow.targets[0] if flow.transcodes else ""
    with joint_folder(request.out, made) as resumed:
        log = request.out / "log.jsonl"
        there = _finished(request.out, plan) if resumed else None
        world.same("whether they find the run finished", int(there is not None))
        if there:
            records = read_lines(log) if log.exists() else []
            return FitResult(request.out, there, found, records[-1] if records else {}, True)
        with _way_out_of_damage(request.out / ACTIVATIONS):
            stream = _stored(request, live, made, width, screen) if request.store else live
            with world.together():
                trained = in_model(request, {name: m for name, m in plan.items() if m.fitted == "trained"}, model.model, site, target)
                tokens = stream if request.objective == "local" else window_stream(request, text)
            last = _train(request, trained, tokens, site, screen, begun)
            with world.together():
                for name, method in plan.items() if world.first() else ():
                    if method.fitted == "none":
                        method.initialise(*next(stream.batches()))
                    save(method.eval(), method_folder(request.out, name))
    return FitResult(request.out, plan, found, last)


def _prepared(
    request: FitRequest, cards: list[Entry], model: Opened, text: Text, flow: Flow, beside: Opened | None,
) -> tuple[dict[str, Sparse], LiveStream, Collection[str], int]:
    """The dictionaries, their activations, which of them were trained before, and the activations' width."""
    ids_NT, names = windows(text.fit), list(dict.fromkeys((*flow.sites, *flow.targets)))
    for each in (model, *([beside] if beside else [])):
        probe(each, text, names)
    read, reproduced = flow.widths(model.model, ids_NT[:1], beside.model if beside else None)
    plan = {
        card.name: dictionary(
            card, plain(read), width=request.width, k=request.k or 1, seed=request.seed, settings=settings_for(card, request.settings),
            d_out=plain(reproduced) if flow.transcodes else 0,
        )
        for card in cards
    }
    foreign = request.resume_from and layout_of(request.resume_from)
    begun = (take_up_foreign if foreign else take_up)(plan, request.resume_from) if request.resume_from else ()
    if reads_gradients(cards):
        live: LiveStream = GradientStream(model.model, flow.sites[0], ids_NT, request.batch, seed=request.seed)
    else:
        live = LiveStream(
            model.model, flow.sites, ids_NT, request.batch, target=flow.targets if flow.transcodes else None, join=flow.join,
            beside=beside.model if beside else None, seed=request.seed,
        )
    if foreign:
        settle_all(plan, begun, live)
    return plan, live, begun, sum(read)


def _train(
    request: FitRequest, plan: dict[str, Sparse], stream: Stream, site: str, screen: Screen, begun: Collection[str] = (),
) -> dict[str, Any]:
    """The last record of training."""
    last: dict[str, Any] = {}
    if plan:
        with screen.stage(f"train {', '.join(plan)} at {site}") as update:
            def on_log(record: dict[str, Any]) -> None:
                last.update(record if "methods" in record else {})
                update(progress(record))

            train(plan, stream, request.recipe(), request.out, begun=begun, on_log=on_log)
    return last


@contextlib.contextmanager
def _way_out_of_damage(folder: Path) -> Iterator[None]:
    try:
        yield
    except Damaged as error:
        if str(folder) not in str(error):
            raise
        raise Damaged(f"{error}; delete {folder}, and the same command writes it again") from None


def _stored(request: FitRequest, live: LiveStream, made: dict[str, Any], d: int, screen: Screen) -> StoreStream:
    """The stream's activations on disk, each context's once, and a stream of them."""
    flow = live.flow
    joined = {"join": flow.join, **({"beside": made["beside"]} if flow.beside else {})} if flow.join else {}
    names = list(flow.sites) if joined else flow.sites[0]
    from_ = {"model": made["model"], "site": names, **joined, "text": made["text"], "context": request.context, "skip": SKIP}
    folder = request.out / ACTIVATIONS / store_name(from_)
    ids_NT: Tensor = live.windows_NT
    rows = (ids_NT.shape[1] - SKIP) * AT_ONCE * (len(flow.sites) if flow.join == "mix" else 1)
    with world.together():
        if world.first() and not (folder / CLOSED).exists():
            with screen.stage(f"write activations of {names}") as update, ActivationWriter(folder, d, "float32", from_) as writer:
                there = writer.rows                         # an interrupted write goes on after what it acknowledged
                for number, ids_BT in enumerate(ids_NT.split(AT_ONCE)):
                    if there < (number + 1) * rows:
                        x_ND = live.take(ids_BT)[0].float()
                        writer.append(x_ND[max(0, there - number * rows) :])
                    update(f"{writer.rows:,} rows")
    with world.together():
        return StoreStream(ActivationStore(folder, made_from=from_), request.batch, seed=request.seed)


def progress(record: dict[str, Any]) -> str:
    """A training record as one short line."""
    if "skipped" in record:
        return f"went back to step {record['step']}: damaged {', '.join(map(str, record['skipped']))}"
    parts = [f"step {record['step']}/{record['of']}", f"{record['rows_per_s']:,.0f} tokens/s"]
    for name, values in record["methods"].items():
        shown = {k: v for k, v in values.items() if k in ("loss", "kl", "fvu", "l0", "dead")}
        parts.append(f"{name.split('/')[-1]} " + " ".join(f"{k} {v:.3g}" for k, v in shown.items()))
    return ", ".join(parts)
