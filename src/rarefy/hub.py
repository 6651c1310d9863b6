"""Opening a model with its tokenizer: the built-in one, a local Hugging Face folder, or a repository on the Hub.

Nothing from a model's files is executed: weights are read from safetensors only, code in the repository is neither
downloaded nor run, and adapters and quantised weights are refused by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .builtin.model import builtin_folder
from .errors import BadInput, Damaged, RarefyError, Unsupported
from .families import family_of

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@(?P<revision>(?!.*\.\.)[A-Za-z0-9][\w./-]*))?", re.ASCII)
_SHARD = re.compile(r"[A-Za-z0-9][\w.-]*\.safetensors", re.ASCII)
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)
_VOCABULARY = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_JSON_LIMIT = 64 << 20
_SMALL = ("config.json", "generation_config.json", _INDEX, *_TOKENIZER)
_FORMS = "give 'builtin', a local folder, or a hub id such as org/name@revision"


@dataclass(frozen=True)
class ModelInfo:
    """What a report must say about a model so that somebody else can open the same one."""

    name: str
    """"builtin", the folder's name, or the hub id."""
    revision: str
    """Commit on the Hub, resolved also where a branch or nothing was asked for; empty for files on disk."""
    sha256: str
    """Of the weights: of the file, or for several shards of the lines "sha256  name" in the order of their names."""
    n_params: int
    """Tied parameters counted once."""
    family: str
    """Row of the table of sites, or the config's model_type where there is none."""
    d_model: int
    n_layers: int


