"""What a hurried user gets wrong: one line that names the thing and the way out, exit code 2, and nothing written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import CONTEXT, Answer, Run, build_tiny, refuses, snapshot

from rarefy.store.fs import FS
from rarefy.store.lock import RunLock

Words = list[Any]


def with_(words: Words, **changes: Any) -> Words:
    """The words with some options' values changed, new options added, and those left out whose value is None."""
    words = list(words)
    for name, value in changes.items():
        option = f"--{name}"
        if value is None:
            at = words.index(option)
            del words[at : at + 2]
        elif option in words:
            words[words.index(option) + 1] = value
        else:
            words += [option, value]
    return words


def forbid_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, opening a model fails the test: what is wrong can be seen without one."""
    monkeypatch.setattr("rarefy.hub.open_model", lambda *_, **__: pytest.fail("the model was opened"))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_models(monkeypatch)


def untouched(folder: Path, call: Callable[[], Answer]) -> Answer:
    """The answer of a call that neither wrote nor made anything below the folder."""
    before = snapshot(folder)
    answer = call()
    assert snapshot(folder) == before
    return answer


# --------------------------------------------------------------------------------------- seen without a model


@pytest.mark.parametrize(("methods", "changes", "said"), [
    ("latents/topq", {}, ["unknown method 'latents/topq'", "latents/topk"]),
    ("latents/topk,,latents/topk", {}, ["latents/topk is named twice"]),
    (",", {}, ["no method named", "rarefy methods"]),
    ("latents/topk,weights/wanda", {}, ["not both in one run"]),
    ("weights/wanda,weights/magnitude", {"k": None}, ["one method a run", "rarefy sweep"]),
    ("latents/topk", {"width": 3}, ["width=3 is smaller than k=4"]),
    ("latents/topk", {"width": 0}, ["width=0", ">= 1"]),
    ("latents/topk", {"k": 0}, ["k=0"]),
    ("latents/topk", {"steps": 0}, ["steps=0"]),
    ("latents/topk", {"batch": -1}, ["batch=-1"]),
    ("latents/topk", {"lr": -1}, ["lr=-1"]),
    ("latents/topk", {"lr": "nan"}, ["lr=nan"]),
    ("latents/topk", {"precision": "int8"}, ["precision='int8'", "bfloat16"]),
    ("latents/topk", {"context": 2}, ["context=2", "at least 8"]),
    ("latents/topk", {"tokens": -5}, ["tokens=-5"]),
    ("latents/topk", {"seed": -1}, ["seed=-1"]),
    ("weights/wanda", {"k": None, "budget": 0}, ["budget=0", "(0, 1]"]),
    ("weights/wanda", {"k": None, "budget": 1.5}, ["budget=1.5", "(0, 1]"]),
    ("weights/wanda", {"k": None, "budget": "nan"}, ["budget=nan", "(0, 1]"]),
    ("weights/wanda", {"k": 4}, ["--k is for dictionaries", "--budget"]),
    ("latents/topk", {"budget": 0.5}, ["--k 4", "--budget 0.5", "give one of them"]),
    ("latents/relu", {"budget": 0.5, "k": 32}, ["latents/relu", "--set"]),
    ("latents/topk", {"budget": 2}, ["budget=2.0", "(0, 1]"]),
    ("weights/wanda", {"k": None, "target": "layers.0.mlp.out"}, ["--target", "weights/wanda"]),
    ("latents/topk", {"set": "aux_k"}, ["--set 'aux_k'", "name=value"]),
    ("latents/topk", {"set": "auxk=3"}, ["'auxk'", "aux_k"]),
    ("latents/topk", {"set": "width=3"}, ["--set width", "--width"]),
    ("latents/topk", {"set": "aux_alpha=-1"}, ["aux_alpha=-1"]),
    ("latents/topk", {"set": 'aux_k={"a": 1}'}, ["--set aux_k", "dict"]),
    ("latents/topk", {"data": "nowhere"}, ["'nowhere'", "no such file or folder", "stdlib"]),
    ("attention/nsa", {"k": None}, ["attention/nsa has to be trained inside its model", "rarefy.plan"]),
])
def test_fit(run: Run, fit_words: Words, tmp_path: Path, no_model: None, methods: str, changes: dict[str, Any], said: list[str]) -> None:
    refuses(untouched(tmp_path, lambda: run("fit", methods, *with_(fit_words, **changes))), *said)


def test_a_method_without_k_may_be_narrower_than_k(run: Run, fit_words: Words) -> None:
    assert run("fit", "latents/relu", *with_(fit_words, width=3)).code == 0


@pytest.mark.parametrize("more", [[], ["--suite", "attention"]])
def test_a_sweep_of_what_is_not_trained(run: Run, tiny: Path, tmp_path: Path, no_model: None, more: list[str]) -> None:
    """Untrained gates choose at random; that would be taken for the method's figure."""
    words = ["sweep", "attention/seer", tiny, "--budget", "0.5", "--out", tmp_path / "s", *more]
    refuses(untouched(tmp_path, lambda: run(*words)), "attention/seer has to be trained inside its model", "rarefy.plan")


