"""The built-in model: a Llama of about 5 million parameters trained on Python source (scripts/train_builtin.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import BadInput

_FOLDER = Path(__file__).parent / "model_files"
_RECALL = Path(__file__).parent / "recall_files"
_RECALL_LONG = Path(__file__).parent / "recall_long_files"
_OTHELLO = Path(__file__).parent / "othello_files"


def builtin_folder() -> Path:
    """Folder of the model and its tokenizer, as transformers loads it. BadInput if it was not installed."""
    if not (_FOLDER / "model.safetensors").exists():
        raise BadInput("the built-in model is missing from this installation; reinstall rarefy, or make it with scripts/train_builtin.py")
    return _FOLDER


def _shipped(folder: Path, name: str) -> Any:
    """A small Llama that was trained by scripts/train_NAME.py; float32, for evaluation."""
    import torch
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (folder / "model.safetensors").exists():
        raise BadInput(f"the {name} model is missing from this installation; reinstall rarefy, or make it with scripts/train_{name}.py")
    with torch.random.fork_rng(devices=[]):                    # drawing the weights that are about to be replaced
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder, local_files_only=True))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


RECALL_LENGTHS = (512, 8192)
"""Longest sequences of the two recall models."""


def recall_model(length: int = RECALL_LENGTHS[0]) -> Any:
    """The two-layer model that recalls in sequences of `length` tokens: of tasks/recall_training.py up to 512, of tasks/recall_long.py up to 8,192.

    Raises:
        BadInput: a length that neither answers for, or files that are missing.
    """
    if not 0 < length <= RECALL_LENGTHS[1]:
        raise BadInput(f"length={length} must be in 1..{RECALL_LENGTHS[1]}: recall models for longer sequences are not shipped")
    return _shipped(_RECALL, "recall") if length <= RECALL_LENGTHS[0] else _shipped(_RECALL_LONG, "recall")


def othello_model() -> Any:
    """The four-layer model of tasks/othello.py."""
    return _shipped(_OTHELLO, "othello")


def card() -> dict[str, Any]:
    """The model's card: corpus, training, held-out losses and baselines."""
    return json.loads((builtin_folder() / "card.json").read_text(encoding="utf-8"))
