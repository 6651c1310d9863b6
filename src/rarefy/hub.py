"""Opening models: the built-in one, a local Hugging Face folder, or one from the hub at a pinned revision."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import BadInput


@dataclass(frozen=True)
class ModelInfo:
    """What a model is, so that results can name it."""

    name: str
    revision: str
    """Commit on the hub; empty for folders."""
    sha256: str
    """Of the weight files, in order of name."""
    n_params: int
    family: str
    d_model: int
    n_layers: int


def open_model(spec: str, *, dtype: Any = None) -> tuple[Any, Any, ModelInfo]:
    """(model in eval mode, tokenizer, info). Code that comes with a model is never run.

    Args:
        spec: `builtin`, a folder with config.json, weights and tokenizer, or a hub id `org/name`, `org/name@revision`.
        dtype: torch dtype, default float32.

    Raises:
        BadInput: nothing there, no config, no tokenizer, or the hub cannot be reached; says what to do.
    """
    folder, name, revision = _locate(spec)
    _check_files(folder)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BadInput(f"{name}: transformers cannot open it as a causal language model: {_first_line(error)}") from None
    model.eval()
    info = ModelInfo(
        name, revision, weights_sha256(folder), sum(p.numel() for p in model.parameters()), model.config.model_type,
        model.config.hidden_size, model.config.num_hidden_layers,
    )
    return model, tokenizer, info


def _locate(spec: str) -> tuple[Path, str, str]:
    if spec == "builtin":
        from .builtin.model import builtin_folder

        return builtin_folder(), "builtin", ""
    path = Path(spec).expanduser()
    if path.is_dir():
        return path, path.name, ""
    if path.exists():
        raise BadInput(f"model {spec!r} is a file; give the folder that holds config.json and the weights")
    name, _, revision = spec.partition("@")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise BadInput(f"model {spec!r}: no such folder; write `builtin`, a model folder, or a hub id such as org/name")
    return _download(name, revision)


def _download(name: str, revision: str) -> tuple[Path, str, str]:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "tokenizer*"]
    try:
        pinned = revision if os.environ.get("HF_HUB_OFFLINE") else HfApi().model_info(name, revision=revision or None).sha
        folder = snapshot_download(name, revision=pinned or None, allow_patterns=patterns)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise BadInput(f"model {name!r} could not be fetched from the hub ({_first_line(error)}); check the name and the network, or give a local folder") from None
    return Path(folder), name, pinned or Path(folder).name


def _check_files(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder} holds no config.json; it is not a model folder")
    if not list(folder.glob("*.safetensors")):
        raise BadInput(f"{folder} holds no .safetensors weights; convert it with save_pretrained first (pickled weights are not opened)")
    if not any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise BadInput(f"{folder} holds no tokenizer; save it there with tokenizer.save_pretrained({str(folder)!r})")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def weights_sha256(folder: Path) -> str:
    """Hash of all weight files, read a megabyte at a time."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
