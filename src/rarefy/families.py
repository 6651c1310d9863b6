"""Where things are in each family of Hugging Face models: one table, no code per family.

Paths are relative to the backbone or, after the layers, to one layer. "a.b" is a module; "a.b<" its input, "a.b>" its
output. A site that a family lacks is simply not in its row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .errors import Unsupported


@dataclass(frozen=True)
class Family:
    """One row of the table."""

    name: str
    types: tuple[str, ...]
    """`config.model_type` values."""
    backbone: str
    """Attribute path from the model with a head to the stack of layers; "" is tried as well."""
    embed: str
    layers: str
    attn: str
    """The attention module, within a layer."""
    streams: dict[str, str]
    """resid_mid, attn.in, attn.out, mlp.in, mlp.out within a layer; resid_pre and resid_post are the layer's own."""
    linears: dict[str, str]
    """Canonical projection name -> path within a layer."""
    final_norm: str = ""
    mid_adds: str = ""
    """Module whose output is added to resid_pre to make resid_mid; "" where resid_mid is a module's own output."""
    qkv: str = ""
    """How a fused qkv_proj is laid out: "concat" ([q | k | v]) or "per_head" ([q k v] of each head)."""
    head: str = "lm_head"


_LLAMA_LINEARS = {
    "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "down_proj": "mlp.down_proj",
}
_LLAMA_STREAMS = {
    "resid_mid": "post_attention_layernorm<", "attn.in": "self_attn<", "attn.out": "self_attn>", "mlp.in": "mlp<", "mlp.out": "mlp>",
}
_BERT_STREAMS = {
    "resid_mid": "attention.output>", "attn.in": "attention.self<", "attn.out": "attention.output.dense>", "mlp.in": "intermediate<",
    "mlp.out": "output.dense>",
}
_BERT_LINEARS = {
    "q_proj": "attention.self.query", "k_proj": "attention.self.key", "v_proj": "attention.self.value",
    "o_proj": "attention.output.dense", "up_proj": "intermediate.dense", "down_proj": "output.dense",
}

FAMILIES: tuple[Family, ...] = (
    Family(
        "llama", ("llama", "mistral", "qwen2", "qwen3", "gemma"), "model", "embed_tokens", "layers", "self_attn",
        _LLAMA_STREAMS, _LLAMA_LINEARS, "norm", "self_attn",
    ),
    Family(
        "gemma2", ("gemma2", "gemma3_text"), "model", "embed_tokens", "layers", "self_attn",
        {**_LLAMA_STREAMS, "resid_mid": "pre_feedforward_layernorm<"}, _LLAMA_LINEARS, "norm", "post_attention_layernorm",
    ),
    Family(
        "moe", ("mixtral", "qwen2_moe", "qwen3_moe"), "model", "embed_tokens", "layers", "self_attn",
        _LLAMA_STREAMS, _LLAMA_LINEARS, "norm", "self_attn",
    ),
    Family(
        "gpt2", ("gpt2",), "transformer", "wte", "h", "attn",
        {"resid_mid": "ln_2<", "attn.in": "attn<", "attn.out": "attn>", "mlp.in": "mlp<", "mlp.out": "mlp>"},
        {"qkv_proj": "attn.c_attn", "o_proj": "attn.c_proj", "up_proj": "mlp.c_fc", "down_proj": "mlp.c_proj"},
        "ln_f", "attn", "concat",
    ),
    Family(
        "gpt_neox", ("gpt_neox",), "gpt_neox", "embed_in", "layers", "attention",
        {"resid_mid": "post_attention_layernorm<", "attn.in": "attention<", "attn.out": "attention>", "mlp.in": "mlp<", "mlp.out": "mlp>"},
        {"qkv_proj": "attention.query_key_value", "o_proj": "attention.dense", "up_proj": "mlp.dense_h_to_4h", "down_proj": "mlp.dense_4h_to_h"},
        "final_layer_norm", "attention", "per_head",
    ),
    Family(
        "opt", ("opt",), "model.decoder", "embed_tokens", "layers", "self_attn",
        {"resid_mid": "final_layer_norm<", "attn.in": "self_attn<", "attn.out": "self_attn>", "mlp.in": "fc1<", "mlp.out": "fc2>"},
        {"q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "o_proj": "self_attn.out_proj",
         "up_proj": "fc1", "down_proj": "fc2"},
        "final_layer_norm", "self_attn",
    ),
    Family(
        "phi", ("phi",), "model", "embed_tokens", "layers", "self_attn",
        {"attn.in": "self_attn<", "attn.out": "self_attn>", "mlp.in": "mlp<", "mlp.out": "mlp>"},
        {"q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "o_proj": "self_attn.dense",
         "up_proj": "mlp.fc1", "down_proj": "mlp.fc2"},
        "final_layernorm",
    ),
    Family(
        "bert", ("bert",), "bert", "embeddings", "encoder.layer", "attention.self", _BERT_STREAMS, _BERT_LINEARS, head="cls",
    ),
    Family(
        "roberta", ("roberta", "xlm-roberta", "camembert"), "roberta", "embeddings", "encoder.layer", "attention.self", _BERT_STREAMS, _BERT_LINEARS,
    ),
    Family(
        "distilbert", ("distilbert",), "distilbert", "embeddings", "transformer.layer", "attention",
        {"resid_mid": "sa_layer_norm>", "attn.in": "attention<", "attn.out": "attention>", "mlp.in": "ffn<", "mlp.out": "ffn>"},
        {"q_proj": "attention.q_lin", "k_proj": "attention.k_lin", "v_proj": "attention.v_lin", "o_proj": "attention.out_lin",
         "up_proj": "ffn.lin1", "down_proj": "ffn.lin2"},
        head="vocab_projector",
    ),
    Family(
        "vit", ("vit", "deit"), "vit", "embeddings", "layers", "attention",
        {"resid_mid": "layernorm_after<", "attn.in": "attention<", "attn.out": "attention>", "mlp.in": "mlp<", "mlp.out": "mlp>"},
        {"q_proj": "attention.q_proj", "k_proj": "attention.k_proj", "v_proj": "attention.v_proj", "o_proj": "attention.o_proj",
         "up_proj": "mlp.fc1", "down_proj": "mlp.fc2"},
        "layernorm", "attention", head="classifier",
    ),
)
_BY_TYPE = {t: family for family in FAMILIES for t in family.types}