def open_model(spec: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> tuple[Any, Any, ModelInfo]:
    """A model in eval mode, its tokenizer, and what is known of it.

    Args:
        spec: "builtin", a local folder as transformers saves it, or a hub id, "org/name" or "org/name@revision".
        dtype: of the parameters.

    Raises:
        BadInput: no such folder or repository, no network, or a file that is needed is not there.
        Damaged: a file is there but truncated, altered or short of tensors.
        Unsupported: pickled or quantised weights, adapters, code of the model's own, models that do not read text.
    """
    folder, name, revision = _locate(spec)
    config = _read_config(folder)
    weights = _weight_files(folder)
    if not any((folder / file).is_file() for file in _VOCABULARY):
        raise BadInput(f"{name}: no tokenizer beside the model ({', '.join(_VOCABULARY)}); save it there with tokenizer.save_pretrained")
    with _quiet():
        model = _load(folder, config, name, dtype)
        tokenizer = _load_tokenizer(folder, name)
    _check_vocabulary(model, tokenizer, name)
    return model.to(device), tokenizer, _info(model, weights, name, revision)


# ---------------------------------------------------------------------------------------------------- locating


def _locate(spec: str) -> tuple[Path, str, str]:
    """(folder, name, revision)."""
    if not isinstance(spec, str) or not spec.strip() or "\0" in spec:
        raise BadInput(f"model {spec!r}: {_FORMS}")
    if spec == "builtin":
        return builtin_folder(), "builtin", ""
    path = Path(spec).expanduser()
    if path.is_dir():
        return path, path.resolve().name, ""
    if path.exists():
        raise BadInput(f"model {spec!r} is a file; give the folder that holds config.json and {_WEIGHTS}")
    match = _HUB_ID.fullmatch(spec)
    if match is None or spec.startswith((".", "/", "~")):
        raise BadInput(f"model {spec!r}: no such folder and not a hub id; {_FORMS}")
    folder, commit = _download(match["repo"], match["revision"])
    return folder, match["repo"], commit


def _download(repo: str, revision: str | None) -> tuple[Path, str]:
    """Fetch config, tokenizer and safetensors at one commit into the Hub's cache; no code, no pickles."""
    from huggingface_hub import errors, snapshot_download

    asked = f"{repo}@{revision}" if revision else repo
    try:
        with _quiet():
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(_SMALL)))
            commit = folder.name                     # snapshots are named by their commit; a branch may move meanwhile
            shards = _shard_names(folder)
            folder = Path(snapshot_download(repo, revision=commit, allow_patterns=[*_SMALL, *shards]))
    except errors.GatedRepoError:
        raise BadInput(f"{asked} is gated: accept its terms on huggingface.co, then log in with `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise BadInput(f"no repository {repo!r} on the Hub, or it is private; {_FORMS}") from None
    except errors.RevisionNotFoundError:
        raise BadInput(f"{repo} has no revision {revision!r}; give a branch, tag or commit of it") from None
    except errors.LocalEntryNotFoundError:
        raise BadInput(
            f"{asked} is neither a folder here nor in the Hub's cache, and the Hub cannot be reached; connect, or {_FORMS}"
        ) from None
    except errors.HFValidationError:
        raise BadInput(f"model {asked!r}: no such folder and not a hub id; {_FORMS}") from None
    except RarefyError:
        raise
    except Exception as error:                       # time-outs, full disks and whatever else the client lets through
        reason = type(error).__name__
        raise BadInput(f"{asked} could not be downloaded ({reason}); check the network and free disk space, then try again") from error
    return folder, commit


# ---------------------------------------------------------------------------------------- checking before loading


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _JSON_LIMIT:
        raise Damaged(f"{path.name}: {path.stat().st_size} bytes, more than the {_JSON_LIMIT} a file of its kind may have")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise Damaged(f"{path.name} in {path.parent.name} is not JSON; fetch the model again") from None
    if not isinstance(found, dict):
        raise Damaged(f"{path.name} in {path.parent.name} is not a JSON object; fetch the model again")
    return found


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json, with everything refused that would run foreign code or load other weights than those hashed."""
    if (folder / "adapter_config.json").exists():
        raise Unsupported(f"{folder.name} holds an adapter; merge it into its model (peft: merge_and_unload) and open the merged folder")
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder.name}: no config.json; give a folder made by save_pretrained")
    config = _read_json(folder / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise Damaged(f"{folder.name}/config.json names no model_type; fetch the model again")
    if "auto_map" in config:
        raise Unsupported(f"{folder.name} needs Python code of its own, which is never run; open a model whose type transformers knows")
    if config.get("quantization_config"):
        raise Unsupported(f"{folder.name} holds quantised weights; open the unquantised model")
    return config


def _shard_names(folder: Path) -> list[str]:
    """Weight files, from the index if there is one. They must be plain names: a file never says where to read."""
    if not (folder / _INDEX).is_file():
        return [_WEIGHTS]
    names = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise Damaged(f"{_INDEX} in {folder.name} has no weight_map; fetch the model again")
    for name in names.values():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise Damaged(f"{_INDEX} in {folder.name} names {name!r}; weights are plain *.safetensors names beside it")
    return sorted(set(names.values()))


def _weight_files(folder: Path) -> list[Path]:
    # transformers prefers the single file when both are there
    names = [_WEIGHTS] if (folder / _WEIGHTS).is_file() else _shard_names(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return [folder / name for name in names]
    if missing == [_WEIGHTS]:
        if pickled := sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")):
            raise Unsupported(f"{folder.name} has its weights in {pickled[0]}, a pickle, which is never read; convert it to safetensors")
        raise BadInput(f"{folder.name}: no {_WEIGHTS}; give a folder made by save_pretrained")
    raise Damaged(f"{folder.name}: {_INDEX} names {missing[0]}, which is not there; fetch the model again")


# ----------------------------------------------------------------------------------------------------- loading


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Loading without progress bars or reports; what they would tell is checked and raised instead."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    if bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _head(config: dict[str, Any], name: str) -> Any:
    """The Auto class that keeps the head that the weights have."""
    import transformers

    kind = config["model_type"]
    if kind not in transformers.CONFIG_MAPPING:
        raise Unsupported(f"{name} is a {kind!r} model, which transformers {transformers.__version__} does not know")
    listed = config.get("architectures")
    built = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else ""
    if built.endswith("ForMaskedLM"):
        return transformers.AutoModelForMaskedLM
    if built.endswith("Model") and not built.endswith("HeadModel"):
        return transformers.AutoModel
    if _config_class(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Unsupported(f"{name} is a {built or kind} model; open_model reads language models. Load others with transformers for sites()")
    return transformers.AutoModelForCausalLM


def _config_class(config: dict[str, Any]) -> Any:
    import transformers

    return transformers.CONFIG_MAPPING[config["model_type"]]


def _load(folder: Path, config: dict[str, Any], name: str, dtype: torch.dtype) -> nn.Module:
    import transformers

    auto = _head(config, name)
    built = auto._model_mapping[_config_class(config)]
    try:
        # config.json may name a repository of attention kernels, which is code, and transformers follows it even where
        # attn_implementation is passed; only on the config object is it overruled.
        settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        settings._attn_implementation = "sdpa" if getattr(built, "_supports_sdpa", False) else "eager"
        model, report = auto.from_pretrained(
            folder, config=settings, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:160]
        raise Damaged(f"{name}: the model does not load ({type(error).__name__}: {reason}); fetch it again") from error
    for what in ("missing_keys", "mismatched_keys"):
        if wrong := sorted(str(key) for key in report.get(what, ())):
            raise Damaged(
                f"{name}: {len(wrong)} tensors are {what.removesuffix('_keys')}, the first {wrong[0]}; config and weights are not of one model"
            )
    return model.eval()


def _load_tokenizer(folder: Path, name: str) -> Any:
    from transformers import AutoTokenizer

    declared = _read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    if "auto_map" in declared:
        raise Unsupported(f"the tokenizer of {name} needs Python code of its own, which is never run; save it as tokenizer.json")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:160]
        raise Damaged(f"{name}: the tokenizer does not load ({type(error).__name__}: {reason}); fetch it again") from error


def _check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    rows, ids = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= ids < rows:
        raise Damaged(f"{name}: the tokenizer has ids up to {ids} but the model embeds {rows}; they are not of one model")


def _info(model: Any, weights: list[Path], name: str, revision: str) -> ModelInfo:
    text = model.config.get_text_config()
    try:
        family = family_of(model).name
    except Unsupported:
        family = model.config.model_type
    digests = [(_sha256(path), path.name) for path in weights]
    lines = "".join(f"{digest}  {file}\n" for digest, file in digests)
    return ModelInfo(
        name=name, revision=revision,
        sha256=digests[0][0] if len(digests) == 1 else hashlib.sha256(lines.encode()).hexdigest(),
        n_params=sum(p.numel() for p in model.parameters()), family=family,
        d_model=text.hidden_size, n_layers=text.num_hidden_layers,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
