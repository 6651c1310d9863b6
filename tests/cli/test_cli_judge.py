"""`rarefy judge` and `rarefy show`: every figure against a model run by hand with plain hooks.

Shape letters: B = batch, T = tokens, D = width, V = vocabulary.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from cli_tools import CONTEXT, Run, build_tiny, refuses, snapshot

import rarefy
from rarefy.store.lines import read_lines
from rarefy.store.lock import RunLock

TOKENS = 600


def held_out(tiny: Path, corpus: Path) -> list[Any]:
    """The batches that a run on the corpus is judged on."""
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny)
    return rarefy.text(str(corpus), tokenizer, context=CONTEXT, fit_tokens=4000, judge_tokens=TOKENS).judge


Put = Callable[[torch.nn.Module], Any]


@torch.no_grad()
def naive(batches: list[Any], put: Put) -> dict[str, float]:
    """CE increase, KL and agreement, a window and a token at a time, with `put` hooking a copy of the model."""
    dense, other = build_tiny(), build_tiny()
    put(other)
    ce, kl, top1 = [], [], []
    for batch in batches:
        for ids_T, doc_T in zip(batch.input_ids, batch.doc, strict=True):
            p_TV, q_TV = (m(input_ids=ids_T[None]).logits[0].double().softmax(-1) for m in (dense, other))
            for t in range(len(ids_T) - 1):
                if doc_T[t] == doc_T[t + 1]:
                    p, q, wanted = p_TV[t], q_TV[t], ids_T[t + 1]
                    ce.append(float(p[wanted].log() - q[wanted].log()))
                    kl.append(float((p * (p.log() - q.log())).sum()))
                    top1.append(float(p.argmax() == q.argmax()))
    return {"ce_increase": sum(ce) / len(ce), "kl": sum(kl) / len(kl), "top1": sum(top1) / len(top1)}


def past_first(old_BTD: torch.Tensor, new_BTD: torch.Tensor) -> torch.Tensor:
    return torch.cat([old_BTD[:, :1], new_BTD[:, 1:]], 1)


def means(answer: Any, method: str) -> dict[str, float]:
    (point,) = (p for p in answer.json["points"] if p["method"] == method)
    return {name: metric["mean"] for name, metric in point["metrics"].items()}


def close(got: dict[str, float], wanted: dict[str, float]) -> None:
    for name, value in wanted.items():
        assert got[name] == pytest.approx(value, rel=2e-3, abs=2e-4), name


def output_of(path: str, new: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Put:
    """Replace the output of a module by new(input, output)."""
    def hook(module: Any, inputs: Any, output: Any) -> Any:
        old = output[0] if isinstance(output, tuple) else output
        made = new(inputs[0], old)
        return (made, *output[1:]) if isinstance(output, tuple) else made

    return lambda model: model.get_submodule(path).register_forward_hook(hook)


@pytest.fixture
def fitted(run: Run, fit_words: list[Any], tmp_path: Path) -> Path:
    assert run("fit", "latents/topk,latents/gated", *fit_words, "--steps", 40).code == 0
    return tmp_path / "run"


def test_dictionaries_are_judged_as_by_hand(run: Run, tiny: Path, corpus: Path, fitted: Path) -> None:
    got = run("judge", fitted, "--against", "dense,latents/random", "--tokens", TOKENS, "--json")
    assert got.code == 0 and got.err == "" and got.json["schema"] == 1
    assert [p["method"] for p in got.json["points"]] == ["dense", "latents/topk", "latents/gated", "latents/random"]
    batches = held_out(tiny, corpus)
    method = rarefy.load(fitted / "methods/latents__topk")
    path = "model.layers.0"
    close(means(got, "latents/topk"), naive(batches, output_of(path, lambda x, y: past_first(y, method(y)))))
    close(means(got, "dense"), {"ce_increase": 0, "kl": 0, "top1": 1})
    x_ND, seen = [], build_tiny()
    seen.get_submodule(path).register_forward_hook(lambda m, i, o: x_ND.append((o[0] if isinstance(o, tuple) else o)[:, 1:].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            seen(input_ids=batch.input_ids)
        x = torch.cat(x_ND).double()
        y = method(x.float()).double()
    zero = naive(batches, output_of(path, lambda x, y: past_first(y, torch.zeros_like(y))))["ce_increase"]
    mean = naive(batches, output_of(path, lambda _, y: past_first(y, x.mean(0).float().expand_as(y))))["ce_increase"]
    mine, on = means(got, "latents/topk"), method.select(x.float()).dense > 0
    close(mine, {
        "fvu": float((x - y).square().sum() / (x - x.mean(0)).square().sum()), "l0": float(on.sum(-1).float().mean()),
        "dead": float((on.sum(0) == 0).float().mean()),
        "loss_recovered": 1 - mine["ce_increase"] / zero, "loss_recovered_mean": 1 - mine["ce_increase"] / mean,
    })


def test_a_transcoder_is_spliced_from_its_site_to_its_target(
    run: Run, tiny: Path, corpus: Path, fit_words: list[Any], tmp_path: Path,
) -> None:
    words = ["layers.0.mlp.in" if w == "layers.0.resid_post" else w for w in fit_words]
    assert run("fit", "latents/topk", *words, "--target", "layers.0.mlp.out", "--steps", 40).code == 0
    got = run("judge", tmp_path / "run", "--tokens", TOKENS, "--json")
    assert got.code == 0
    method, batches, path = rarefy.load(tmp_path / "run/methods/latents__topk"), held_out(tiny, corpus), "model.layers.0.mlp"
    wanted = naive(batches, output_of(path, lambda x, y: past_first(y, method(x))))
    close(means(got, "latents/topk"), wanted)
    autoencoder = naive(batches, output_of(path, lambda x, y: past_first(y, method(y))))      # what a splice at one site would do
    assert abs(autoencoder["ce_increase"] - wanted["ce_increase"]) > 0.01
    zero = naive(batches, output_of(path, lambda x, y: past_first(y, torch.zeros_like(y))))["ce_increase"]
    close(means(got, "latents/topk"), {"loss_recovered": 1 - wanted["ce_increase"] / zero})
    refuses(run("judge", tmp_path / "run", "--against", "latents/random"), "latents/random", "transcoders", "leave it out")


@pytest.mark.parametrize(("site", "logits"), [("layers.0.mlp.hidden", False), ("layers.0.attn.v", False), ("layers.1.attn.out", True)])
def test_only_directions_of_the_stream_are_read_as_tokens(run: Run, fit_words: list[Any], tmp_path: Path, site: str, logits: bool) -> None:
    words = [site if w == "layers.0.resid_post" else w for w in fit_words]
    assert run("fit", "latents/topk", *words).code == 0
    assert run("judge", tmp_path / "run", "--tokens", TOKENS).code == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    top = next(t for t in report["latents"]["top"] if t)
    assert bool(top.get("logits_up")) == logits and top["contexts"] and len(top["hist"]) == 20


def test_weights_are_judged_beside_other_methods_at_the_same_budget(run: Run, tiny: Path, corpus: Path, tmp_path: Path) -> None:
    where = tmp_path / "run"
    words = [tiny, "--site", "layers.*.up_proj", "--data", corpus, "--tokens", 2000, "--context", CONTEXT, "--out", where]
    assert run("fit", "weights/wanda", *words, "--set", "n=1", "--set", "m=4").code == 0
    got = run("judge", where, "--against", "dense,weights/magnitude", "--tokens", TOKENS, "--json")
    assert got.code == 0
    assert [p["method"] for p in got.json["points"]] == ["dense", "weights/wanda", "weights/magnitude"]
    assert all((p["budget"], p["density"]) == (0.25, 0.25) for p in got.json["points"][1:])

    def magnitude(model: Any) -> None:
        for layer in model.model.layers:
            weight = layer.mlp.up_proj.weight.data
            groups = weight.unflatten(-1, (-1, 4))
            weight.copy_((groups * (groups.abs() == groups.abs().amax(-1, keepdim=True))).flatten(-2))

    tokenizer = tf.AutoTokenizer.from_pretrained(tiny)
    batches = rarefy.text(str(corpus), tokenizer, context=CONTEXT, fit_tokens=2000, judge_tokens=TOKENS).judge
    close(means(got, "weights/magnitude"), naive(batches, magnitude))


def test_the_page_and_the_points_are_those_of_the_last_judging(run: Run, fitted: Path, tmp_path: Path) -> None:
    refuses(run("show", fitted, "--export", tmp_path / "page.html"), "no page yet", f"rarefy judge {fitted}")
    for tokens in (TOKENS, 2 * TOKENS):
        got = run("judge", fitted, "--tokens", tokens, "--json")
        assert read_lines(fitted / "points.jsonl") == [p for p in got.json["points"] if p["role"] != "dense"]
    report = json.loads((fitted / "report.json").read_text())
    assert [c["method"] for c in report["curves"]] == ["latents/topk", "latents/gated"]
    assert [p["method"] for p in report["units"][0]["points"]] == ["dense", "latents/topk", "latents/gated"]
    assert "none fitted on" in report["model"]["heldout"] and report["model"]["sha256"]
    got = run("show", fitted, "--export", tmp_path / "page.html", "--json")
    assert got.json == {"schema": 1, "page": str(tmp_path / "page.html")}
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert run("check", fitted).code == 0


def test_text_in_one_document_has_no_interval_and_is_still_shown(run: Run, corpus: Path, fit_words: list[Any], tmp_path: Path) -> None:
    whole = tmp_path / "all.txt"
    whole.write_text("".join(p.read_text() for p in sorted(corpus.rglob("*.txt"))))
    words = [whole if w == corpus else w for w in fit_words]
    assert run("fit", "latents/topk", *words).code == 0
    got = run("judge", tmp_path / "run", "--tokens", 300, "--json")          # .json fails on Infinity
    assert got.code == 0 and got.json["points"][1]["metrics"]["ce_increase"]["low"] is None
    assert run("judge", tmp_path / "run", "--tokens", 300).code == 0
    assert "1 document held out" in json.loads((tmp_path / "run/report.json").read_text())["model"]["heldout"]


def test_what_cannot_be_judged_is_refused_and_changes_nothing(run: Run, tiny: Path, fitted: Path, tmp_path: Path) -> None:
    before = snapshot(fitted)
    refuses(run("judge", fitted, "--against", "weights/wanda"), "weights/wanda", "like with like")
    refuses(run("judge", fitted, "--against", "latents/relu"), "latents/relu", "rarefy fit latents/topk,latents/gated,latents/relu")
    refuses(run("judge", fitted, "--against", "latents/randm"), "latents/random")
    refuses(run("judge", fitted, "--tokens", "-1"), "tokens=-1")
    refuses(run("judge", tmp_path / "nowhere"), "not a run")
    refuses(run("judge", fitted, "--data", tmp_path / "nowhere"), "no such file or folder")
    with RunLock(fitted):
        refuses(run("judge", fitted), "being written by process")
    assert snapshot(fitted) == before
    moved = Path(shutil.move(fitted / "methods/latents__gated", tmp_path / "aside"))
    refuses(run("judge", fitted), "latents/gated", "to the end first")
    shutil.move(moved, fitted / "methods/latents__gated")
    assert run("judge", fitted, "--against", "latents/gated", "--tokens", TOKENS, "--json").code == 0     # a method of the run itself


def test_a_model_with_other_weights_is_refused(run: Run, tiny: Path, fit_words: list[Any], tmp_path: Path) -> None:
    mine = Path(shutil.copytree(tiny, tmp_path / "tiny"))
    assert run("fit", "latents/topk", mine, *fit_words[1:]).code == 0
    model = build_tiny()
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(mine)
    refuses(run("judge", tmp_path / "run"), "other weights", "fit again")
    refuses(run("fit", "latents/topk", mine, *fit_words[1:]), "model.sha256: was")
