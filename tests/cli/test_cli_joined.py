"""`rarefy fit` and `judge` on several sites and two models, and `rarefy groups`, as a user meets them.

Shape letters: N = rows, T = tokens, D = width.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from cli_tools import CONTEXT, Run, build_tiny, refuses, save_byte_tokenizer, snapshot

import rarefy
from rarefy.store.shards import ActivationStore

BOTH = "layers.0.resid_post,layers.1.resid_post"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with other weights."""
    folder = tmp_path_factory.mktemp("models") / "other"
    model = build_tiny()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
    model.save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture
def words(fit_words: list[Any]) -> list[Any]:
    """fit_words without its site."""
    return [fit_words[0], *fit_words[3:]]


def contexts(words: list[Any]) -> torch.Tensor:
    """[N, T] what a run with these words is fitted on."""
    tokenizer = tf.AutoTokenizer.from_pretrained(words[0])
    return rarefy.windows(rarefy.text(str(words[2]), tokenizer, context=CONTEXT, fit_tokens=4000, judge_tokens=1).fit)


def points(answer: Any) -> dict[str, dict[str, float]]:
    return {p["method"]: {k: v["mean"] for k, v in p["metrics"].items()} for p in answer.json["points"]}


def test_a_crosscoder_from_fit_to_judge(run: Run, words: list[Any], tmp_path: Path) -> None:
    got = run("fit", "latents/topk", *words, "--site", BOTH, "--join", "concat", "--steps", 60, "--json")
    assert got.code == 0 and got.json["sites"] == BOTH.split(",")
    assert got.json["fitted"]["latents/topk"]["arguments"]["d_in"] == [32, 32]
    judged = run("judge", tmp_path / "run", "--tokens", 500, "--against", "latents/random", "--json")
    there = points(judged)
    assert list(there) == [f"{m}{at}" for m in ("latents/topk", "latents/random") for at in ("", *(f" at {s}" for s in BOTH.split(",")))]
    for at in ("", *(f" at {s}" for s in BOTH.split(","))):
        assert there[f"latents/topk{at}"]["fvu"] < 0.6 * there[f"latents/random{at}"]["fvu"]
    record = json.loads((tmp_path / "run/joined.json").read_text())["dictionaries"]["latents/topk"]
    norms = rarefy.load(tmp_path / "run/methods/latents__topk").decoder_norms()
    torch.testing.assert_close(torch.tensor(record["relative_norms"]), (norms / norms.sum(-1, keepdim=True)).detach())
    assert "mean share" in judged.json["notes"][0]
    assert run("check", tmp_path / "run").code == 0
    assert "is finished already" in run("fit", "latents/topk", *words, "--site", BOTH, "--join", "concat", "--steps", 60).out
    refuses(run("convert", tmp_path / "run", "--out", tmp_path / "converted"), "several sites", "one site")


def test_one_dictionary_for_all_layers_also_from_a_store(run: Run, words: list[Any], tmp_path: Path) -> None:
    many = [*words, "--site", "layers.*.resid_post", "--join", "mix", "--steps", 40]
    assert run("fit", "latents/topk", *many, "--store").code == 0
    (folder,) = (tmp_path / "run/activations").iterdir()
    store = ActivationStore(folder)
    x_ND = torch.cat([x for x, _ in itertools.islice(rarefy.StoreStream(store, len(store)).batches(), 1)])
    model, ids_NT = build_tiny(), contexts(words)
    with torch.no_grad():
        states = [rarefy.capture(model, [site], input_ids=ids_NT)[site][:, 1:].flatten(0, 1) for site in BOTH.split(",")]
    assert len(store) == 2 * len(states[0])
    torch.testing.assert_close(x_ND.sort(0).values, torch.cat(states).sort(0).values)
    judged = run("judge", tmp_path / "run", "--tokens", 500, "--json")
    assert list(points(judged)) == ["dense", *(f"latents/topk at {site}" for site in BOTH.split(","))]
    assert all(0 < p["fvu"] < 0.9 for name, p in points(judged).items() if name != "dense")
    record = json.loads((tmp_path / "run/joined.json").read_text())["dictionaries"]["latents/topk"]
    assert len(record["layer"]) == 64 and all(0 <= layer <= 1 for layer in record["layer"])
    assert record["summary"]["within_token"] <= record["summary"]["within_prompt"] <= record["summary"]["variance"] <= 0.25


def test_two_models_side_by_side(run: Run, words: list[Any], other: Path, tmp_path: Path) -> None:
    two = [*words, "--site", "layers.0.resid_post", "--join", "concat", "--beside", other]
    assert run("fit", "latents/batch_topk", *two).code == 0
    judged = run("judge", tmp_path / "run", "--tokens", 500, "--json")
    assert list(points(judged)) == ["dense", "latents/batch_topk at layers.0.resid_post"]
    record = json.loads((tmp_path / "run/joined.json").read_text())["dictionaries"]["latents/batch_topk"]
    assert record["sites"] == ["layers.0.resid_post", "beside:layers.0.resid_post"]
    assert sum(record["kinds"].values()) == 64 == sum(record["histogram"])
    with torch.no_grad():
        (model := build_tiny()).model.norm.weight.add_(1)
    model.save_pretrained(other)
    refuses(run("judge", tmp_path / "run"), "other weights", str(other))


