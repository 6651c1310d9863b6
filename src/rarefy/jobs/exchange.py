"""`rarefy export` and `rarefy import`: dictionaries in the layouts of other libraries, from our runs and as our runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..catalogue import entry
from ..errors import BadInput, Unsupported
from ..formats import LAYOUTS, Foreign, read_dictionary, write_dictionary
from ..latents.dictionary import Dictionary
from ..store.methods import CARD, load, save
from ..streams import windows
from .fit import FitRequest, method_folder
from .flows import flow_of
from .folder import refuse_early, refuse_unwritable, run_folder
from .judge import fitted_run
from .models import check_context, cut_text, digest, opened, probe, read_documents
from .screen import Screen


@dataclass
class Exported:
    """What was written."""

    out: Path
    layout: str
    method: str
    files: list[Path]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"schema": 1, "out": str(self.out), "format": self.layout, "method": self.method, "files": [p.name for p in self.files]}

    def show(self, out: Path) -> None:
        """Say what was written."""
        Screen().say(f"{self.method} in the {self.layout} layout: {', '.join(str(out / p.name) for p in self.files)}")


def export(run: Path, layout: str, out: Path, method: str, *, screen: Screen) -> Exported:
    """Write a dictionary of a fitted run, or one saved method, for another library.

    Args:
        method: which, where the run has several; "" for the only one.
    """
    if layout not in LAYOUTS:
        raise BadInput(f"--format {layout!r} must be one of {', '.join(LAYOUTS)}")
    refuse_unwritable(out)
    if (run / CARD).exists():
        folder, made = run, {}
    else:
        card, request = fitted_run(run)
        if entry(request.methods[0]).unit != "latent":
            raise BadInput(f"{run} holds {request.methods[0]}; only dictionaries have these layouts")
        if not method and len(request.methods) > 1:
            raise BadInput(f"{run} holds {', '.join(request.methods)}; say which with --method")
        if method and method not in request.methods:
            raise BadInput(f"{run} holds {', '.join(request.methods)}, not {method}")
        folder = method_folder(run, method or request.methods[0])
        if not folder.exists():
            raise BadInput(f"{run} holds no fitted {method or request.methods[0]} yet; run its `rarefy fit` to the end first")
        target = card["target"] if isinstance(card["target"], str) else ""
        made = {"model": card["model"].get("name"), "site": card["sites"][0], "target": target, "context_size": request.context}
        made["dataset_path"] = request.data
    with screen.stage(f"write the {layout} layout"):
        found = load(folder)
        if not isinstance(found, Dictionary):
            raise Unsupported(f"{folder} holds a {found.name}; only dictionaries have these layouts")
        files = write_dictionary(found, out, layout, made=made)
    return Exported(out, layout, found.name, files)


@dataclass
class ImportRequest:
    """Everything `rarefy import` was asked for."""

    path: Path
    model: str
    out: Path
    site: str = ""
    target: str = ""
    data: str = "stdlib"
    context: int = 512
    tokens: int = 400_000


@dataclass
class Imported:
    """What was read and the run it became."""

    run: Path
    foreign: Foreign
    sites: list[str]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        method = self.foreign.method
        return {
            "schema": 1, "run": str(self.run), "format": self.foreign.layout, "method": method.name, "arguments": method.arguments,
            "sites": self.sites, "says": self.foreign.made,
        }

    def show(self, out: Path) -> None:
        """Say what became of it and what to do with it."""
        method = self.foreign.method
        Screen().say(
            f"{method.name} of {method.width} latents, from the {self.foreign.layout} layout, for {self.sites[0]}: {out}; next: rarefy judge {out}"
        )


def import_(request: ImportRequest, *, screen: Screen) -> Imported:
    """Make a run of a dictionary that another library trained, so that `judge`, `show` and the rest take it like one of ours."""
    check_context(request.context, tokens=request.tokens)
    with screen.stage(f"read {request.path}"):
        found = read_dictionary(request.path, transcodes=True if request.target else None)
    method, says = found.method, found.made
    site, target = request.site or says["site"] or "", request.target or (says["target"] if method.transcodes else "") or ""
    if not site or (method.transcodes and not target):
        option = "--target" if site else "--site"
        what = "what it reproduces" if site else "where it belongs"
        raise BadInput(f"{request.path} does not say {what}; give {option}, see `rarefy sites {request.model}`")
    fitted = FitRequest(
        methods=[method.name], model=request.model, out=request.out, site=site, data=request.data, width=method.width, k=getattr(method, "k", None),
        steps=0, context=request.context, tokens=request.tokens, target=target,
    )
    refuse_early(request.out, "fit", fitted.record())
    docs = read_documents(request.data, screen)
    model = opened(request.model, screen)
    flow = flow_of(fitted, [entry(method.name)], model, None)
    text = cut_text(docs, model, screen, context=request.context, fit_tokens=request.tokens, judge_tokens=1)
    probe(model, text, list(dict.fromkeys((*flow.sites, *flow.targets))))
    (read,), (reproduced,) = flow.widths(model.model, windows(text.fit)[:1])
    for what, there, mine in ((flow.sites[0], read, method.d_in), (flow.targets[0], reproduced, method.d_out)):
        if there != mine:
            raise BadInput(f"{request.path} has {mine} channels, {what} of {model.info.name} {there}; name the model and site it was trained on")
    if method.transcodes and not flow.transcodes:
        raise BadInput(f"{request.path} is a transcoder; give a --target other than {flow.sites[0]}")
    made = {
        "command": "fit", "request": fitted.record(), "model": model.card(), "seed": 0, "text": digest(text.fit), "sites": list(flow.sites),
        "target": flow.targets[0] if flow.transcodes else "", "imported": {"format": found.layout, "says": says},
    }
    with run_folder(request.out, made):
        save(method, method_folder(request.out, method.name))
    return Imported(request.out, found, list(flow.sites))
