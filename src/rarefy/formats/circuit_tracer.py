"""circuit-tracer's transcoders of single layers: config.yaml and one layer_N.safetensors a layer.

W_enc and W_dec are both [F, D]; nothing is taken from the input; ReLU, or JumpReLU where a threshold is stored, which is then
x 1[x > threshold] without a ReLU; a skip connection adds x W_skip^T. A config may name files elsewhere: those are never followed,
only layer files in the folder itself are read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import BadInput, Damaged, Unsupported
from ..store.fs import read_bounded
from ..store.tensors import to_bytes
from .files import only, safetensors, take
from .names import from_tracer, layer_of, tracer_hook
from .plain import Plain, recentred

CFG = "config.yaml"
_LAYER = re.compile(r"layer_(\d{1,5})\.safetensors", re.ASCII)
_THRESHOLD = "activation_function.threshold"
_SHAPES = {"W_enc": "FD", "b_enc": "F", "W_dec": "FD", "b_dec": "D", _THRESHOLD: "F", "W_skip": "DD"}
_MOST = 1 << 15


def recognises(path: Path) -> bool:
    """The folder, or one layer's file."""
    if path.is_file():
        return _LAYER.fullmatch(path.name) is not None
    return (path / CFG).is_file() and next(path.glob("layer_*.safetensors"), None) is not None


def read(path: Path) -> tuple[Plain, dict[str, Any]]:
    """The transcoder of one layer: of the file named, or of a folder that holds one."""
    path = only(path, "layer_*.safetensors", "circuit-tracer") if path.is_dir() else path
    match = _LAYER.fullmatch(path.name)
    if match is None:
        raise BadInput(f"{path} is not called layer_N.safetensors, from which the layer is known")
    layer, beside = int(match[1]), path.parent / CFG
    cfg = _config(beside) if beside.exists() else {}
    if cfg.get("model_kind", "transcoder_set") != "transcoder_set":
        raise Unsupported(f"{beside}: model_kind {str(cfg['model_kind'])[:40]!r} is not read; transcoder_set, transcoders of single layers")
    found = safetensors(path)
    if "k" in found or cfg.get("activation") == "topk":
        raise Unsupported(f"{path} selects the k largest without a ReLU, for which no dictionary here stands; give one with ReLU or JumpReLU")
    tensors = take(path, found, _SHAPES, {}, f"{_THRESHOLD} W_skip")
    theta = tensors.get(_THRESHOLD)
    if theta is not None and bool((theta < 0).any()):
        raise Unsupported(f"{path}: a threshold is negative, which lets negative latents through; no dictionary here does that")
    plain = Plain(
        "relu" if theta is None else "jumprelu", tensors["W_enc"], tensors["b_enc"], tensors["W_dec"], tensors["b_dec"], False, True,
        theta=theta, W_skip_ED=tensors.get("W_skip"),
    )
    hooks = {"site": cfg.get("feature_input_hook"), "target": cfg.get("feature_output_hook")}
    named = {key: from_tracer(hook, layer) for key, hook in hooks.items() if isinstance(hook, str)}
    return plain, {"model": cfg.get("model_name"), "site": None, "layer": layer, **named}


def _config(path: Path) -> dict[str, Any]:
    """config.yaml as a flat object of plain values; Damaged for tags, references, depth or size that a config does not need."""
    import yaml

    text = read_bounded(path, _MOST)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):          # one by one: thousands of nested brackets take it minutes
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > 8 or isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise Damaged(f"{path} is nested, or refers to parts of itself (& and *), which a config does not need")
        found = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeError, RecursionError, ValueError) as error:
        if isinstance(error, Damaged):
            raise
        raise Damaged(f"{path} is not plain YAML: {str(error)[:200]}") from error
    if not isinstance(found, dict) or not all(type(key) is str for key in found):
        raise Damaged(f"{path} is not an object of named values")
    return {key: value for key, value in found.items() if type(value) in (str, int, float, bool)}


def write(plain: Plain, made: dict[str, Any]) -> dict[str, bytes]:
    """config.yaml and the file of the site's layer; further layers are written into the same folder."""
    import yaml

    if plain.kind not in ("relu", "jumprelu", "batch_topk", "matryoshka"):
        raise Unsupported(f"circuit-tracer has ReLU and JumpReLU, not {plain.kind}; convert to it first (rarefy.latents.convert.to_jumprelu)")
    if not plain.transcodes or plain.d_in != plain.d_out:
        raise Unsupported("circuit-tracer takes transcoders (--target) between places of one width; use another layout")
    layer = layer_of(made.get("site"))
    if layer is None:
        raise BadInput(f"the site {made.get('site')!r} names no layer, after which circuit-tracer's file is called; give one such as layers.3.mlp.in")
    plain = recentred(plain, False)
    state = {"W_enc": plain.W_enc_FD, "b_enc": plain.b_enc_F, "W_dec": plain.W_dec_FE, "b_dec": plain.b_dec_E}
    if plain.kind != "relu":
        state[_THRESHOLD] = plain.theta_F
    if plain.W_skip_ED is not None:
        state["W_skip"] = plain.W_skip_ED
    cfg = {
        "model_name": made.get("model"), "model_kind": "transcoder_set", "feature_input_hook": tracer_hook(made.get("site")),
        "feature_output_hook": tracer_hook(made.get("target")), "scan": None,
    }
    return {CFG: yaml.safe_dump(cfg, sort_keys=False).encode(), f"layer_{layer}.safetensors": to_bytes(state)}
