"""`rarefy fit` as a user meets it, against activations and formulas worked out apart from it.

Shape letters: N = contexts or rows, T = tokens, D = width, O, I = outputs and inputs of a linear layer.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from cli_tools import CONTEXT, Run, build_tiny, refuses, snapshot

import rarefy
from rarefy.store.shards import ActivationStore
from rarefy.store.writer import ActivationWriter


def contexts(tiny: Path, corpus: Path, tokens: int = 4000) -> torch.Tensor:
    """[N, T] what a run on the corpus is fitted on."""
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny)
    return rarefy.windows(rarefy.text(str(corpus), tokenizer, context=CONTEXT, fit_tokens=tokens, judge_tokens=1).fit)


def flows(ids_NT: torch.Tensor, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, T, D] into and out of a module, by a plain hook."""
    model, seen = build_tiny(), []
    first = lambda value: value[0] if isinstance(value, tuple) else value  # noqa: E731
    model.get_submodule(path).register_forward_hook(lambda m, i, o: seen.append((i[0], first(o))))
    with torch.no_grad():
        model(input_ids=ids_NT)
    return seen[0]


def fvu(x_ND: torch.Tensor, y_ND: torch.Tensor) -> float:
    return float((x_ND - y_ND.detach()).square().sum() / (x_ND - x_ND.mean(0)).square().sum())


def test_a_dictionary_is_trained_and_kept(run: Run, tiny: Path, corpus: Path, fit_words: list[Any], tmp_path: Path) -> None:
    got = run("fit", "latents/topk", *fit_words, "--steps", 150, "--json")
    assert got.code == 0 and got.err == ""
    assert got.json["schema"] == 1 and got.json["sites"] == ["layers.0.resid_post"] and not got.json["finished_before"]
    assert got.json["last"]["step"] == 150
    method = rarefy.load(tmp_path / "run/methods/latents__topk")
    assert method.arguments["width"] == 64 and method.arguments["d_in"] == 32
    x_ND = flows(contexts(tiny, corpus), "model.layers.0")[1][:, 1:].flatten(0, 1)
    assert method.select(x_ND).count.max() <= 4
    random = run("fit", "latents/random", *fit_words[:-1], tmp_path / "random")
    assert random.code == 0
    assert fvu(x_ND, method(x_ND)) < 0.6 * fvu(x_ND, rarefy.load(tmp_path / "random/methods/latents__random")(x_ND))
    checked = run("check", tmp_path / "run", "--json")
    assert checked.code == 0 and checked.json["ok"]


def test_the_same_command_again_says_that_it_is_finished(run: Run, fit_words: list[Any], tmp_path: Path) -> None:
    assert "fitted 1 method" in run("fit", "latents/topk", *fit_words).out
    before = snapshot(tmp_path)
    again = run("fit", "latents/topk", *fit_words)
    assert again.code == 0 and "finished already" in again.out
    assert run("fit", "latents/topk", *fit_words, "--json").json["finished_before"]
    assert snapshot(tmp_path) == before
    shutil.rmtree(tmp_path / "run/methods")                # the last step before being finished, done again
    assert "fitted 1 method" in run("fit", "latents/topk", *fit_words).out
    assert snapshot(tmp_path) == before
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert run("fit", "latents/topk", *fit_words[:-1], moved, "--json").json["finished_before"]


@pytest.mark.parametrize(("change", "said"), [
    (["--width", "128"], "request.width: was 64, now 128"), (["--seed", "1"], "request.seed: was 0, now 1"), (["--k", "3"], "k: was 4, now 3"),
    (["--set", "aux_k=8"], "request.settings.aux_k: was absent, now 8"),
])
def test_other_settings_are_refused_and_shown(run: Run, fit_words: list[Any], tmp_path: Path, change: list[str], said: str) -> None:
    assert run("fit", "latents/topk", *fit_words).code == 0
    before = snapshot(tmp_path)
    refuses(run("fit", "latents/topk", *fit_words, *change), "other settings", said)
    refuses(run("fit", "latents/gated", *fit_words), "latents/topk", "latents/gated")
    assert snapshot(tmp_path) == before