def test_transcoders_with_a_skip_and_across_layers(run: Run, words: list[Any], tmp_path: Path) -> None:
    one = [*words, "--site", "layers.0.mlp.in", "--target", "layers.0.mlp.out", "--set", "skip=true"]
    assert run("fit", "latents/topk", *one).code == 0
    assert "W_skip_ED" in rarefy.load(tmp_path / "run/methods/latents__topk").state_dict()
    assert 0 < points(run("judge", tmp_path / "run", "--tokens", 500, "--json"))["latents/topk"]["fvu"] < 1.5
    words[-1] = tmp_path / "clt"
    across = [*words, "--site", "layers.*.mlp.in", "--target", "layers.*.mlp.out", "--steps", 60]
    assert run("fit", "latents/cross_layer", *across).code == 0
    method = rarefy.load(tmp_path / "clt/methods/latents__cross_layer")
    assert method.arguments["d_in"] == [32, 32] and [len(table) for table in method.W_dec] == [32, 64]
    there = points(run("judge", tmp_path / "clt", "--tokens", 500, "--json"))
    assert list(there)[1:] == ["latents/cross_layer", *(f"latents/cross_layer at layers.{n}.mlp.out" for n in range(2))]


def test_groups_of_layers(run: Run, tiny: Path, corpus: Path) -> None:
    words = ("groups", tiny, "--data", corpus, "--context", CONTEXT, "--tokens", 1000)
    got = run(*words, "--groups", 1, "--json").json
    assert got["groups"] == [BOTH.split(",")] and 0 < got["distance"][0][1] < 1 and got["distance"][0][0] == 0
    assert f"--site {BOTH} --join mix" in run(*words, "--groups", 1).out
    assert run(*words, "--groups", 2, "--json").json["groups"] == [[site] for site in BOTH.split(",")]
    refuses(run(*words, "--groups", 3), "--groups 3", "1..2")
    refuses(run(*words, "--linkage", "best"), "--linkage 'best'", "complete")
    refuses(run(*words, "--site", "layers.0.q_proj"), "--site layers.0.q_proj names no stream site")


@pytest.mark.parametrize("methods, more, says", [
    ("latents/topk", ["--site", "layers.*.resid_post"], ["names 2 sites", "concat", "mix"]),
    ("latents/topk", ["--site", BOTH, "--join", "sum"], ["--join 'sum'"]),
    ("latents/topk", ["--site", "layers.0.resid_post", "--join", "mix"], ["joins nothing"]),
    ("latents/topk", ["--set", "skip=true"], ["skip=True is for transcoders"]),
    ("latents/matching_pursuit", ["--target", "layers.0.mlp.out", "--set", "skip=true"], ["skip"]),
    ("latents/cross_layer", ["--site", "layers.*.mlp.in"], ["--target 'layers.*.mlp.out'"]),
    ("latents/cross_layer", ["--site", "layers.*.mlp.in", "--target", "layers.0.mlp.out"], ["2 sites", "--target 1"]),
    ("latents/cross_layer", ["--site", "layers.*.mlp.in", "--target", "layers.*.mlp.out", "--join", "mix"], ["--join mix", "cross_layer"]),
    ("latents/topk", ["--site", "layers.1.mlp.in,layers.0.mlp.in", "--target", "layers.*.mlp.out", "--join", "mix"], ["comes before"]),
    ("latents/topk", ["--site", BOTH, "--join", "concat", "--objective", "e2e"], ["--objective e2e"]),
    ("latents/topk", ["--beside", "elsewhere"], ["--join concat"]),
    ("weights/wanda", ["--join", "mix"], ["--join is for dictionaries"]),
    ("latents/topk", ["--site", "layers.0.resid_post,layers.0.mlp.hidden", "--join", "mix"], ["one width"]),
])
def test_what_makes_no_sense_is_refused_by_name(run: Run, words: list[Any], tmp_path: Path, methods: str, more: list[str], says: list[str]) -> None:
    before = snapshot(tmp_path)
    if methods.startswith("weights"):
        words = [words[0], "--data", words[2], "--out", tmp_path / "run"]
    refuses(run("fit", methods, *words, *more), *says)
    assert snapshot(tmp_path) == before


def test_other_tokens_are_refused(run: Run, words: list[Any], tmp_path: Path) -> None:
    folder = tmp_path / "other"
    build_tiny().save_pretrained(folder)
    save_byte_tokenizer(folder)
    made = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = made["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(made))
    refuses(run("fit", "latents/topk", *words, "--site", BOTH, "--join", "concat", "--beside", folder), "another vocabulary", "--beside")
