"""`rarefy fit`: train dictionaries on activations, or calibrate methods, into a run folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..catalogue import Entry
from ..errors import BadInput
from ..fit import Recipe, calibrate, train
from ..method import Sparse, positive
from ..store.methods import load, save
from ..store.run import Run
from ..streams import LiveStream, StoreStream, Stream, windows
from .build import check_names, dictionary, make_plan, places
from .models import Opened, Text, open_for_work, read_text
from .screen import Screen


@dataclass
class FitRequest:
    """Everything `rarefy fit` was asked for; kept in the run."""

    methods: list[str]
    model: str
    out: Path
    site: str = ""
    data: str = "stdlib"
    width: int = 4096
    k: int = 32
    budget: float = 0.5
    steps: int = 1000
    batch: int = 2048
    lr: float = 0.0
    precision: str = "float32"
    context: int = 512
    tokens: int = 400_000
    seed: int = 0
    target: str = ""
    store: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Plain JSON, without the folder it goes to."""
        return {**asdict(self), "out": self.out.name}


@dataclass
class FitResult:
    """What was fitted and where it is."""

    plan: dict[str, Sparse]
    last: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"schema": 1, "fitted": {k: {"method": m.name, **m.arguments} for k, m in self.plan.items()}, "last": self.last}

    def show(self, out: Path) -> None:
        """Say where the run is and what to do with it."""
        Screen().say(f"fitted {len(self.plan)} method{'s' if len(self.plan) > 1 else ''} into {out}; next: rarefy judge {out}")


def method_folder(run: Path, key: str) -> Path:
    """Where a run keeps one method; keys are site names or method names."""
    return run / "methods" / key.replace("/", "__")


def saved_plan(run: Path) -> dict[str, Sparse]:
    """Every method a run holds, by key."""
    folder = run / "methods"
    if not folder.is_dir():
        raise BadInput(f"{run} holds no fitted method; make one with `rarefy fit ... --out {run}`")
    return {p.name.replace("__", "/"): load(p) for p in sorted(folder.iterdir()) if not p.name.startswith(".") and (p / "method.json").exists()}


def fit(request: FitRequest, *, screen: Screen) -> FitResult:
    """Do it. Training that finds its own run in `request.out` goes on where that stopped."""
    cards = check_names(request.methods)
    latent = [c.unit == "latent" for c in cards]
    if any(latent) and not all(latent):
        raise BadInput("fit trains dictionaries or calibrates other methods, not both in one run; give them in two")
    recipe = Recipe(steps=request.steps, lr=request.lr, precision=request.precision).check()
    positive("batch", request.batch)
    if all(latent) and request.width < request.k:
        raise BadInput(f"width={request.width} is smaller than k={request.k}: a token cannot activate more latents than there are")
    with screen.stage("open the model"):
        opened = open_for_work(request.model)
    with Run(request.out, made={"command": "fit", "request": request.record(), "model": opened.card(), "seed": request.seed}):
        found = {name for card in cards for name in places(opened.model, card, request.site)}
        with screen.stage("read text"):
            text = read_text(request.data, opened, context=request.context, fit_tokens=request.tokens, judge_tokens=1)
        if all(latent):
            return _dictionaries(request, recipe, cards, sorted(found), opened, text, screen)
        return _calibrated(request, cards, opened, text, screen)


def _calibrated(request: FitRequest, cards: list[Entry], opened: Opened, text: Text, screen: Screen) -> FitResult:
    if len(cards) > 1:
        raise BadInput("calibrate one method a run; `rarefy sweep` compares several")
    plan = make_plan(opened.model, cards[0], request.site, request.budget, request.settings)
    with screen.stage(f"fit {cards[0].name} at {len(plan)} sites") as update:
        calibrate(opened.model, plan, text.fit, on_progress=lambda site, n: update(f"{site}, batch {n}"))
    for name, method in plan.items():
        save(method, method_folder(request.out, name))
    return FitResult(plan, {})


def _stream(request: FitRequest, site: str, opened: Opened, text: Text, screen: Screen) -> Stream:
    ids_NT = windows(text.fit)
    if not request.store:
        return LiveStream(opened.model, site, ids_NT, request.batch, target=request.target or None, seed=request.seed)
    from ..store.shards import ActivationStore, ActivationWriter, store_name

    if request.target:
        raise BadInput("--store keeps one site's activations; a transcoder (--target) is trained on the fly, without --store")
    made = {"model": opened.card(), "site": site, "data": request.data, "tokens": request.tokens, "context": request.context}
    folder = request.out / "activations" / store_name(made)
    source = LiveStream(opened.model, site, ids_NT, request.batch, seed=request.seed)
    buffers = max(1, len(ids_NT) // source.buffer)
    with screen.stage("write activations") as update, ActivationWriter(folder, d=source.fill(0)[0].shape[1], dtype="float32", made_from=made) as writer:
        there = writer.rows                                # an interrupted write goes on after what it acknowledged
        for number in range(buffers):
            rows_ND = source.fill(number)[0] if there < (number + 1) * source.rows else None
            if rows_ND is not None:
                writer.append(rows_ND[max(0, there - number * source.rows) :])
            update(f"{writer.rows:,} rows")
    return StoreStream(ActivationStore(folder, made_from=made), request.batch, seed=request.seed)


def _dictionaries(
    request: FitRequest, recipe: Recipe, cards: list[Entry], found: list[str], opened: Opened, text: Text, screen: Screen,
) -> FitResult:
    if len(found) != 1:
        raise BadInput(f"--site names {len(found)} sites ({', '.join(found[:4])}, ...); train one site a run")
    site = found[0]
    from ..site import sites

    d_out = sites(opened.model, request.target)[request.target].d if request.target else 0
    d_in = sites(opened.model, site)[site].d
    plan = {
        c.name: dictionary(c, d_in, width=request.width, k=request.k, seed=request.seed, settings=request.settings, d_out=d_out)
        for c in cards
    }
    trained = {name: m for name, m in plan.items() if m.fitted == "trained"}
    stream = _stream(request, site, opened, text, screen)
    last: dict[str, Any] = {}
    if trained:
        with screen.stage(f"train {', '.join(trained)} at {site}") as update:
            def on_log(record: dict[str, Any]) -> None:
                last.update(record if "methods" in record else {})
                update(progress(record))

            train(trained, stream, recipe, request.out, on_log=on_log)
    for name, method in plan.items():
        if method.fitted == "none":
            method.initialise(next(stream.batches())[0])
        save(method.eval(), method_folder(request.out, name))
    return FitResult(plan, last)


def progress(record: dict[str, Any]) -> str:
    """A training record as one short line."""
    if "skipped" in record:
        return f"went back to step {record['step']}: damaged {', '.join(map(str, record['skipped']))}"
    parts = [f"step {record['step']}/{record['of']}", f"{record['rows_per_s']:,.0f} tokens/s"]
    for name, values in record["methods"].items():
        shown = {k: v for k, v in values.items() if k in ("loss", "fvu", "l0", "dead")}
        parts.append(f"{name.split('/')[-1]} " + " ".join(f"{k} {v:.3g}" for k, v in shown.items()))
    return ", ".join(parts)
