"""`rarefy apply`: prune a model's weights and save it as an ordinary Hugging Face folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn

from ..budget import share
from ..builtin.corpus import Text
from ..catalogue import Entry
from ..errors import BadInput
from ..fit import calibrate
from ..store.fs import DISK, writing
from ..store.lock import LOCK_NAME, RunLock
from ..store.run import versions
from ..weights.apply import apply as bake
from ..weights.linear import MaskedLinear
from .build import check_budget, check_names, check_settings, make_plan, places
from .folder import parents_of, refuse_unwritable
from .models import Opened, check_context, cut_text, opened, probe, read_documents
from .screen import Screen

SHARES = ("uniform", "erk", "owl")
RECORD = "rarefy.json"
"""File beside the saved model that tells what was done to it; transformers does not read it."""


@dataclass
class ApplyRequest:
    """Everything `rarefy apply` was asked for."""

    method: str
    model: str
    out: Path
    budget: float = 0.5
    site: str = ""
    share: str = "uniform"
    data: str = "stdlib"
    context: int = 512
    calibration: int = 20_000
    settings: dict[str, Any] = field(default_factory=dict)

    def check(self) -> Entry:
        """The method's card. Raises BadInput for whatever can be seen to be wrong without a model or data."""
        (card,) = check_names([self.method])
        if card.unit != "weight":
            raise BadInput(f"{card.name} selects {card.unit}s while the model runs; only weights methods leave a smaller model to save")
        check_settings([card], self.settings)
        check_budget(self.budget)
        check_context(self.context, calibration=self.calibration)
        if self.share not in SHARES:
            raise BadInput(f"share={self.share!r} must be one of {', '.join(SHARES)}")
        if self.share != "uniform" and self.settings.get("m"):
            raise BadInput(f"--share {self.share} gives each layer a budget of its own, but n of m fixes it for all; leave one of them out")
        if DISK.exists(self.out) and (not self.out.is_dir() or DISK.names(self.out)):
            raise BadInput(f"{self.out} is there already and not an empty folder; choose another --out")
        refuse_unwritable(self.out)
        return card


@dataclass
class ApplyResult:
    """What was saved."""

    out: Path
    kept: dict[str, float]
    """Site -> fraction of its weights kept."""
    share: float
    """Fraction kept of all weights of those sites."""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"schema": 1, "out": str(self.out), "weights_kept": self.share, "sites": self.kept}

    def show(self, out: Path) -> None:
        """Say what was saved and how to open it."""
        Screen().say(f"{len(self.kept)} layers, {self.share:.1%} of their weights kept; AutoModelForCausalLM.from_pretrained({str(out)!r}) opens it")


def apply(request: ApplyRequest, *, screen: Screen) -> ApplyResult:
    """Do it. The folder is written beside its place and moved there whole."""
    card = request.check()
    docs = read_documents(request.data, screen)
    model = opened(request.model, screen)
    plan = make_plan(model.model, card, request.site, request.budget, request.settings)
    text = cut_text(docs, model, screen, context=request.context, fit_tokens=request.calibration, judge_tokens=1)
    probe(model, text)
    masks = cast(dict[str, MaskedLinear], _shared(request, card, model, plan, text) if request.share != "uniform" else plan)
    with screen.stage(f"fit {card.name} at {len(plan)} sites") as update:
        calibrate(model.model, masks, text.fit, on_progress=lambda site, n: update(f"{site}, batch {n}"))
    stored = _stored_dtype(model.model)
    bake(model.model, masks)
    kept = {name: float(m.mask_OI.double().mean()) for name, m in masks.items()}
    result = ApplyResult(request.out, kept, sum(int(m.mask_OI.sum()) for m in masks.values()) / sum(m.mask_OI.numel() for m in masks.values()))
    with screen.stage("save"):
        done = {**asdict(request), "out": request.out.name, "kept": kept, "model": model.card(), "versions": versions()}
        _save(model, stored, {"schema": 1, "made": {"command": "apply", **done}}, request.out)
    return result


def _shared(request: ApplyRequest, card: Entry, model: Opened, plan: dict[str, Any], text: Text) -> dict[str, Any]:
    """The plan with each site's own budget, by a rule over the sites' weight scores."""
    calibrate(model.model, plan, text.fit, sequential=False)
    budgets = share({name: method.scores() for name, method in plan.items()}, request.budget, request.share)
    cls, found = card.load(), places(model.model, card, request.site)
    return {
        name: cls.for_module(model.model.get_submodule(found[name].module_path), budget=budgets[name], **request.settings).eval()
        for name in plan
    }


def _stored_dtype(model: nn.Module) -> torch.dtype:
    """The narrowest dtype that holds every parameter exactly: the one its file was stored in, as models are opened in float32."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(p.to(dtype).to(p.dtype), p) for p in model.parameters()):
            return dtype
    return torch.float32


def _save(model: Opened, dtype: torch.dtype, record: dict[str, Any], out: Path) -> None:
    """The whole model folder in one step: a crash leaves nothing at `out`, and the next attempt clears what it left beside."""
    part = out.with_name(f".tmp-{out.name}")
    with parents_of(part), RunLock(part), _gone_on_error(part), writing(out):
        for name in DISK.names(part):
            if name != LOCK_NAME:
                DISK.rmtree(part / name) if (part / name).is_dir() else DISK.remove(part / name)
        with _quiet():
            try:
                model.model.to(dtype).save_pretrained(part)
                model.tokenizer.save_pretrained(part)
            except SafetensorError as error:                # what its writer makes of a refusal of the disk
                raise OSError(28 if "StorageFull" in str(error) else 5, str(error).partition(":")[0]) from error
        DISK.write(part / RECORD, json.dumps(record, indent=1).encode())
        mode = (part / "config.json").stat().st_mode
        for name in DISK.names(part):
            (part / name).chmod(mode)                       # the writer of safetensors keeps its files from other users
            DISK.sync(part / name)
        DISK.sync_dir(part)
        DISK.remove(part / LOCK_NAME)
        if DISK.exists(out):
            out.rmdir()
        DISK.rename(part, out)
        DISK.sync_dir(out.parent)


@contextlib.contextmanager
def _gone_on_error(part: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            DISK.rmtree(part)
        raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Saving without transformers' progress bars."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
