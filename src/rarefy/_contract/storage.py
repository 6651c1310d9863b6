"""Laws about keeping a method: L7, C1, C2."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch

from ..errors import BadInput, Damaged
from ..method import Sparse
from ..store.methods import load, save
from .spec import Broken, Case, Law, same_bits, same_state, state_of


def state_dict_round_trip(case: Case) -> None:
    """L7: state_dict of a fitted method into a fresh one gives the same bits."""
    for dtype in (torch.float32, torch.bfloat16):
        method, inputs = case.ready(dtype=dtype), case.inputs(6, dtype=dtype)
        other = case.fresh().to(dtype)
        other.load_state_dict(copy.deepcopy(method.state_dict()), strict=True)
        with torch.no_grad():
            same_bits(other.eval()(*inputs), method(*inputs), f"output after a state_dict round trip in {dtype}")


def file_round_trip(case: Case) -> None:
    """C1: saved and loaded, the same bits, dtypes and arguments, without pickle."""
    with tempfile.TemporaryDirectory() as root:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            method, inputs = case.ready(dtype=dtype), case.inputs(6, dtype=dtype)
            folder = Path(root) / str(dtype).removeprefix("torch.")
            save(method, folder)
            other = load(folder, type(method))
            same_state(dict(method.state_dict()), dict(other.state_dict()), f"saved in {dtype}")
            if other.arguments != method.arguments:
                raise Broken(f"arguments went from {method.arguments} to {other.arguments}")
            with torch.no_grad():
                same_bits(other(*inputs), method(*inputs), f"output after save and load in {dtype}")


def refuses_others(case: Case) -> None:
    """C2: another method's file, another width, missing and extra tensors are refused by name."""
    method = case.ready()

    class Other(type(method)):  # type: ignore[misc]
        name = "other/method"

    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "m"
        save(method, folder)
        _refused(folder, Other, "other/method", "another method's file")
        extra = case.ready()
        extra.register_buffer("stowaway", torch.zeros(3))
        _saved_then_refused(extra, folder, "stowaway", "an extra tensor")
        for key, value in method.state_dict().items():
            other = case.ready()
            _drop(other, key)
            _saved_then_refused(other, folder, key, f"a missing {key}")
            if value.ndim:
                other = case.ready()
                held = dict(other.named_parameters()) | dict(other.named_buffers())
                wider = torch.cat((held[key].detach(), held[key].detach()[:1]))
                _drop(other, key)
                home, leaf = _home(other, key)
                home.register_buffer(leaf, wider)
                _saved_then_refused(other, folder, key, f"another width of {key}")
        same_state(state_of(method), state_of(case.ready()), "the method that was saved")


def _home(method: Sparse, key: str) -> tuple[torch.nn.Module, str]:
    """The part of the method that holds a tensor, and its name there."""
    path, _, leaf = key.rpartition(".")
    return method.get_submodule(path), leaf


def _drop(method: Sparse, key: str) -> None:
    home, leaf = _home(method, key)
    home._parameters.pop(leaf, None)
    home._buffers.pop(leaf, None)


def _saved_then_refused(method: Sparse, folder: Path, word: str, what: str) -> None:
    save(method, folder)
    _refused(folder, type(method), word, what)


def _refused(folder: Path, cls: type[Sparse], word: str, what: str) -> None:
    try:
        load(folder, cls)
    except (BadInput, Damaged) as error:
        if word in str(error):
            return
        raise Broken(f"{what}: the message does not name {word!r}: {error}") from error
    raise Broken(f"{what} was loaded")


LAWS: dict[str, Law] = {
    "L7 state_dict round trip": state_dict_round_trip,
    "C1 save and load": file_round_trip,
    "C2 foreign files are refused": refuses_others,
}