@pytest.mark.parametrize(("budget", "said"), [
    ("0.9:0.3", "the lower comes first"), ("0:0.5", "(0, 1]"), ("0.5:1.5", "(0, 1]"), ("0.3,2", "(0, 1]"), ("half", "LOW:HIGH"), ("", "LOW:HIGH"),
    ("0.1:0.9:0.1:3", "LOW:HIGH:STEP"), ("0.1:0.9:0", "(0, 1]"), ("0.1:0.9:1e-6", "at most 200"), ("nan", "(0, 1]"), ("0.3:", "LOW:HIGH"),
])
def test_budgets_of_a_sweep(run: Run, tiny: Path, tmp_path: Path, no_model: None, budget: str, said: str) -> None:
    refuses(untouched(tmp_path, lambda: run("sweep", "weights/wanda", tiny, "--budget", budget, "--out", tmp_path / "s")), budget, said)


@pytest.mark.parametrize(("text", "wanted"), [
    ("0.3:0.9", [0.3, 0.45, 0.6, 0.75, 0.9]), ("0.1:0.5:0.2", [0.1, 0.3, 0.5]), ("0.5,0.3,0.3", [0.3, 0.5]), ("0.5", [0.5]), ("0.7:0.7", [0.7]),
    ("0.2:1:0.3", [0.2, 0.5, 0.8]), ("0.1:1:0.1", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
])
def test_budgets_are_read(text: str, wanted: list[float]) -> None:
    from rarefy.cli import _budgets

    assert _budgets(text) == wanted


def test_sweep(run: Run, tiny: Path, tmp_path: Path, no_model: None) -> None:
    for methods, said in (("latents/topk", "rarefy fit"), ("weights/wandaa", "weights/wanda"), ("", "no method named")):
        refuses(untouched(tmp_path, lambda m=methods: run("sweep", m, tiny, "--out", tmp_path / "s")), said)


def test_data_is_read_before_a_model_is_opened(run: Run, fit_words: Words, tmp_path: Path, no_model: None) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.txt").write_bytes(b"\xff\xfe\x00broken")
    (tmp_path / "bad/b.py").write_bytes(b"caf\xe9 = 1")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"tex": 1}\n')
    refuses(untouched(tmp_path, lambda: run("fit", "latents/topk", *with_(fit_words, data=" , "))), "data ' , '")
    for name, said in (("empty", "no text in"), ("bad", "all 2 files are undecodable"), ("empty.txt", "no text in"), ("broken.jsonl", "line 2")):
        answer = untouched(tmp_path, lambda name=name: run("fit", "latents/topk", *with_(fit_words, data=tmp_path / name)))
        assert answer.code == 2 and said in answer.err.splitlines()[-1] and name in answer.err.splitlines()[-1]