def test_changed_data_is_refused(run: Run, corpus: Path, fit_words: list[Any], tmp_path: Path) -> None:
    mine = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    words = [mine if w == corpus else w for w in fit_words]
    assert run("fit", "latents/topk", *words).code == 0
    for path in mine.glob("*.txt"):
        path.write_text(path.read_text().replace("alpha", "omega"))
    refuses(run("fit", "latents/topk", *words), "other settings", "text: was")
    refuses(run("judge", tmp_path / "run"), "not the text", "--data")
    assert run("judge", tmp_path / "run", "--data", mine, "--tokens", 500).code == 0


def test_methods_trained_together_are_those_trained_alone(run: Run, fit_words: list[Any], tmp_path: Path) -> None:
    assert run("fit", "latents/topk,latents/gated,latents/random", *fit_words, "--set", "l1=0.5").code == 0
    assert run("fit", "latents/topk", *fit_words[:-1], tmp_path / "topk").code == 0
    assert run("fit", "latents/gated", *fit_words[:-1], tmp_path / "gated", "--set", "l1=0.5").code == 0
    both = tmp_path / "run/methods"
    assert snapshot(both / "latents__topk") == snapshot(tmp_path / "topk/methods/latents__topk")
    assert snapshot(both / "latents__gated") == snapshot(tmp_path / "gated/methods/latents__gated")
    assert rarefy.load(both / "latents__gated").arguments["l1"] == 0.5     # a setting goes to the methods that take it
    assert len(list(both.iterdir())) == 3


def test_a_budget_of_latents_is_k_over_width(run: Run, fit_words: list[Any], tmp_path: Path) -> None:
    at = fit_words.index("--k")
    assert run("fit", "latents/topk", *fit_words[:at], *fit_words[at + 2 :], "--budget", 0.125).code == 0
    assert rarefy.load(tmp_path / "run/methods/latents__topk").arguments["k"] == 8
    assert run("fit", "latents/topk", *fit_words[:at], "--k", 8, *fit_words[at + 2 :], "--json").json["finished_before"]


def test_aliases_name_the_same_site(run: Run, fit_words: list[Any], tmp_path: Path) -> None:
    words = ["blocks.0.hook_resid_post" if w == "layers.0.resid_post" else w for w in fit_words]
    assert run("fit", "latents/topk", *words, "--json").json["sites"] == ["layers.0.resid_post"]
    assert run("fit", "latents/topk", *fit_words[:-1], tmp_path / "other").code == 0
    assert snapshot(tmp_path / "run/methods") == snapshot(tmp_path / "other/methods")


# --------------------------------------------------------------------------------------------------------- store


def stored(folder: Path) -> torch.Tensor:
    (path,) = (folder / "activations").iterdir()
    with ActivationStore(path) as store:
        assert store.closed
        return store[:]


def test_a_store_holds_what_flows_and_is_trained_from(run: Run, tiny: Path, corpus: Path, fit_words: list[Any], tmp_path: Path) -> None:
    got = run("fit", "latents/topk", *fit_words, "--store", "--json")
    assert got.code == 0
    x_NTD = flows(contexts(tiny, corpus), "model.layers.0")[1]
    assert torch.equal(stored(tmp_path / "run"), torch.cat([x[:, 1:].flatten(0, 1) for x in x_NTD.split(16)]))
    assert run("check", tmp_path / "run").code == 0
    assert run("fit", "latents/topk", *fit_words, "--store", "--json").json["finished_before"]


