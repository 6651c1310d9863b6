"""`rarefy track`: one dictionary followed over the checkpoints of a model's training.

Every checkpoint's dictionary is an ordinary run of `rarefy fit` below the series' folder, begun from the one before; they
can be judged, shown and gone on from like any other.

Shape letters: N = rows (tokens), D = width, F = latents, K = strongest rows of a latent, C = checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput, Unsupported
from ..latents.dictionary import Dictionary
from ..latents.track import drift, formation, identity_kept
from ..method import positive
from ..site import capture
from ..store.atomic import write_atomic
from ..store.lines import to_lines
from .build import check_names
from .dictionaries import TopContexts, active, rows_of
from .fit import FitRequest, fit
from .folder import refuse_early, run_folder
from .models import Opened, cut_text, opened, read_documents
from .request import Request
from .screen import Screen

SERIES = "series.jsonl"
STRONGEST = 20
"""Rows that stand for a latent in the measure of formation."""


@dataclass
class TrackRequest(Request):
    """Everything `rarefy track` was asked for; kept in the run."""

    method: str
    models: list[str]
    out: Path
    site: str = ""
    data: str = "stdlib"
    width: int = 4096
    k: int | None = None
    steps: int = 1000
    later_steps: int = 100
    cold: bool = False
    batch: int = 2048
    lr: float = 0.0
    context: int = 512
    tokens: int = 400_000
    judge_tokens: int = 20_000
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def runs(self) -> list[FitRequest]:
        """One fit a checkpoint. Cold ones have seeds of their own, or they would all begin at the same directions."""
        shared = {name: getattr(self, name) for name in ("site", "data", "width", "k", "batch", "lr", "context", "tokens", "settings")}
        folders = [self.out / f"{number:02d}" for number in range(len(self.models))]
        return [
            FitRequest(
                [self.method], model, folders[i], steps=self.later_steps if i else self.steps, seed=self.seed + i * self.cold,
                resume_from="" if self.cold or not i else str(folders[i - 1]), **shared,
            )
            for i, model in enumerate(self.models)
        ]

    def check(self) -> None:
        """Raise BadInput for whatever can be seen to be wrong without a model or data."""
        (card,) = check_names([self.method])
        if card.unit != "latent" or card.fitted != "trained":
            raise BadInput(f"{card.name} is not a dictionary that is trained; track follows one, such as latents/topk")
        if len(self.models) < 2:
            raise BadInput("give at least two checkpoints of one model's training, in their order")
        if len(set(self.models)) < len(self.models):
            raise BadInput("a checkpoint is named twice; name each once, in the order of training")
        positive("later_steps", self.later_steps)
        for request in self.runs():
            request.check()


@dataclass
class TrackResult:
    """The series: a record a checkpoint, and per latent how it formed and drifted."""

    run: Path
    site: str
    checkpoints: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"schema": 1, "run": str(self.run), "site": self.site, "checkpoints": self.checkpoints}

    def show(self, out: Path) -> None:
        """Print the table."""
        columns = ["checkpoint", "steps", "FVU", "L0", "same latent as before", "cosine to before", "cosine to last", "formation"]
        rows = [
            [Path(c["model"]).name, str(c["steps"]), f"{c['fvu']:.4f}", f"{c['l0']:.1f}", *(f"{c[key]:.3f}" for key in (
                "identity_kept", "cosine_to_previous", "cosine_to_last", "formation"))]
            for c in self.checkpoints
        ]
        screen = Screen()
        screen.table(f"{self.site}, means over latents that fire at the last checkpoint", columns, rows)
        screen.say(f"rarefy judge {out}/{len(rows) - 1:02d}")


def track(request: TrackRequest, *, screen: Screen) -> TrackResult:
    """Do it. A series found in `request.out` goes on where it stopped."""
    request.check()
    refuse_early(request.out, "track", request.record())
    with run_folder(request.out, {"command": "track", "request": request.record()}):
        dictionaries, site = [], ""
        for one in request.runs():
            done = fit(one, screen=screen)
            method, site = done.plan[request.method], done.sites[0]
            if not isinstance(method, Dictionary):
                raise Unsupported(f"{request.method} is no dictionary of one site's rows; track follows one")
            dictionaries.append(method)
        records = _measured(request, dictionaries, site, screen)
        write_atomic(request.out / SERIES, to_lines(records))
    return TrackResult(request.out, site, records)


@torch.no_grad()
def _measured(request: TrackRequest, dictionaries: list[Dictionary], site: str, screen: Screen) -> list[dict[str, Any]]:
    """A record a checkpoint, on text held out from the fits. The last checkpoint's strongest rows stand for a latent throughout."""
    docs, quiet = read_documents(request.data, Screen(quiet=True)), Screen(quiet=True)
    turned = drift([m.W_dec_FD for m in dictionaries])
    records: list[dict[str, Any]] = []
    with screen.stage("measure formation and drift") as update:
        at_FK = fires_F = torch.empty(0)
        first: dict[str, int] = {}
        for i in reversed(range(len(request.models))):          # the last one says which rows stand for which latent
            model = opened(request.models[i], quiet)
            first = first or model.tokenizer.get_vocab()
            if model.tokenizer.get_vocab() != first:
                raise BadInput(f"{request.models[i]} has another tokenizer than {request.models[-1]}; checkpoints of one training share it")
            x_ND = _rows(model, docs, request, site)
            if not records:
                at_FK = _strongest(dictionaries[i], x_ND)
                fires_F = (at_FK >= 0).sum(-1) >= 2
            if len(x_ND) <= int(at_FK.max()):
                raise BadInput(f"{request.models[i]} cuts the text into other contexts than {request.models[-1]}")
            formed_F = formation(x_ND, at_FK)
            record = {
                "model": request.models[i], "steps": request.later_steps if i else request.steps, **_quality(dictionaries[i], x_ND),
                "identity_kept": identity_kept(dictionaries[max(0, i - 1)].W_dec_FD, dictionaries[i].W_dec_FD),
            }
            curves = {"cosine_to_previous": turned.to_previous_CF[i], "cosine_to_last": turned.to_last_CF[i], "formation": formed_F}
            record |= {name: float(value_F[fires_F].mean()) for name, value_F in curves.items()}
            record["latents"] = {name: _tidy(value_F) for name, value_F in curves.items()}
            records.insert(0, record)
            update(request.models[i])
    return records


