"""`rarefy apply`: prune a model's weights and save it as an ordinary Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ..errors import BadInput
from ..fit import calibrate
from ..weights.apply import apply as bake
from ..weights.linear import MaskedLinear
from .build import check_names, make_plan
from .models import open_for_work, read_text
from .screen import Screen


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


@dataclass
class ApplyResult:
    """What was saved."""

    out: Path
    sites: int
    kept: float

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"schema": 1, "out": str(self.out), "sites": self.sites, "weights_kept": self.kept}

    def show(self, out: Path) -> None:
        """Say what was saved and how to open it."""
        Screen().say(f"{self.sites} layers, {self.kept:.1%} of their weights kept; AutoModelForCausalLM.from_pretrained({str(out)!r}) opens it")


def apply(request: ApplyRequest, *, screen: Screen) -> ApplyResult:
    """Do it. The folder is written beside its place and moved there whole."""
    (card,) = check_names([request.method])
    if card.unit != "weight":
        raise BadInput(f"{card.name} selects {card.unit}s while the model runs; only weights methods leave a smaller model to save")
    if request.out.exists() and any(request.out.iterdir() if request.out.is_dir() else [1]):
        raise BadInput(f"{request.out} is not empty; choose another --out")
    with screen.stage("open the model"):
        opened = open_for_work(request.model)
    plan = cast(dict[str, MaskedLinear], make_plan(opened.model, card, request.site, request.budget, request.settings))
    with screen.stage("read text"):
        text = read_text(request.data, opened, context=request.context, fit_tokens=request.calibration, judge_tokens=1)
    if request.share != "uniform":
        plan = _shared(request, card, opened, plan, text)
    with screen.stage(f"fit {card.name} at {len(plan)} sites") as update:
        calibrate(opened.model, plan, text.fit, on_progress=lambda site, n: update(f"{site}, batch {n}"))
    kept = sum(int(m.mask_OI.sum()) for m in plan.values()) / sum(m.mask_OI.numel() for m in plan.values())
    bake(opened.model, plan)
    part = request.out.with_name(request.out.name + ".part")
    with screen.stage("save"):
        opened.model.save_pretrained(part)
        opened.tokenizer.save_pretrained(part)
        if request.out.exists():
            request.out.rmdir()
        part.rename(request.out)
    return ApplyResult(request.out, len(plan), kept)


def _shared(request: ApplyRequest, card: Any, opened: Any, plan: dict[str, MaskedLinear], text: Any) -> dict[str, MaskedLinear]:
    """The plan with each site's own budget, by a rule over the sites' weight scores."""
    from ..budget import share

    calibrate(opened.model, plan, text.fit, sequential=False)
    scores = {name: method.scores() for name, method in plan.items()}
    budgets = share(scores, request.budget, request.share)
    cls = card.load()
    return {
        name: cls.for_module(opened.model.get_submodule(_path(opened.model, name)), budget=budgets[name], **request.settings).eval()
        for name in plan
    }


def _path(model: Any, name: str) -> str:
    from ..site import sites

    return sites(model, name)[name].module_path
