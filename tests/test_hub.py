"""Opening models: what is opened, what is refused, that nothing from a model's files is run."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rarefy.errors import BadInput, Damaged, RarefyError, Unsupported
from rarefy.hub import open_model
from site_models import build

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def save_tokenizer(folder: Path, words: int = 50) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", pad_token="w0").save_pretrained(folder)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    build("llama").save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(good, tmp_path / "tiny-llama"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_local_folder(good: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer, info = open_model(str(good))
    original = build("llama")
    assert all(torch.equal(v, original.state_dict()[k]) for k, v in model.state_dict().items())
    assert not model.training and model.dtype == torch.float32 and tokenizer("w3 w4")["input_ids"] == [3, 4]
    assert info.name == "tiny-llama" and info.revision == "" and info.family == "llama" and (info.d_model, info.n_layers) == (32, 2)
    assert info.n_params == sum(v.numel() for v in original.state_dict().values())
    assert info.sha256 == hashlib.sha256((good / "model.safetensors").read_bytes()).hexdigest()
    assert capfd.readouterr() == ("", "")
    assert str(good.parent) not in repr(info)


def test_loading_leaves_global_state_alone(good: Path) -> None:
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_default_dtype(), torch.is_grad_enabled())
    open_model(str(good), dtype=torch.bfloat16)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_default_dtype(), torch.is_grad_enabled()) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype(good: Path, dtype: torch.dtype) -> None:
    assert open_model(str(good), dtype=dtype)[0].dtype == dtype


@pytest.mark.parametrize(("name", "family"), [
    ("gpt2", "gpt2"), ("neox_parallel", "gpt_neox"), ("opt", "opt"), ("phi", "phi"), ("gemma2", "gemma2"), ("mixtral", "moe"),
    ("bert", "bert"), ("llama_tied", "llama"),
])
def test_every_family(name: str, family: str, tmp_path: Path) -> None:
    original = build(name)
    original.save_pretrained(tmp_path / "m")
    save_tokenizer(tmp_path / "m")
    model, _, info = open_model(str(tmp_path / "m"))
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, original(input_ids=ids).logits)
    assert type(model) is type(original) and info.family == family
    assert info.n_params == sum(p.numel() for p in original.parameters())


def test_the_builtin_model() -> None:
    from rarefy.builtin.model import builtin_folder

    try:
        builtin_folder()
    except BadInput:
        pytest.skip("the built-in model is not there yet")
    model, tokenizer, info = open_model("builtin")
    assert info.name == "builtin" and info.family == "llama"
    ids = tokenizer("def f(x):\n    return x", return_tensors="pt").input_ids
    assert model(input_ids=ids).logits.shape == (1, ids.shape[1], model.config.vocab_size)


def test_shards_are_hashed_together(good: Path, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "m", max_shard_size="20KB")
    save_tokenizer(tmp_path / "m")
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 1
    model, _, info = open_model(str(tmp_path / "m"))
    lines = "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in shards)
    assert info.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    assert torch.equal(model.lm_head.weight, open_model(str(good))[0].lm_head.weight)
    shards[1].unlink()
    with pytest.raises(Damaged, match=shards[1].name):
        open_model(str(tmp_path / "m"))


# ----------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("spec", [
    "", " ", "./none", "/no/such/folder", "~/no such", "a/b/c", "org/name@", "a\0b", "x y/z", "../up", "org/na..me/", "-x", "org/name@main/../../x",
])
def test_specs_that_are_nothing(spec: str) -> None:
    with pytest.raises(BadInput, match="builtin") as caught:
        open_model(spec)
    assert "\n" not in str(caught.value)


def test_a_file_is_not_a_folder(good: Path) -> None:
    with pytest.raises(BadInput, match="is a file"):
        open_model(str(good / "config.json"))


def _remove(name: str) -> Callable[[Path], None]:
    return lambda f: (f / name).unlink()


def _no_tokenizer(f: Path) -> None:
    for path in f.glob("tokenizer*"):
        path.unlink()


def _write(name: str, text: str) -> Callable[[Path], None]:
    return lambda f: (f / name).write_text(text) and None


def _truncate(f: Path) -> None:
    path = f / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _drop_tensor(f: Path) -> None:
    tensors = load_file(f / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, f / "model.safetensors", {"format": "pt"})


def _pickle_only(f: Path) -> None:
    torch.save(load_file(f / "model.safetensors"), f / "pytorch_model.bin")
    (f / "model.safetensors").unlink()


def _index(weight_map: Any) -> Callable[[Path], None]:
    def change(f: Path) -> None:
        (f / "model.safetensors").rename(f.parent / "outside.safetensors")
        (f / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return change


REFUSED: dict[str, tuple[Callable[[Path], None], type[RarefyError], str]] = {
    "no config": (_remove("config.json"), BadInput, "config.json"),
    "no tokenizer": (_no_tokenizer, BadInput, "tokenizer"),
    "no weights": (_remove("model.safetensors"), BadInput, "model.safetensors"),
    "pickle only": (_pickle_only, Unsupported, "pytorch_model.bin"),
    "config not json": (_write("config.json", "{"), Damaged, "config.json"),
    "config a list": (_write("config.json", "[]"), Damaged, "config.json"),
    "config deep": (_write("config.json", "[" * 100_000), Damaged, "config.json"),
    "config binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00") and None, Damaged, "config.json"),
    "no model_type": (_write("config.json", "{}"), Damaged, "model_type"),
    "unknown type": (lambda f: edit(f / "config.json", model_type="abacus"), Unsupported, "abacus"),
    "image model": (lambda f: edit(f / "config.json", model_type="vit", architectures=["ViTForImageClassification"]), Unsupported, "ViT"),
    "foreign code": (lambda f: edit(f / "config.json", auto_map={"AutoConfig": "evil.Config"}), Unsupported, "code"),
    "tokenizer code": (lambda f: edit(f / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}), Unsupported, "code"),
    "quantised": (lambda f: edit(f / "config.json", quantization_config={"quant_method": "gptq"}), Unsupported, "quantised"),
    "adapter": (_write("adapter_config.json", '{"base_model_name_or_path": "evil/base"}'), Unsupported, "adapter"),
    "truncated": (_truncate, Damaged, "does not load"),
    "a tensor short": (_drop_tensor, Damaged, r"model\.layers\.1\.mlp\.down_proj"),
    "other width": (lambda f: edit(f / "config.json", intermediate_size=47), Damaged, "tiny-llama"),
    "more layers": (lambda f: edit(f / "config.json", num_hidden_layers=3), Damaged, "missing"),
    "tokenizer not json": (_write("tokenizer.json", "{"), Damaged, "tokenizer"),
    "vocabulary too large": (lambda f: save_tokenizer(f, 62), Damaged, "61"),
    "index upwards": (_index({"lm_head.weight": "../outside.safetensors"}), Damaged, r"\.\./outside"),
    "index absolute": (_index({"lm_head.weight": "/etc/x.safetensors"}), Damaged, "/etc/x"),
    "index of a pickle": (_index({"lm_head.weight": "x.bin"}), Damaged, "x.bin"),
    "index of a number": (_index({"lm_head.weight": 3}), Damaged, "3"),
    "index empty": (_index({}), Damaged, "weight_map"),
    "index a list": (_index([1]), Damaged, "weight_map"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str, folder: Path) -> None:
    change, error, word = REFUSED[case]
    change(folder)
    with pytest.raises(error, match=word) as caught:
        open_model(str(folder))
    assert "\n" not in str(caught.value)


def test_pickle_beside_safetensors_is_never_read(folder: Path) -> None:
    marker = folder / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    torch.save(Evil(), folder / "pytorch_model.bin")
    (folder / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')")
    open_model(str(folder))
    assert not marker.exists()


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_a_config_cannot_choose_its_attention(folder: Path, key: str) -> None:
    """A name with a slash is a repository of kernels on the Hub, which transformers would fetch and import."""
    for value in ("evil/kernels", "flash_attention_2", {"": "evil/kernels"}):
        edit(folder / "config.json", **{key: value})
        assert open_model(str(folder))[0].config._attn_implementation == "sdpa"


def test_tensors_that_the_model_does_not_use_are_ignored(folder: Path) -> None:
    before = open_model(str(folder))[0].state_dict()
    save_file({**load_file(folder / "model.safetensors"), "extra.head": torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})
    after = open_model(str(folder))[0].state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


# ---------------------------------------------------------------------------------------------------------- Hub


@pytest.fixture
def snapshot(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for the Hub: one repository, whose branch main is at COMMIT. Returns the log of what was asked."""
    import huggingface_hub

    asked: list[dict[str, Any]] = []
    place = Path(shutil.copytree(good, tmp_path / "cache" / COMMIT))

    def fake(repo: str, *, revision: str | None = None, allow_patterns: list[str]) -> str:
        asked.append({"repo": repo, "revision": revision, "files": allow_patterns})
        return str(place)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize(("spec", "repo", "revision"), [
    ("org/name", "org/name", None), ("org/name@main", "org/name", "main"), ("gpt2", "gpt2", None),
    (f"org/na.me-2_x@{COMMIT}", "org/na.me-2_x", COMMIT), ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
])
def test_a_hub_id_is_pinned_to_its_commit(spec: str, repo: str, revision: str | None, snapshot: list[dict[str, Any]]) -> None:
    _, _, info = open_model(spec)
    assert (info.name, info.revision) == (repo, COMMIT)
    assert [a["revision"] for a in snapshot] == [revision, COMMIT] and {a["repo"] for a in snapshot} == {repo}
    files = {f for a in snapshot for f in a["files"]}
    assert "model.safetensors" in files and not any(c in f for f in files for c in "*?[/")
    assert not [f for f in files if f.endswith((".py", ".bin", ".pt", ".pkl"))]


