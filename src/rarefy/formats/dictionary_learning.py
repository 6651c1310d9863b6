"""dictionary_learning: a folder a trainer with ae.pt, a pickled state dict, and config.json.

Its classes store the decoder of a Linear as [D, F], and W_enc, W_dec of the others as [D, F], [F, D]. b_dec is taken from the
input but for AutoEncoderNew and JumpReluAutoEncoder. TopK selects by k although a threshold is stored; BatchTopK and Matryoshka
select by their threshold, of which -1, never set, lets every positive latent through. The pickle is read without unpickling.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Damaged, Unsupported
from . import torch_zip
from .files import config, only, take, whole
from .names import layer_of
from .plain import Plain, has_unit_rows, recentred

WEIGHTS, CFG = "ae.pt", "config.json"
_LINEAR = {"encoder.weight": "FD", "encoder.bias": "F", "decoder.weight": "DF"}
_MATRICES = {"W_enc": "DF", "b_enc": "F", "W_dec": "FD", "b_dec": "D"}
_SHAPES: dict[str, tuple[str, dict[str, str]]] = {
    "AutoEncoder": ("relu", {**_LINEAR, "bias": "D"}),
    "AutoEncoderNew": ("relu", {**_LINEAR, "decoder.bias": "D"}),
    "GatedAutoEncoder": ("gated", {
        "encoder.weight": "FD", "decoder.weight": "DF", "decoder_bias": "D", "r_mag": "F", "gate_bias": "F", "mag_bias": "F",
    }),
    "AutoEncoderTopK": ("topk", {**_LINEAR, "b_dec": "D", "threshold": ""}),
    "BatchTopKSAE": ("batch_topk", {**_LINEAR, "b_dec": "D", "threshold": ""}),
    "MatryoshkaBatchTopKSAE": ("matryoshka", {**_MATRICES, "threshold": ""}),
    "JumpReluAutoEncoder": ("jumprelu", {**_MATRICES, "threshold": "F"}),
}
"""dict_class -> kind and float tensors."""
_BIAS = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}
_ENCODER_BIAS = {"GatedAutoEncoder": "gate_bias", "MatryoshkaBatchTopKSAE": "b_enc", "JumpReluAutoEncoder": "b_enc"}
_UNCENTRED = ("AutoEncoderNew", "JumpReluAutoEncoder")
_KEPT = ("lm_name", "layer", "submodule_name", "seed", "lr", "steps")


def recognises(path: Path) -> bool:
    """A trainer's folder, a run's that holds such folders, or a .pt file of one."""
    return path.suffix == ".pt" or (path / WEIGHTS).is_file() or (path.is_dir() and next(path.glob(f"*/{WEIGHTS}"), None) is not None)


def read(path: Path) -> tuple[Plain, dict[str, Any]]:
    """The dictionary in a trainer's folder or .pt file, whose config.json lies beside it or one folder up."""
    if path.is_dir() and not (path / WEIGHTS).is_file():
        path = only(path, f"*/{WEIGHTS}", "dictionary_learning").parent
    weights = path / WEIGHTS if path.is_dir() else path
    beside, above = weights.parent / CFG, weights.parent.parent / CFG
    cfg_path = beside if beside.exists() or not above.exists() else above
    cfg = config(cfg_path)
    trainer, buffer = cfg.get("trainer"), cfg.get("buffer", {})
    if not isinstance(trainer, dict) or not isinstance(buffer, dict):
        raise Damaged(f"{cfg_path} has no trainer, or one that is no object")
    name = trainer.get("dict_class")
    if name not in _SHAPES:
        raise Unsupported(f"{cfg_path}: dict_class {str(name)[:40]!r} is not read; one of {', '.join(_SHAPES)}")
    kind, shapes = _SHAPES[name]
    found = torch_zip.read(weights)
    numbers = {key: found.pop(key) for key in ("k", "group_sizes") if key in found and (key == "k" or name == "MatryoshkaBatchTopKSAE")}
    sizes = {letter: whole(cfg_path, key, trainer[key]) for letter, key in (("D", "activation_dim"), ("F", "dict_size")) if key in trainer}
    tensors = take(weights, found, shapes, sizes, "threshold" if name == "AutoEncoderTopK" else "")
    matrices = "W_enc" in shapes
    W_enc_FD = tensors["W_enc"].T.contiguous() if matrices else tensors["encoder.weight"]
    W_dec_FD = tensors["W_dec"] if matrices else tensors["decoder.weight"].T.contiguous()
    more: dict[str, Any] = {}
    if kind in ("topk", "batch_topk", "matryoshka"):
        more["k"] = _k(numbers.get("k"), trainer.get("k"), len(W_enc_FD), weights, cfg_path)
    if kind == "matryoshka":
        more["prefixes"] = _prefixes(numbers.get("group_sizes"), len(W_enc_FD), weights)
    plain = Plain(
        kind, W_enc_FD, tensors[_ENCODER_BIAS.get(name, "encoder.bias")], W_dec_FD, tensors[_BIAS.get(name, "b_dec")], name not in _UNCENTRED, False,
        theta=None if kind == "topk" else tensors.get("threshold"), r_mag_F=tensors.get("r_mag"), b_mag_F=tensors.get("mag_bias"), **more,
    )
    made = {key: trainer[key] for key in _KEPT if isinstance(trainer.get(key), str | int | float)}
    return plain, made | {"model": trainer.get("lm_name"), "site": None, "dict_class": name, "io": str(buffer.get("io", "out"))[:20]}


