"""`rarefy convert`: a fitted TopK-like dictionary as a JumpReLU one, in a run of its own that judge and show read like any other.

Shape letters: N = rows, D = width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..catalogue import entry
from ..errors import BadInput, Unsupported
from ..latents.convert import to_jumprelu
from ..latents.topk import TopK
from ..method import Sparse, positive
from ..store.methods import save
from ..streams import LiveStream, windows
from .fit import FitRequest, method_folder, saved_plan
from .flows import one_site
from .folder import refuse_early, run_folder
from .judge import fitted_run
from .models import Opened, cut_text, digest, opened, probe, read_documents
from .screen import Screen

MADE = "latents/jumprelu"


@dataclass
class ConvertResult:
    """What was converted, where it is, and latents active a token before and after, on the tokens it was set on."""

    run: Path
    method: str
    theta: float
    l0_before: float
    l0: float
    tokens: int

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        shown = {"method": self.method, "theta": self.theta, "l0_before": self.l0_before, "l0": self.l0, "tokens": self.tokens}
        return {"schema": 1, "run": str(self.run), **shown}

    def show(self, out: Path) -> None:
        """Say what became of it."""
        Screen().say(
            f"{self.method} became {MADE} with threshold {self.theta:.4g}: {self.l0_before:.4g} latents active a token before, {self.l0:.4g} now, "
            f"on {self.tokens:,} tokens; next: rarefy judge {out}"
        )


def convert(run: Path, out: Path, *, method: str = "", tokens: int = 20_000, screen: Screen) -> ConvertResult:
    """Do it, on the text that the run was fitted to.

    Args:
        method: which of the run's methods; "" for its only one that can be converted. tokens: most to set the threshold on.
    """
    positive("tokens", tokens)
    made, request = fitted_run(run)
    if request.join or request.beside:
        raise Unsupported(f"{run} holds dictionaries of several sites at once; convert takes those of one site")
    if entry(request.methods[0]).unit != "latent":
        raise Unsupported(f"{run} holds {request.methods[0]}, which is no dictionary; convert takes runs of dictionaries")
    name, found = _one(run, saved_plan(run, request.methods), method)
    there = replace(request, methods=[MADE], settings={}, resume_from="", out=out)
    refuse_early(out, "fit", there.record())
    x_ND = _rows(run, made, request, tokens, screen)
    with screen.stage(f"convert {name}") as update:
        other = to_jumprelu(found, x_ND)
        update(f"{len(x_ND):,} tokens")
    before, after = (sum(int(m.select(x).on.sum()) for x in x_ND.split(2048)) / len(x_ND) for m in (found, other))
    with run_folder(out, {**made, "request": there.record(), "converted": {"from": name, "tokens": len(x_ND)}}):
        save(other, method_folder(out, MADE))
    return ConvertResult(out, name, float(other.log_theta_F.detach()[0].exp()), before, after, len(x_ND))


def _one(run: Path, plan: dict[str, Sparse], asked: str) -> tuple[str, TopK]:
    able = {name: m for name, m in plan.items() if isinstance(m, TopK)}
    if asked and asked not in plan:
        raise BadInput(f"--method {asked!r}: {run} holds {', '.join(plan)}")
    if asked and asked not in able:
        raise Unsupported(f"{asked} does not choose by rank, so that there is nothing to convert; {run} holds {', '.join(plan)}")
    if not asked and len(able) != 1:
        raise BadInput(f"{run} holds {', '.join(plan)}, of which {len(able)} can be converted; name one with --method")
    name = asked or next(iter(able))
    return name, able[name]


@torch.no_grad()
def _rows(run: Path, made: dict[str, Any], request: FitRequest, tokens: int, screen: Screen) -> Tensor:
    """[N, D] activations at the run's site, on the text it was fitted to."""
    docs = read_documents(request.data, screen)
    model: Opened = opened(request.model, screen)
    if model.info.sha256 != made["model"]["sha256"]:
        raise BadInput(f"{run} was fitted to other weights than {request.model} has now; give it the model it was fitted to, or fit again")
    text = cut_text(docs, model, screen, context=request.context, fit_tokens=request.tokens, judge_tokens=1)
    if digest(text.fit) != made["text"]:
        raise BadInput(f"{request.data} is not the text that {run} was fitted to any more; fit again")
    site = one_site(run, made, "conversion")
    probe(model, text, [site])
    ids_NT = windows(text.fit)
    ids_NT = ids_NT[: max(1, -(-tokens // (ids_NT.shape[1] - 1)))]
    live = LiveStream(model.model, site, ids_NT, 1, buffer=len(ids_NT), seed=request.seed)
    return torch.cat([live.take(ids_BT)[0] for ids_BT in ids_NT.split(16)])[:tokens].float()
