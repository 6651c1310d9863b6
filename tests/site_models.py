"""Tiny models of every family, from configs and random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import nn

VOCAB = 61
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
GQA = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": 0}
GEMMA = {**GQA, "head_dim": 8}
MOE = {**GQA, "num_experts_per_tok": 2}


def _gemma3(**more: Any) -> Any:
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GEMMA, layer_types=["full_attention"] * 2, **more))


def _gemma2(**more: Any) -> Any:
    settings = {"layer_types": ["full_attention"] * 2, "attn_logit_softcapping": None, **more}
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**GEMMA, **settings))


def _neox(parallel: bool) -> Any:
    return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SIZES, intermediate_size=48, use_parallel_residual=parallel))


def _gpt2(**more: Any) -> Any:
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, **more))


def _opt(**more: Any) -> Any:
    settings = {"word_embed_proj_dim": 32, "ffn_dim": 48, **more}
    return tf.OPTForCausalLM(tf.OPTConfig(**SIZES, **settings))


BUILDERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GQA)),
    "llama_wide_heads": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GQA, head_dim=12, attention_bias=True)),
    "llama_tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GQA, tie_word_embeddings=True)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**GQA, sliding_window=None)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**GQA)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GEMMA)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**GEMMA)),
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "neox_parallel": lambda: _neox(True),
    "neox_sequential": lambda: _neox(False),
    "opt": _opt,
    "opt_post_norm": lambda: _opt(do_layer_norm_before=False),
    "opt_projected": lambda: _opt(word_embed_proj_dim=16),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**SIZES, intermediate_size=48)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**MOE, num_local_experts=4, sliding_window=None)),
    "qwen2_moe": lambda: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(**MOE, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=24, mlp_only_layers=[1])
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**MOE, head_dim=8, num_experts=4, moe_intermediate_size=16)),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZES, intermediate_size=48)),
    "vit": lambda: tf.ViTForImageClassification(
        tf.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4)
    ),
}
NAMES = tuple(BUILDERS)
DECODERS = tuple(name for name in NAMES if name not in ("bert", "vit"))


def build(name: str, seed: int = 0) -> Any:
    """The model in eval mode, with norms and biases that are not at their trivial starting values."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BUILDERS[name]() if name in BUILDERS else ADAPTED[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


ADAPTED: dict[str, Callable[[], Any]] = {
    "gemma2_capped": lambda: _gemma2(attn_logit_softcapping=50.0),
    "gemma3_sliding": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**GEMMA, layer_types=["sliding_attention", "full_attention"], sliding_window=8)
    ),
    "mistral_sliding": lambda: tf.MistralForCausalLM(tf.MistralConfig(**GQA, sliding_window=8)),
}


def inputs(name: str, batch: int = 2, tokens: int = 7, seed: int = 1) -> dict[str, torch.Tensor]:
    """What the model takes."""
    random = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=random)}
    return {"input_ids": torch.randint(3, VOCAB, (batch, tokens), generator=random)}


def run(model: nn.Module, **what: Any) -> torch.Tensor:
    """Logits without gradients."""
    with torch.no_grad():
        return model(**what).logits