def _tidy(value_F: Tensor) -> list[float | None]:
    return [None if math.isnan(v) else round(v, 4) for v in value_F.tolist()]


def _rows(model: Opened, docs: Any, request: TrackRequest, site: str) -> Tensor:
    text = cut_text(docs, model, Screen(quiet=True), context=request.context, fit_tokens=request.context, judge_tokens=request.judge_tokens)
    return torch.cat([capture(model.model, [site], input_ids=b.input_ids)[site][rows_of(b)].float() for b in text.judge])


def _strongest(method: Dictionary, x_ND: Tensor) -> Tensor:
    """[F, K] rows where each latent is strongest; -1 where it fires in fewer."""
    top, before = TopContexts(method.width, STRONGEST), 0
    for part in x_ND.split(2048):
        latent_M, value_M, row_M = active(method, part)
        top.add(latent_M, value_M, row_M + before, len(part))
        before += len(part)
    return torch.where(top.value_FK > 0, top.at_FK, -1)


def _quality(method: Dictionary, x_ND: Tensor) -> dict[str, float]:
    wrong = count = 0.0
    for part in x_ND.split(2048):
        wrong += float((part - method(part)).double().pow(2).sum())
        count += len(active(method, part)[0])
    return {"fvu": wrong / float((x_ND - x_ND.mean(0)).double().pow(2).sum()), "l0": count / len(x_ND)}