def _k(stored: Tensor | None, said: Any, width: int, path: Path, cfg_path: Path) -> int:
    if stored is None:
        return whole(cfg_path, "k", said, width)
    if stored.ndim or stored.dtype not in (torch.int32, torch.int64):
        raise Damaged(f"{path}: k has shape {list(stored.shape)} and dtype {stored.dtype}; one whole number belongs there")
    k = whole(path, "k", int(stored), width)
    if said is not None and said != k:
        raise Damaged(f"{path} says k={k} and {cfg_path.name} says {str(said)[:20]}; they are not of one dictionary")
    return k


def _prefixes(groups: Tensor | None, width: int, path: Path) -> tuple[int, ...]:
    sound = groups is not None and groups.ndim == 1 and groups.dtype == torch.int64 and 0 < len(groups) <= 4096 and bool((groups > 0).all())
    if not sound or groups is None or int(groups.sum()) != width:
        raise Damaged(f"{path}: group_sizes must be whole numbers that add up to {width}")
    return tuple(groups.cumsum(0).tolist())


def write(plain: Plain, made: dict[str, Any]) -> dict[str, bytes]:
    """Files of one trainer's folder."""
    names = {kind: name for name, (kind, _) in _SHAPES.items() if name != "AutoEncoder"}
    name = names.get(plain.kind)
    if name is None or plain.transcodes:
        form = "class that says that it is a transcoder" if plain.transcodes else plain.kind
        raise Unsupported(f"dictionary_learning has no {form}; use the saelens or the sparsify layout")
    if name == "AutoEncoderNew" and has_unit_rows(plain):
        name = "AutoEncoder"                                   # which normalises its decoder when it is loaded
    plain = recentred(plain, name not in _UNCENTRED)
    shapes = _SHAPES[name][1]
    values: dict[str, Any] = {
        "encoder.weight": plain.W_enc_FD, "decoder.weight": plain.W_dec_FE.T, "W_enc": plain.W_enc_FD.T, "W_dec": plain.W_dec_FE,
        _ENCODER_BIAS.get(name, "encoder.bias"): plain.b_enc_F, _BIAS.get(name, "b_dec"): plain.b_dec_E, "r_mag": plain.r_mag_F,
        "mag_bias": plain.b_mag_F, "threshold": plain.theta if plain.theta is not None else torch.tensor(-1.0),
    }
    state: dict[str, Tensor] = {key: values[key].contiguous().clone() for key in shapes}
    trainer: dict[str, Any] = {"dict_class": name, "activation_dim": plain.d_in, "dict_size": plain.width}
    if plain.k:
        state["k"] = torch.tensor(plain.k, dtype=torch.int32)
        trainer["k"] = plain.k
    if plain.kind == "matryoshka":
        state["group_sizes"] = torch.tensor(plain.prefixes).diff(prepend=torch.zeros(1, dtype=torch.long))
    trainer |= {"layer": layer_of(made.get("site")), "lm_name": made.get("model"), "submodule_name": made.get("site")}
    file = io.BytesIO()
    torch.save(state, file)
    return {CFG: json.dumps({"trainer": trainer, "buffer": {}}, indent=1).encode(), WEIGHTS: file.getvalue()}