def test_files_left_out_are_counted_once(run: Run, corpus: Path, fit_words: Words, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    (mine / "z.txt").write_bytes(b"caf\xe9")
    answer = run("fit", "latents/topk", *with_(fit_words, data=mine), "--json")
    assert answer.code == 0 and answer.json and answer.line.startswith("rarefy: 1 files are not UTF-8") and "z.txt" in answer.line


# ----------------------------------------------------------------------------------------- seen with the model


@pytest.mark.parametrize(("changes", "said"), [
    ({"site": "layers.0.resid_pots"}, ["'layers.0.resid_pots'", "layers.0.resid_post"]), ({"site": "layers.7.resid_post"}, ["layers 0..1"]),
    ({"site": "layers.*.resid_post"}, ["names 2 sites", "one site a run"]), ({"site": "layers.0.up_proj"}, ["latents/topk", "linear site"]),
    ({"context": 128}, ["context=128", "8..64"]), ({"batch": 100_000}, ["100000 rows", "lower it or give more text"]),
])
def test_fit_on_this_model(run: Run, fit_words: Words, tmp_path: Path, changes: dict[str, Any], said: list[str]) -> None:
    refuses(untouched(tmp_path, lambda: run("fit", "latents/topk", *with_(fit_words, **changes))), *said)


def test_text_shorter_than_one_context(run: Run, fit_words: Words, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    refuses(untouched(tmp_path, lambda: run("fit", "latents/topk", *with_(fit_words, data=tmp_path / "short.txt"))), "shorter than one context of 32")


def test_every_command_refuses_a_wrong_site_or_model(run: Run, tiny: Path, corpus: Path, tmp_path: Path) -> None:
    more = ["--data", corpus, "--context", CONTEXT, "--out", tmp_path / "x"]
    for words in (["sweep", "weights/wanda", tiny, *more], ["apply", "weights/wanda", tiny, *more], ["fit", "neurons/wina", tiny, *more]):
        refuses(untouched(tmp_path, lambda w=words: run(*w, "--site", "layers.0.up_porj")), "layers.0.up_proj")
        refuses(untouched(tmp_path, lambda w=words: run(*w, "--site", "layers.0.mlp.out")), "stream site")
        refuses(untouched(tmp_path, lambda w=words: run(*[tmp_path / "nowhere" if v == tiny else v for v in w])), "nowhere")
    refuses(run("sites", tiny, "layers.0.resid_pots"), "layers.0.resid_post")
    refuses(run("sites", tmp_path / "nowhere"), "nowhere")


def test_a_model_folder_without_tokenizer(run: Run, tiny: Path, fit_words: Words, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(tiny, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*")))
    refuses(untouched(tmp_path, lambda: run("fit", "latents/topk", bare, *fit_words[1:])), "bare", "no tokenizer", "save_pretrained")


def test_a_model_that_predicts_nothing_is_not_judged(run: Run, tiny: Path, corpus: Path, tmp_path: Path) -> None:
    from site_models import build

    folder = Path(shutil.copytree(tiny, tmp_path / "bert", ignore=shutil.ignore_patterns("*.safetensors", "config.json")))
    model = build("bert")
    model.resize_token_embeddings(257)
    model.save_pretrained(folder)
    words = [folder, "--data", corpus, "--context", CONTEXT, "--out", tmp_path / "s"]
    refuses(untouched(tmp_path, lambda: run("sweep", "weights/magnitude", *words)), "BertForMaskedLM", "causal language model")


@pytest.mark.parametrize("words", [["fit", "latents/topk", "--site", "layers.1.resid_post"], ["fit", "weights/wanda"], ["sweep", "weights/wanda"],
                                   ["apply", "weights/wanda"]], ids=["train", "calibrate", "sweep", "apply"])
def test_nan_activations(run: Run, tiny: Path, corpus: Path, tmp_path: Path, words: list[str]) -> None:
    sick = Path(shutil.copytree(tiny, tmp_path / "sick"))
    model = build_tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(3e38)      # finite, but not what comes of it
    model.save_pretrained(sick)
    command, method, *more = words
    answer = untouched(tmp_path, lambda: run(command, method, sick, *more, "--data", corpus, "--context", CONTEXT, "--out", tmp_path / "run"))
    refuses(answer, "sick", "NaN")


# ----------------------------------------------------------------------------------------------- folders, disks


def test_a_run_in_use(run: Run, fit_words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("fit", "latents/topk", *fit_words).code == 0
    forbid_models(monkeypatch)
    with RunLock(tmp_path / "run"):
        refuses(run("fit", "latents/topk", *fit_words), "being written by process", str(os.getpid()))
        refuses(run("judge", tmp_path / "run"), "being written by process")


def test_a_folder_that_is_no_run(run: Run, fit_words: Words, tmp_path: Path, no_model: None) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_text("cat")
    (tmp_path / "file").write_text("")
    for name, said in (("photos", "cat.jpg"), ("file", "is a file"), ("file/below/it", "file is a file")):
        refuses(untouched(tmp_path, lambda name=name: run("fit", "latents/topk", *fit_words[:-1], tmp_path / name)), name, said)
        refuses(untouched(tmp_path, lambda name=name: run("sweep", "weights/wanda", fit_words[0], "--out", tmp_path / name)), name, said)


@pytest.mark.parametrize(("name", "content"), [
    ("run.json", b"{"), ("run.json", b'{"format": "rarefy-run", "version": 99}'), ("run.json", b'{"hello": 1}'), ("run.json", b"\x80\x04pickle"),
    ("methods/latents__topk/method.json", b"[]"), ("methods/latents__topk/tensors.safetensors", b"\x80\x02}q"),
])
def test_old_and_foreign_files(run: Run, fit_words: Words, tmp_path: Path, name: str, content: bytes) -> None:
    assert run("fit", "latents/topk", *fit_words).code == 0
    (tmp_path / "run" / name).write_bytes(content)
    refuses(untouched(tmp_path, lambda: run("judge", tmp_path / "run")), Path(name).parent.name if "/" in name else "run")
    checked = run("check", tmp_path / "run")
    assert checked.code == 1 and "1 damaged" in checked.out and checked.err == ""


def test_a_damaged_method_is_made_again_from_the_last_checkpoint(run: Run, fit_words: Words, tmp_path: Path) -> None:
    assert run("fit", "latents/topk", *fit_words).code == 0
    before = snapshot(tmp_path / "run")
    path = tmp_path / "run/methods/latents__topk/tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    assert run("check", tmp_path / "run").code == 1
    assert run("fit", "latents/topk", *fit_words).code == 0
    assert snapshot(tmp_path / "run") == before


def test_pages(run: Run, tmp_path: Path) -> None:
    refuses(run("show", tmp_path / "nowhere"), "nowhere", "rarefy demo")
    refuses(run("show", tmp_path), "report.json")
    for content in (b"[", b"\x80\x04", json.dumps({"schema": 7}).encode()):
        (tmp_path / "report.json").write_bytes(content)
        refuses(run("show", tmp_path), "report.json")


def test_paths_that_hold_nothing_to_check(run: Run, tmp_path: Path) -> None:
    refuses(run("check", tmp_path / "nowhere"), "nowhere", "does not exist")
    (tmp_path / "notes.txt").write_text("")
    refuses(run("check", tmp_path), "nothing that rarefy wrote")
    refuses(run("check", tmp_path / "notes.txt"), "nothing that rarefy wrote")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="everything may be written")
def test_a_folder_that_may_not_be_written(run: Run, fit_words: Words, tmp_path: Path, no_model: None) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    refuses(untouched(tmp_path, lambda: run("fit", "latents/topk", *fit_words[:-1], tmp_path / "locked/run")), "no permission", "another --out")


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """full(n): the disk takes n more writes, then none."""
    left = [0]

    def counted(original: Any) -> Any:
        def call(self: FS, path: Path, *rest: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            original(self, path, *rest)

        return call

    for name in ("write", "append"):
        monkeypatch.setattr(FS, name, counted(getattr(FS, name)))
    return lambda n: left.__setitem__(0, n)


@pytest.mark.parametrize("methods", ["latents/topk", "weights/magnitude"])
def test_a_full_disk_at_any_write_of_a_fit(
    run: Run, tiny: Path, corpus: Path, fit_words: Words, tmp_path: Path, full: Callable[[int], None], methods: str,
) -> None:
    if methods != "latents/topk":
        fit_words = [tiny, "--site", "layers.0.up_proj", "--data", corpus, "--tokens", 500, "--context", CONTEXT, "--out", tmp_path / "run"]
    for n in range(40):
        full(n)
        answer = run("fit", methods, *fit_words)
        if answer.code == 0:
            break
        refuses(answer, "No space left on device", "free some space")
        if n == 0:
            assert list(tmp_path.iterdir()) == []
        assert not [p for p in tmp_path.rglob(".tmp-*")]
        assert not (tmp_path / "run").exists() or run("check", tmp_path / "run").code == 0
        if n % 3 == 1:                                     # with space again, the same command goes on
            full(10**9)
            assert run("fit", methods, *fit_words).code == 0
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert n > 2 and run("check", tmp_path / "run").code == 0


def test_a_full_disk_while_a_model_is_saved(run: Run, tiny: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["apply", "weights/magnitude", tiny, "--data", corpus, "--context", CONTEXT, "--calibration", 300, "--out", tmp_path / "deep/pruned"]

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", refuse)
        refuses(run(*words), "pruned", "No space left on device", "free some space")
    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", refuse)
        refuses(run(*words), "pruned", "No space left on device")
    assert list(tmp_path.iterdir()) == []
    assert run(*words).code == 0


def test_too_little_memory(run: Run, fit_words: Words, tmp_path: Path) -> None:
    answer = untouched(tmp_path, lambda: run("fit", "latents/topk", *with_(fit_words, width=10**13)))
    refuses(answer, "not enough memory")


def test_a_fault_of_ours_is_one_line_too(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("inner")

    monkeypatch.setattr("rarefy.jobs.models.sites", fail)
    answer = run("sites", tiny)
    assert answer.code == 1 and "KeyError" in answer.line and "--debug" in answer.line and "Traceback" not in answer.err
    with pytest.raises(KeyError):
        run("sites", tiny, "--debug")
    with pytest.raises(KeyError):
        run("--debug", "sites", tiny)