_BIAS, _OWN, _PAIR = "adds a bias of its own to the logits", "is computed by the model's own code", "is that of an encoder and a decoder"
ODD_ATTENTION = {
    "gpt_oss": "has learned sinks in its softmax", "swin": _BIAS, "bloom": _BIAS, "mpt": _BIAS, "t5": _BIAS, "deberta-v2": _BIAS, "falcon": _OWN,
    "gptj": _OWN, "codegen": _OWN, "bart": _PAIR, "whisper": _PAIR, "marian": _PAIR, "mamba": "is not there",
}
"""Types without a row whose attention no method could stand in for as it is -> why."""


def config_of(model: nn.Module) -> Any:
    """The model's transformers config."""
    return model.config


def _type_of(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def family_of(model: nn.Module) -> Family:
    """The row of a model, by its config's model_type."""
    kind = _type_of(model)
    if kind is None:
        inner = "; give the model it wraps, its .module" if isinstance(getattr(model, "module", None), nn.Module) else ""
        raise Unsupported(f"a {type(model).__name__} has no config that says what model it is{inner}. Raw module paths work on any model")
    if kind not in _BY_TYPE and (why := ODD_ATTENTION.get(kind)):
        raise Unsupported(f"models of type {kind!r} have no table of sites: their attention {why}. Raw module paths work on any model")
    if kind not in _BY_TYPE:
        inside = next((at for at, m in model.named_modules() if hasattr(m, "base_model_prefix") and _type_of(m) in _BY_TYPE), "")
        hint = f"; its {inside} is one that has: give that" if inside else f"; known: {', '.join(_BY_TYPE)}"
        raise Unsupported(f"models of type {kind!r} have no table of sites yet{hint}. Raw module paths work on any model")
    return _BY_TYPE[kind]


def backbone_path(model: nn.Module, family: Family) -> str:
    """Path to the backbone: the table's, what the model's class calls it, or "" when the model is the backbone itself."""
    candidates = [family.backbone, family.backbone.rpartition(".")[2], getattr(model, "base_model_prefix", ""), ""]
    for path in candidates:
        try:
            model.get_submodule(f"{path}.{family.layers}" if path else family.layers)
        except AttributeError:
            continue
        return path
    raise Unsupported(f"{type(model).__name__} has no {family.layers!r} where {family.name} models keep their layers")


def why_no_middle(model: nn.Module, family: Family) -> str:
    """Why this model has no resid_mid; "" if it has one."""
    if family.name == "phi" or (family.name == "gpt_neox" and config_of(model).use_parallel_residual):
        return "attention and MLP of this model run in parallel, so no stream lies between them"
    if family.name == "opt" and not config_of(model).do_layer_norm_before:
        return "this model normalises the stream itself after attention (do_layer_norm_before=False), so no module reads the sum"
    return ""
