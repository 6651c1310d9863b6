"""A run as `rarefy fit --store` and `rarefy judge` leave it, of a tiny random model on made-up text."""

from __future__ import annotations

import random
from pathlib import Path

from rarefy.jobs.fit import FitRequest, fit
from rarefy.jobs.judge import judge
from rarefy.jobs.screen import Screen

STEPS = 12


def make_model(folder: Path) -> Path:
    """Llama of 2 layers, width 32, 50 words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", pad_token="w0", eos_token="w0").save_pretrained(folder)
    return folder


def make_text(folder: Path, files: int = 40) -> Path:
    """Files of random words."""
    folder.mkdir()
    lottery = random.Random(0)
    for number in range(files):
        words = " ".join(f"w{lottery.randrange(1, 50)}" for _ in range(200))
        (folder / f"{number:02d}.py").write_text(words + "\n")
    return folder


def request(base: Path, **changes) -> FitRequest:
    """What the run is asked for."""
    asked = {
        "methods": ["latents/topk"], "model": str(base / "model"), "out": base / "run", "site": "layers.0.resid_post",
        "data": str(base / "text"), "width": 64, "k": 4, "steps": STEPS, "batch": 64, "context": 32, "tokens": 6000, "store": True,
    }
    return FitRequest(**{**asked, **changes})


def make_run(base: Path, **changes) -> Path:
    """Fit and judge; the run's folder."""
    make_model(base / "model")
    make_text(base / "text")
    fit(request(base, **changes), screen=Screen(quiet=True))
    judge(base / "run", ["dense", "latents/random"], data="", tokens=600, screen=Screen(quiet=True))
    return base / "run"
