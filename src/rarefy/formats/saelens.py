"""SAELens: a folder with cfg.json and sae_weights.safetensors, in its words since version 6 and before.

W_enc is stored [D, F]. b_dec is taken from the input where `apply_b_dec_to_input`. TopK ranks by pre-activation times decoder
norm where `rescale_acts_by_decoder_norm`; BatchTopK and Matryoshka are jumprelu with one threshold once training is over.
Transcoders never take b_dec from the input. Normalisation of every row by its own statistics cannot be folded into weights and
is refused; a constant factor (`expected_average_only_in`) is folded where its activation_scaler.json lies beside the weights, and
is otherwise in the weights already.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import Damaged, Unsupported
from ..store.tensors import to_bytes
from .files import config, safetensors, take, whole
from .names import lens_name
from .plain import Plain, recentred, unit_rows

CFG, WEIGHTS, SCALER, WHITENING = "cfg.json", "sae_weights.safetensors", "activation_scaler.json", "activation_whitening.safetensors"
_AUTOENCODER = {"W_enc": "DF", "b_enc": "F", "W_dec": "FE", "b_dec": "E"}
_GATED = {"W_enc": "DF", "W_dec": "FE", "b_dec": "E", "b_gate": "F", "b_mag": "F", "r_mag": "F"}
_KINDS = {
    "standard": "relu", "topk": "topk", "abstopk": "abs_topk", "jumprelu": "jumprelu", "gated": "gated", "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "matryoshka", "transcoder": "relu", "skip_transcoder": "relu", "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_WRITTEN = {
    "relu": "standard", "topk": "topk", "abs_topk": "abstopk", "jumprelu": "jumprelu", "gated": "gated", "batch_topk": "jumprelu",
    "matryoshka": "jumprelu",
}
_METADATA = ("model_name", "hook_name", "hook_name_out", "hook_layer", "dataset_path", "context_size", "prepend_bos", "neuronpedia_id")


def recognises(path: Path) -> bool:
    """A folder with its file of weights."""
    return (path / WEIGHTS).is_file()


def read(path: Path) -> tuple[Plain, dict[str, Any]]:
    """The dictionary in a folder, and what it says it was made of."""
    cfg_path, weights_path = path / CFG, path / WEIGHTS
    cfg = _since_6(config(cfg_path), cfg_path)
    metadata = cfg["metadata"]
    name = cfg.get("architecture")
    if name not in _KINDS:
        raise Unsupported(f"{cfg_path}: architecture {str(name)[:40]!r} is not read; one of {', '.join(_KINDS)}")
    sizes = {"D": whole(cfg_path, "d_in", cfg.get("d_in")), "F": whole(cfg_path, "d_sae", cfg.get("d_sae"))}
    transcodes = "transcoder" in name
    sizes["E"] = whole(cfg_path, "d_out", cfg.get("d_out")) if transcodes else sizes["D"]
    tensors = _tensors(name, safetensors(weights_path), weights_path, sizes, cfg)
    kind = _KINDS[name]
    more: dict[str, Any] = {}
    if "topk" in kind or kind == "matryoshka":
        number: Any = cfg.get("k")
        average = isinstance(number, float) and kind in ("batch_topk", "matryoshka")     # k latents on average need not be whole
        more["k"] = max(1, round(number)) if average and 0 < number <= sizes["F"] else whole(cfg_path, "k", number, sizes["F"])
    if kind == "matryoshka":
        more["prefixes"] = _prefixes(cfg.get("matryoshka_widths"), sizes["F"], cfg_path)
    centred = cfg.get("apply_b_dec_to_input", True)
    if type(centred) is not bool or (centred and transcodes):
        raise Damaged(f"{cfg_path}: apply_b_dec_to_input is {str(centred)[:20]}; true or false belongs there, and false for a transcoder")
    gated = kind == "gated"
    plain = Plain(
        kind, tensors["W_enc"].T.contiguous(), tensors["b_gate" if gated else "b_enc"], tensors["W_dec"], tensors["b_dec"], centred, transcodes,
        theta=tensors.get("threshold", tensors.get("topk_threshold")), r_mag_F=tensors.get("r_mag"), b_mag_F=tensors.get("b_mag"),
        W_skip_ED=tensors.get("W_skip"), **more,
    )
    if "k" in more and cfg.get("rescale_acts_by_decoder_norm"):
        plain = _ranked_by_norm(plain)
    plain = _unscaled(plain, cfg.get("normalize_activations", "none"), path)
    made = {key: metadata[key] for key in _METADATA if isinstance(metadata.get(key), str | int | bool)}
    made |= {"site": metadata.get("hook_name"), "target": metadata.get("hook_name_out") if transcodes else None, "model": metadata.get("model_name")}
    return plain, made | {"architecture": name, "sae_lens_version": str(metadata.get("sae_lens_version"))}


def _since_6(cfg: dict[str, Any], path: Path) -> dict[str, Any]:
    """The config in the words of version 6, of which `metadata` is one."""
    metadata = cfg.get("metadata", {})
    if not isinstance(metadata, dict):
        raise Damaged(f"{path}: metadata is a {type(metadata).__name__}, not an object")
    version = str(cfg.get("sae_lens_version") or metadata.get("sae_lens_version") or "0")
    if (major := re.match(r"\d+", version)) and int(major[0][:9]) >= 6:
        return {**cfg, "metadata": metadata}
    old = {{"hook_point": "hook_name", "activation_fn_str": "activation_fn"}.get(key, key): value for key, value in cfg.items()}
    old.setdefault("architecture", "standard")
    function, kwargs = old.get("activation_fn", "relu"), old.get("activation_fn_kwargs") or {}
    if function not in ("relu", "topk") or not isinstance(kwargs, dict):
        raise Unsupported(f"{path}: activation {str(function)[:40]!r} is not read; relu or topk")
    if function == "topk":
        old |= {"architecture": "topk", "k": kwargs.get("k", old.get("k"))}
    if old["architecture"] not in ("standard", "topk", "jumprelu", "gated"):
        raise Unsupported(f"{path}: architecture {str(old['architecture'])[:40]!r} of SAELens before version 6 is not read")
    normalised = old.get("normalize_activations")
    if normalised is None or type(normalised) is bool:
        old["normalize_activations"] = "expected_average_only_in" if normalised else "none"
    return {**old, "metadata": {**old, "sae_lens_version": version if version != "0" else "before 6"}}


def _tensors(name: str, found: dict[str, Tensor], path: Path, sizes: dict[str, int], cfg: dict[str, Any]) -> dict[str, Tensor]:
    shapes = dict(_GATED if name == "gated" else _AUTOENCODER)
    if "jumprelu" in name:
        shapes["threshold"] = "F"
    if name in ("batchtopk", "matryoshka_batchtopk"):
        shapes["topk_threshold"] = ""
    if "skip" in name:
        shapes["W_skip"] = "ED"
    if "scaling_factor" in found and "transcoder" not in name:
        shapes["scaling_factor"] = "F"
    tensors = take(path, found, shapes, sizes)
    if (factor_F := tensors.pop("scaling_factor", None)) is not None and not bool((factor_F == 1).all()):
        if not cfg.get("finetuning_scaling_factor"):
            raise Damaged(f"{path} holds a scaling_factor that {CFG} does not speak of (finetuning_scaling_factor)")
        tensors["W_dec"] = tensors["W_dec"] * factor_F[:, None]           # latents are multiplied by it when they are decoded
    return tensors


def _prefixes(widths: Any, width: int, path: Path) -> tuple[int, ...]:
    if not isinstance(widths, list) or len(widths) > 4096:
        raise Damaged(f"{path}: matryoshka_widths is no list of widths")
    found = tuple(whole(path, "matryoshka_widths", n, width) for n in widths)
    if any(a >= b for a, b in zip(found, (*found[1:], width + 1), strict=True)):
        raise Damaged(f"{path}: matryoshka_widths must rise, up to {width}")
    return found if found and found[-1] == width else (*found, width)


def _ranked_by_norm(plain: Plain) -> Plain:
    """Decoder norms folded. A threshold compared with pre-activations times norm (BatchTopK in training) stays as it is."""
    return dataclasses.replace(unit_rows(plain), theta=plain.theta)


def _unscaled(plain: Plain, normalised: Any, path: Path) -> Plain:
    """Raw units, where weights were trained on activations times a constant."""
    if normalised not in ("none", "expected_average_only_in"):
        raise Unsupported(
            f"{path / CFG}: normalize_activations {str(normalised)[:40]!r} depends on every row or on a matrix, and is not folded into weights; "
            "train without it, or fold it with SAELens and save again"
        )
    if (path / WHITENING).exists():
        raise Unsupported(f"{path} holds {WHITENING}: weights for whitened activations; finish its training in SAELens, which folds it in")
    if normalised == "none" or plain.transcodes or not (path / SCALER).exists():
        return plain
    factor = config(path / SCALER).get("scaling_factor")
    if factor is None:
        return plain
    if type(factor) not in (int, float) or not 0 < factor < 1e30:
        raise Damaged(f"{path / SCALER}: scaling_factor is {str(factor)[:40]!r}; a number above 0 belongs there")

    def over(value: Tensor | None) -> Tensor | None:
        return None if value is None else (value.double() / factor).float()

    # f / factor in place of f: encoder and decoder keep their bits
    return dataclasses.replace(
        plain, b_enc_F=over(plain.b_enc_F), b_mag_F=over(plain.b_mag_F), b_dec_E=over(plain.b_dec_E), theta=over(plain.theta),
    )


def write(plain: Plain, made: dict[str, Any]) -> dict[str, bytes]:
    """Files in the words of version 6."""
    name = _WRITTEN.get(plain.kind)
    if plain.transcodes:
        skip = "skip_" if plain.W_skip_ED is not None else ""
        name = {"standard": f"{skip}transcoder", "jumprelu": f"jumprelu_{skip}transcoder"}.get(name or "")
    if name is None:
        form = f"{plain.kind} transcoder" if plain.transcodes else plain.kind
        raise Unsupported(f"SAELens has no {form}; convert to jumprelu first (rarefy.latents.convert.to_jumprelu), or use the sparsify layout")
    plain = recentred(plain, False) if plain.transcodes else plain
    metadata = _metadata(made)
    by_head = str(metadata["hook_name"]).endswith("hook_z") and not plain.transcodes          # TransformerLens gives z as [..., heads, d_head]
    cfg: dict[str, Any] = {
        "d_in": plain.d_in, "d_sae": plain.width, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": plain.centred,
        "normalize_activations": "none", "reshape_activations": "hook_z" if by_head else "none", "metadata": metadata, "architecture": name,
    }
    if "topk" in name:
        cfg |= {"k": plain.k, "rescale_acts_by_decoder_norm": False}
    if plain.transcodes:
        cfg["d_out"] = plain.d_out
    return {CFG: json.dumps(cfg, indent=1).encode(), WEIGHTS: to_bytes(_state(plain, name))}


def write_v5(plain: Plain, made: dict[str, Any]) -> dict[str, bytes]:
    """Files in the words of version 5."""
    name = _WRITTEN.get(plain.kind)
    if plain.transcodes or name in (None, "abstopk"):
        form = "transcoder" if plain.transcodes else plain.kind
        raise Unsupported(f"SAELens 5 has no {form}; use the saelens layout of version 6, or convert it (rarefy.latents.convert.to_jumprelu)")
    metadata = _metadata(made)
    cfg = {
        "architecture": "standard" if name == "topk" else name, "d_in": plain.d_in, "d_sae": plain.width, "dtype": "float32", "device": "cpu",
        "model_name": metadata["model_name"], "hook_name": metadata["hook_name"], "hook_layer": made.get("layer", 0), "hook_head_index": None,
        "activation_fn_str": "topk" if name == "topk" else "relu", "activation_fn_kwargs": {"k": plain.k} if name == "topk" else {},
        "apply_b_dec_to_input": plain.centred, "finetuning_scaling_factor": False, "normalize_activations": "none",
        "context_size": made.get("context_size"), "dataset_path": made.get("dataset_path"), "dataset_trust_remote_code": False,
        "prepend_bos": True, "sae_lens_training_version": None, "neuronpedia_id": None, "model_from_pretrained_kwargs": {},
        "sae_lens_version": "5.11.0",
    }
    return {CFG: json.dumps(cfg, indent=1).encode(), WEIGHTS: to_bytes(_state(plain, str(name)))}


def _state(plain: Plain, name: str) -> dict[str, Tensor]:
    state = {"W_enc": plain.W_enc_FD.T, "W_dec": plain.W_dec_FE, "b_dec": plain.b_dec_E}
    if name == "gated":
        assert plain.r_mag_F is not None and plain.b_mag_F is not None
        return state | {"b_gate": plain.b_enc_F, "r_mag": plain.r_mag_F, "b_mag": plain.b_mag_F}
    state["b_enc"] = plain.b_enc_F
    if plain.W_skip_ED is not None:
        state["W_skip"] = plain.W_skip_ED
    return state | ({"threshold": plain.theta_F} if "jumprelu" in name else {})


def _metadata(made: dict[str, Any]) -> dict[str, Any]:
    out = {
        "sae_lens_version": "6.0.0", "sae_lens_training_version": None, "model_name": made.get("model"), "hook_name": lens_name(made.get("site")),
        "model_class_name": "AutoModelForCausalLM", "hook_head_index": None, "context_size": made.get("context_size"),
        "dataset_path": made.get("dataset_path"), "prepend_bos": True, "neuronpedia_id": None,
    }
    return out | ({"hook_name_out": lens_name(made["target"])} if made.get("target") else {})