def test_a_local_folder_wins_over_the_hub(snapshot: list[dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert open_model("tiny-llama")[2].revision == "" and snapshot == []


def test_hub_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import httpx
    import huggingface_hub
    from huggingface_hub import errors

    monkeypatch.chdir(tmp_path)
    response = httpx.Response(404, request=httpx.Request("GET", "https://hub.invalid/?token=hf_canary"))
    cases: list[tuple[Exception, str]] = [
        (errors.GatedRepoError("hf_canary", response=response), "gated"),
        (errors.RepositoryNotFoundError("hf_canary", response=response), "no repository"),
        (errors.RevisionNotFoundError("hf_canary", response=response), "no revision 'v9'"),
        (errors.LocalEntryNotFoundError("hf_canary"), "cannot be reached"),
        (OSError(28, "No space left on device hf_canary"), "disk space"),
        (errors.HfHubHTTPError("hf_canary", response=response), "network"),
        (httpx.ReadTimeout("hf_canary"), "network"),
    ]
    for error, word in cases:
        def fail(*args: Any, error: Exception = error, **kwargs: Any) -> str:
            raise error
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(BadInput, match=word) as caught:
            open_model("org/name@v9")
        assert "hf_canary" not in str(caught.value) and "\n" not in str(caught.value)


def test_no_network_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BadInput, match="cannot be reached"):
        open_model("no-such-org-at-all/no-such-model")


def test_importing_does_not_import_the_hub_client() -> None:
    import subprocess

    program = "import sys, rarefy.hub; assert not {'transformers', 'huggingface_hub'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