def test_an_interrupted_store_is_gone_on_with(run: Run, fit_words: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("fit", "latents/topk", *fit_words[:-1], tmp_path / "whole", "--store").code == 0
    append, calls = ActivationWriter.append, []

    def cut(self: Any, rows: torch.Tensor) -> None:
        if len(calls) == 3:
            append(self, rows[:100])
            raise KeyboardInterrupt
        calls.append(1)
        append(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationWriter, "append", cut)
        got = run("fit", "latents/topk", *fit_words, "--store")
        assert got.code == 130 and got.line == "rarefy: stopped; the same command goes on with what is there"
    assert run("fit", "latents/topk", *fit_words, "--store").code == 0
    assert torch.equal(stored(tmp_path / "run"), stored(tmp_path / "whole"))
    assert snapshot(tmp_path / "run/methods") == snapshot(tmp_path / "whole/methods")


def test_a_damaged_shard_is_named_and_nothing_is_trained_on_it(run: Run, fit_words: list[Any], tmp_path: Path) -> None:
    assert run("fit", "latents/topk", *fit_words, "--store").code == 0
    shard = next((tmp_path / "run").rglob("shard-*.data"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    shutil.rmtree(tmp_path / "run/methods")
    shutil.rmtree(tmp_path / "run/checkpoints")
    refuses(run("fit", "latents/topk", *fit_words, "--store"), shard.name, f"delete {tmp_path / 'run/activations'}")
    assert not (tmp_path / "run/methods").exists()
    checked = run("check", tmp_path / "run")
    assert checked.code == 1 and shard.name in checked.out and "1 damaged" in checked.out
    shutil.rmtree(tmp_path / "run/activations")
    assert run("fit", "latents/topk", *fit_words, "--store").code == 0 and run("check", tmp_path / "run").code == 0


# --------------------------------------------------------------------------------------------------- transcoders


def test_a_transcoder_learns_the_mlp(run: Run, tiny: Path, corpus: Path, fit_words: list[Any], tmp_path: Path) -> None:
    words = ["layers.0.mlp.in" if w == "layers.0.resid_post" else w for w in fit_words]
    got = run("fit", "latents/topk", *words, "--target", "blocks.0.hook_mlp_out", "--steps", 150, "--json")
    assert got.code == 0 and got.json["sites"] == ["layers.0.mlp.in"]
    method = rarefy.load(tmp_path / "run/methods/latents__topk")
    assert method.arguments["d_out"] == 32
    x_NTD, y_NTD = flows(contexts(tiny, corpus), "model.layers.0.mlp")
    x_ND, y_ND = x_NTD[:, 1:].flatten(0, 1), y_NTD[:, 1:].flatten(0, 1)
    assert fvu(y_ND, method(x_ND)) < 0.7 < fvu(x_ND, method(x_ND))


@pytest.mark.parametrize(("site", "target", "said"), [
    ("layers.1.resid_post", "layers.0.mlp.out", "comes before"), ("layers.0.mlp.in", "layers.*.mlp.out", "names 2 sites"),
    ("layers.0.mlp.in", "layers.0.up_proj", "linear site"), ("layers.0.mlp.in", "layers.0.mlp.outt", "layers.0.mlp.out"),
])
def test_targets_that_cannot_be_reproduced(run: Run, fit_words: list[Any], tmp_path: Path, site: str, target: str, said: str) -> None:
    words = [site if w == "layers.0.resid_post" else w for w in fit_words]
    refuses(run("fit", "latents/topk", *words, "--target", target), said)
    assert not (tmp_path / "run").exists()


def test_the_random_baseline_has_no_transcoder_form(run: Run, fit_words: list[Any], tmp_path: Path) -> None:
    refuses(run("fit", "latents/topk,latents/random", *fit_words, "--target", "layers.1.mlp.out"), "latents/random", "leave it out")
    refuses(run("fit", "latents/topk", *fit_words, "--target", "layers.1.mlp.out", "--store"), "--store")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------- calibrated


def linear_words(fit_words: list[Any], site: str) -> list[Any]:
    at = fit_words.index("--data")
    return [fit_words[0], "--site", site, *fit_words[at : at + 2], "--tokens", 4000, "--context", CONTEXT, *fit_words[-2:]]


def test_wanda_keeps_the_weights_of_its_own_score(run: Run, tiny: Path, corpus: Path, fit_words: list[Any], tmp_path: Path) -> None:
    got = run("fit", "weights/wanda", *linear_words(fit_words, "layers.0.up_proj"), "--budget", 0.25, "--json")
    assert got.code == 0 and got.json["fitted"]["layers.0.up_proj"]["method"] == "weights/wanda"
    x_NTD = flows(contexts(tiny, corpus), "model.layers.0.mlp.up_proj")[0]
    score_OI = build_tiny().model.layers[0].mlp.up_proj.weight.abs() * x_NTD.flatten(0, 1).double().norm(dim=0)
    mask_OI = rarefy.load(tmp_path / "run/methods/layers.0.up_proj").select().mask
    for score, mask in zip(score_OI, mask_OI, strict=True):
        assert set(mask.nonzero()[:, 0].tolist()) == set(score.argsort(descending=True)[:8].tolist())
    assert run("fit", "weights/wanda", *linear_words(fit_words, "layers.0.up_proj"), "--budget", 0.25, "--json").json["finished_before"]
    refuses(run("fit", "weights/wanda", *linear_words(fit_words, "layers.0.up_proj"), "--budget", 0.5), "request.budget: was 0.25, now 0.5")


@pytest.mark.parametrize("headless", [False, True])
def test_models_without_a_next_token_are_fitted_too(run: Run, tiny: Path, fit_words: list[Any], tmp_path: Path, headless: bool) -> None:
    from site_models import build

    folder = Path(shutil.copytree(tiny, tmp_path / "bert", ignore=shutil.ignore_patterns("*.safetensors", "config.json")))
    model = build("bert")
    model.resize_token_embeddings(257)
    (tf.BertModel(model.config) if headless else model).save_pretrained(folder)
    assert run("fit", "latents/topk", folder, *fit_words[1:]).code == 0
    words = linear_words([folder, *fit_words[1:]], "layers.1.up_proj")
    assert run("fit", "weights/wanda", *words[:-1], tmp_path / "pruned").code == 0
    refuses(run("judge", tmp_path / "run"), "causal language model")


def test_a_lone_file_is_cut_in_two(tiny: Path, tmp_path: Path) -> None:
    whole = "".join(f"line {i} of the only file\n" for i in range(200))
    (tmp_path / "all.txt").write_text(whole)
    text = rarefy.text(str(tmp_path / "all.txt"), tf.AutoTokenizer.from_pretrained(tiny), context=CONTEXT, fit_tokens=0, judge_tokens=0)
    (end,) = text.judge_docs
    assert text.fit_names == ["all.txt (start)"] and end.name == "all.txt (end)" and end.text.startswith("line 1")
    assert 0.08 < len(end.text) / len(whole) < 0.11 and whole.endswith(end.text)
    fitted = rarefy.windows(text.fit).flatten().tolist()
    assert len(fitted) <= len(whole) - len(end.text) + 1   # a token a byte, and <s>


@pytest.mark.parametrize(("method", "site", "count"), [
    ("neurons/teal", "layers.*.*_proj", 14), ("neurons/wina", "layers.1.down_proj", 1), ("attention/quest", "layers.*.attn", 2),
    ("weights/magnitude", "layers.0.*_proj", 7),
])
def test_other_families_are_kept_site_by_site(run: Run, fit_words: list[Any], tmp_path: Path, method: str, site: str, count: int) -> None:
    got = run("fit", method, *linear_words(fit_words, site), "--json")
    assert got.code == 0 and len(got.json["fitted"]) == count == len(list((tmp_path / "run/methods").iterdir()))
    judged = run("judge", tmp_path / "run", "--tokens", 500, "--json")
    assert judged.code == 0 and [p["method"] for p in judged.json["points"]] == ["dense", method]
    shutil.rmtree(next((tmp_path / "run/methods").iterdir()))
    refuses(run("judge", tmp_path / "run"), "holds no fitted layers.", "to the end first")
