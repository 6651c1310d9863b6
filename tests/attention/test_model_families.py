"""Which models attention methods can be put into: every row of the table in docs/attention-in-a-model.md, served or refused as it says there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from rarefy.attention.quest import Quest
from rarefy.errors import Unsupported
from rarefy.families import _BY_TYPE, ODD_ATTENTION
from rarefy.site import capture, replaced, sites
from site_models import BUILDERS, GEMMA, GQA, MOE, SIZES, VOCAB

B = {**SIZES, "intermediate_size": 48}
PAIR: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}
PICTURE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16, "patch_size": 4,
}
FULL = ["full_attention"] * 2

MODELS: dict[str, Callable[[], Any]] = {name: BUILDERS[name] for name in (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "opt", "phi", "mixtral", "qwen2_moe", "qwen3_moe", "bert", "vit"
)} | {
    "gpt_neox": BUILDERS["neox_parallel"],
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**GEMMA, layer_types=FULL)),
    "gemma2, uncapped": BUILDERS["gemma2"],
    "gemma3_text": BUILDERS["gemma3"],
    "gemma3_text, sliding layers": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GEMMA, layer_types=["sliding_attention", "full_attention"])),
    "mistral, sliding_window": lambda: tf.MistralForCausalLM(tf.MistralConfig(**GQA, sliding_window=8)),
    "mixtral, sliding_window": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**MOE, num_local_experts=4, sliding_window=8)),
    "qwen2, use_sliding_window": lambda: tf.Qwen2ForCausalLM(
        tf.Qwen2Config(**GQA, use_sliding_window=True, sliding_window=8, max_window_layers=0)
    ),
    "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**B)),
    "xlm-roberta": lambda: tf.XLMRobertaForMaskedLM(tf.XLMRobertaConfig(**B)),
    "camembert": lambda: tf.CamembertForMaskedLM(tf.CamembertConfig(**B)),
    "distilbert": lambda: tf.DistilBertForMaskedLM(tf.DistilBertConfig(vocab_size=VOCAB, dim=32, n_layers=2, n_heads=4, hidden_dim=48)),
    "deit": lambda: tf.DeiTForImageClassification(tf.DeiTConfig(**PICTURE)),
    "gpt_oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**GEMMA, num_local_experts=4, num_experts_per_tok=2)),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=VOCAB, d_model=32, num_layers=2, num_heads=4, d_ff=48, d_kv=8)),
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**PAIR)),
    "whisper": lambda: tf.WhisperForConditionalGeneration(tf.WhisperConfig(**PAIR)),
    "marian": lambda: tf.MarianMTModel(tf.MarianConfig(**PAIR)),
    "gptj": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)),
    "codegen": lambda: tf.CodeGenForCausalLM(tf.CodeGenConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)),
    "falcon": lambda: tf.FalconForCausalLM(tf.FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)),
    "mpt": lambda: tf.MptForCausalLM(tf.MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4)),
    "deberta-v2": lambda: tf.DebertaV2ForMaskedLM(tf.DebertaV2Config(**B)),
    "swin": lambda: tf.SwinForImageClassification(
        tf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2)
    ),
    "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2)),
    "electra": lambda: tf.ElectraForMaskedLM(tf.ElectraConfig(**B, embedding_size=16)),
    "clip_vision_model": lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**PICTURE)),
}
"""First cell of a row -> such a model."""


def rows() -> dict[str, tuple[str, str]]:
    """First cell -> (verdict, why) of the table; a first cell may name several models."""
    text = (Path(__file__).parents[2] / "docs" / "attention-in-a-model.md").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")]
    return {name.strip("`"): (verdict, why) for names, verdict, why in cells for name in names.split("; ")}


def seeded(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def given(model: Any) -> dict[str, Any]:
    random = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=random)}
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, 20:] = 0
    return {"input_ids": torch.randint(3, VOCAB, (2, 24), generator=random), "attention_mask": mask}


def test_the_table_has_every_model_once() -> None:
    assert list(rows()) == list(dict.fromkeys(rows())) and set(rows()) == set(MODELS)
    assert {name.partition(",")[0] for name in MODELS} >= set(_BY_TYPE) | set(ODD_ATTENTION)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_served_or_refused_as_the_table_says(name: str) -> None:
    (verdict, why), model = rows()[name], seeded(name)
    assert model.config.model_type == name.partition(",")[0] and verdict in ("served", "refused")
    if verdict == "refused":
        with pytest.raises(Unsupported, match=why), replaced(model, {"layers.0.attn": Quest(1.0)}):
            pytest.fail("entered")
        return
    what = given(model)
    real = what.get("attention_mask", torch.ones(2, 1)).bool()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = model(**what).logits
        with replaced(model, attention="quest", budget=1.0, block=4):
            got = model(**what).logits
        with replaced(model, attention="quest", budget=0.3, block=2):
            sparse = model(**what).logits
    pick = real if wanted.ndim == 3 else slice(None)
    torch.testing.assert_close(got[pick], wanted[pick], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sparse[pick], wanted[pick], atol=1e-4)


@pytest.mark.parametrize("name", ["roberta", "distilbert", "deit"])
def test_streams_of_encoders_are_where_their_names_say(name: str) -> None:
    model = seeded(name)
    what, names = given(model), [n for n, s in sites(model, "layers.*").items() if s.kind == "stream"]
    with torch.no_grad():
        before, at = model(**what).logits, capture(model, names, **what)
        for one in names:
            with replaced(model, {one: lambda x: x}):
                torch.testing.assert_close(model(**what).logits, before, rtol=1e-5, atol=1e-6)
            with replaced(model, {one: torch.zeros_like}):
                assert not torch.equal(model(**what).logits, before), one
    layer = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[1]
    if name == "deit":                                             # the stream in between is a sum; the others normalise it
        torch.testing.assert_close(at["layers.1.resid_mid"], at["layers.1.resid_pre"] + at["layers.1.attn.out"])
        torch.testing.assert_close(at["layers.1.resid_post"], at["layers.1.resid_mid"] + at["layers.1.mlp.out"])
    else:
        norms = {"roberta": ("attention.output.LayerNorm", "output.LayerNorm"), "distilbert": ("sa_layer_norm", "output_layer_norm")}[name]
        first, second = (layer.get_submodule(norm) for norm in norms)
        torch.testing.assert_close(at["layers.1.resid_mid"], first(at["layers.1.resid_pre"] + at["layers.1.attn.out"]))
        torch.testing.assert_close(at["layers.1.resid_post"], second(at["layers.1.resid_mid"] + at["layers.1.mlp.out"]))


def test_a_model_inside_another_is_named_and_served() -> None:
    both = tf.LlavaForConditionalGeneration(tf.LlavaConfig(text_config=tf.LlamaConfig(**GQA), vision_config=tf.CLIPVisionConfig(**PICTURE))).eval()
    with pytest.raises(Unsupported, match=r"its model\.language_model is one"):
        replaced(both, attention="quest").__enter__()
    what = given(both)
    real = what["attention_mask"].bool()
    with torch.no_grad():
        wanted = both(**what).logits
        with replaced(both.model.language_model, attention="quest", budget=1.0):
            torch.testing.assert_close(both(**what).logits[real], wanted[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "distilbert", "vit", "deit"])
def test_methods_are_told_which_layer_they_serve(name: str) -> None:
    class Told(Quest):
        def attend(self, *args: Any, layer: int = 0, **how: Any) -> torch.Tensor:
            told.append(layer)
            return super().attend(*args, layer=layer, **how)

    told: list[int] = []
    model = seeded(name)
    with replaced(model, {"layers.*.attn": Told(1.0)}), torch.no_grad():
        model(**given(model))
    assert told == [0, 1]
