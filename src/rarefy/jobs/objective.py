"""What `rarefy fit` trains dictionaries on: their own reconstruction, or the model's outputs with it in place; and from what they begin."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from ..builtin.corpus import Text
from ..errors import BadInput
from ..latents.dictionary import Dictionary
from ..latents.end_to_end import EndToEnd
from ..method import Sparse, not_negative
from ..store.methods import CARD, load
from ..streams import TensorStream, windows

if TYPE_CHECKING:
    from .fit import FitRequest

OBJECTIVES = ("local", "e2e", "e2e+downstream")


def check_objective(request: FitRequest) -> None:
    """Raise BadInput for an objective that is none, or settings that it cannot be combined with."""
    if request.objective not in OBJECTIVES:
        raise BadInput(f"--objective {request.objective!r} must be one of {', '.join(OBJECTIVES)}")
    if request.downstream is not None:
        if request.objective != "e2e+downstream":
            raise BadInput(f"--downstream weighs the later sites of --objective e2e+downstream; with {request.objective} leave it out")
        if not not_negative("downstream", request.downstream):
            raise BadInput("--downstream 0 looks at no later site; use --objective e2e")
    if request.objective == "local":
        return
    if request.store:
        raise BadInput(f"--store keeps activations, but --objective {request.objective} runs the model at every step: leave --store out")
    if request.batch < request.context:
        raise BadInput(f"--objective {request.objective} reads whole contexts: --batch {request.batch} must be at least --context {request.context}")


def check_plain(request: FitRequest, unit: str, name: str) -> None:
    """Raise BadInput where options of dictionaries are given to a method of another unit."""
    for option, given in (("objective", request.objective != "local"), ("downstream", request.downstream is not None),
                          ("resume-from", bool(request.resume_from))):
        if given:
            raise BadInput(f"--{option} is for dictionaries, and {name} selects {unit}s; leave it out")


def in_model(request: FitRequest, plan: Mapping[str, Sparse], model: nn.Module, site: str, target: str) -> dict[str, Sparse]:
    """The plan as it is trained: each dictionary by itself, or with the model that its reconstruction goes through."""
    if request.objective == "local":
        return dict(plan)
    weight = (1.0 if request.downstream is None else request.downstream) if request.objective == "e2e+downstream" else 0.0
    return {name: EndToEnd(cast(Dictionary, m), model, site, target=target, downstream=weight) for name, m in plan.items()}


def window_stream(request: FitRequest, text: Text) -> TensorStream:
    """Whole contexts of token ids, as many a step as there is room for in a batch."""
    ids_NT = windows(text.fit)
    size = request.batch // ids_NT.shape[1]
    if size > len(ids_NT):
        raise BadInput(f"a batch of {size} contexts is more than the text's {len(ids_NT)}; lower --batch or give more text")
    return TensorStream(ids_NT, size, seed=request.seed)


def take_up(plan: Mapping[str, Sparse], source: str) -> list[str]:
    """Give methods the tensors of a run, or of one saved method, to go on from; the names of those that have them now.

    Raises:
        BadInput: nothing saved there; another method, or one of other widths. Arguments that shape no tensor (k, penalties) may differ.
    """
    from .fit import method_folder

    trained = {name: method for name, method in plan.items() if method.fitted == "trained"}
    for name, method in trained.items():
        folder = Path(source) if (Path(source) / CARD).exists() else method_folder(Path(source), name)
        if not folder.exists():
            raise BadInput(f"--resume-from {source} holds no fitted {name}; give a run of `rarefy fit` with that method, or a folder in its methods/")
        old = load(folder)
        if old.name != method.name:
            raise BadInput(f"--resume-from {source} holds a {old.name}, not a {method.name}; name the method that is there")
        wrong = [f"{key} {shape} there, {mine} asked for" for key, shape, mine in _shapes(old, method) if shape != mine]
        if wrong:
            raise BadInput(f"--resume-from {source} does not fit: {wrong[0]}; give the same site, --target and --width")
        method.load_state_dict(old.state_dict())
    return list(trained)


def _shapes(old: Sparse, new: Sparse) -> list[tuple[str, Any, Any]]:
    a, b = old.state_dict(), new.state_dict()
    return [(key, list(a[key].shape) if key in a else None, list(b[key].shape) if key in b else None) for key in sorted(a.keys() | b.keys())]
