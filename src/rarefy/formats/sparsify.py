"""sparsify: a folder a site with cfg.json and sae.safetensors.

encoder.weight and W_dec are both [F, D]. Autoencoders take b_dec from the input, whatever `normalize_decoder` says; transcoders
do not. `num_latents` 0 means expansion_factor times D. Both activations are ReLUs first: the k largest, or the largest of each
of k equal groups. A skip connection adds x W_skip^T.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import Damaged, Unsupported
from ..store.tensors import to_bytes
from .files import config, only, safetensors, take, whole
from .plain import Plain, has_unit_rows, recentred

CFG, WEIGHTS = "cfg.json", "sae.safetensors"
_KINDS = {"topk": "topk", "groupmax": "group_max"}


def recognises(path: Path) -> bool:
    """A site's folder, or a run's that holds such folders."""
    return (path / WEIGHTS).is_file() or (path.is_dir() and next(path.glob(f"*/{WEIGHTS}"), None) is not None)


def read(path: Path) -> tuple[Plain, dict[str, Any]]:
    """The dictionary in a folder, and what it says it was made of; its folder's name is the site's."""
    path = path if (path / WEIGHTS).is_file() else only(path, f"*/{WEIGHTS}", "sparsify").parent
    cfg_path = path / CFG
    cfg = config(cfg_path)
    for key in ("transcode", "skip_connection", "signed"):
        if type(cfg.setdefault(key, False)) is not bool:
            raise Damaged(f"{cfg_path}: {key} is {str(cfg[key])[:20]!r}; true or false belongs there")
    kind = _KINDS.get(str(cfg.get("activation", "topk")))
    if kind is None or cfg["signed"]:
        word = "signed" if cfg["signed"] else str(cfg.get("activation"))[:40]
        raise Unsupported(f"{cfg_path}: activation {word!r} is not read; one of {', '.join(_KINDS)}")
    d = whole(cfg_path, "d_in", cfg.get("d_in"))
    number = cfg.get("num_latents") or d * whole(cfg_path, "expansion_factor", cfg.get("expansion_factor", 32))
    width = whole(cfg_path, "num_latents", number)
    shapes = {"encoder.weight": "FD", "encoder.bias": "F", "W_dec": "FD", "b_dec": "D"} | ({"W_skip": "DD"} if cfg["skip_connection"] else {})
    tensors = take(path / WEIGHTS, safetensors(path / WEIGHTS), shapes, {"D": d, "F": width})
    plain = Plain(
        kind, tensors["encoder.weight"], tensors["encoder.bias"], tensors["W_dec"], tensors["b_dec"], centred=not cfg["transcode"],
        transcodes=cfg["transcode"], k=whole(cfg_path, "k", cfg.get("k", 32), width), W_skip_ED=tensors.get("W_skip"),
    )
    if kind == "group_max" and width % plain.k:
        raise Damaged(f"{cfg_path}: {width} latents do not divide into k={plain.k} groups")
    return plain, {"site": path.name, "hookpoint": path.name, "activation": cfg.get("activation", "topk")}


def write(plain: Plain, made: dict[str, Any]) -> dict[str, bytes]:
    """Files of one site's folder."""
    activation = {kind: word for word, kind in _KINDS.items()}.get(plain.kind)
    if activation is None:
        raise Unsupported(f"sparsify keeps the k largest latents, or one of each group, and has no {plain.kind}; use the saelens layout")
    if plain.d_in != plain.d_out:
        raise Unsupported(f"sparsify's transcoders reproduce rows as wide as they read, not {plain.d_out} from {plain.d_in} channels")
    plain = recentred(plain, not plain.transcodes)
    cfg = {
        "activation": activation, "expansion_factor": max(1, plain.width // plain.d_in),
        "normalize_decoder": not plain.transcodes and has_unit_rows(plain),
        "num_latents": plain.width, "k": plain.k, "multi_topk": False,
        "skip_connection": plain.W_skip_ED is not None, "transcode": plain.transcodes, "d_in": plain.d_in,
    }
    state = {"encoder.weight": plain.W_enc_FD, "encoder.bias": plain.b_enc_F, "W_dec": plain.W_dec_FE, "b_dec": plain.b_dec_E}
    if plain.W_skip_ED is not None:
        state["W_skip"] = plain.W_skip_ED
    return {CFG: json.dumps(cfg, indent=1).encode(), WEIGHTS: to_bytes(state)}
