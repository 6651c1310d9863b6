"""`rarefy convert`, and `rarefy fit` of a method that reads gradients.

Shape letters: N = rows, D = width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from cli_tools import CONTEXT, Run, build_tiny, refuses

import rarefy
from rarefy.gradient_stream import GradientStream
from rarefy.latents.gradient_topk import GradientTopK


def test_a_run_becomes_a_jumprelu_run_as_sparse(run: Run, tiny: Path, corpus: Path, fit_words: list[Any], tmp_path: Path) -> None:
    """L0 is counted here, on rows of a plain hook; the result is judged like any other run."""
    assert run("fit", "latents/topk,latents/random", *fit_words, "--steps", 60).code == 0
    got = run("convert", tmp_path / "run", "--out", tmp_path / "jump", "--tokens", 1000, "--json")
    assert got.code == 0 and got.err == "" and got.json["method"] == "latents/topk" and got.json["tokens"] == 1000
    before, after = rarefy.load(tmp_path / "run/methods/latents__topk"), rarefy.load(tmp_path / "jump/methods/latents__jumprelu")
    ids_NT = rarefy.windows(rarefy.text(str(corpus), tf.AutoTokenizer.from_pretrained(tiny), context=CONTEXT, fit_tokens=4000, judge_tokens=1).fit)
    model, seen = build_tiny(), []
    model.model.layers[0].register_forward_hook(lambda m, i, o: seen.append(o[0] if isinstance(o, tuple) else o))
    with torch.no_grad():
        model(input_ids=ids_NT)
    x_ND = seen[0][:, 1:].flatten(0, 1)[:1000]
    fire = int((before.select(x_ND).dense > 0).sum())
    assert abs(int((after.select(x_ND).dense > 0).sum()) - fire) <= 1 and got.json["l0"] == got.json["l0_before"] == fire / 1000
    judged = run("judge", tmp_path / "jump", "--tokens", 400, "--json")
    assert judged.code == 0 and [p["method"] for p in judged.json["points"]] == ["dense", "latents/jumprelu"]
    assert run("check", tmp_path / "jump").code == 0


def test_what_cannot_be_converted_is_named(run: Run, fit_words: list[Any], tmp_path: Path) -> None:
    out = ("--out", tmp_path / "jump")
    refuses(run("convert", tmp_path / "none", *out), "none")
    assert run("fit", "latents/topk,latents/batch_topk,latents/relu", *fit_words).code == 0
    refuses(run("convert", tmp_path / "run", *out), "2 can be converted", "--method")
    refuses(run("convert", tmp_path / "run", *out, "--method", "latents/relu"), "latents/relu does not choose by rank")
    refuses(run("convert", tmp_path / "run", *out, "--method", "latents/gated"), "latents/gated", "holds latents/topk")
    refuses(run("convert", tmp_path / "run", *out, "--method", "latents/topk", "--tokens", 0), "tokens=0")
    assert not (tmp_path / "jump").exists()
    assert run("convert", tmp_path / "run", *out, "--method", "latents/batch_topk").code == 0


def test_gradients_reach_a_method_that_reads_them(run: Run, tiny: Path, corpus: Path, fit_words: list[Any], tmp_path: Path) -> None:
    """The run's method is the one that the same loop gives on a GradientStream of the same text."""
    assert run("fit", "latents/gradient_topk", *fit_words, "--set", "beta=3").code == 0
    got = rarefy.load(tmp_path / "run/methods/latents__gradient_topk")
    ids_NT = rarefy.windows(rarefy.text(str(corpus), tf.AutoTokenizer.from_pretrained(tiny), context=CONTEXT, fit_tokens=4000, judge_tokens=1).fit)
    want = GradientTopK(32, 64, k=4, beta=3)
    stream = GradientStream(tf.AutoModelForCausalLM.from_pretrained(tiny).eval(), "layers.0.resid_post", ids_NT, 64)
    rarefy.train({"latents/gradient_topk": want}, stream, rarefy.Recipe(steps=6, lr=0.01))
    assert all(torch.equal(value, want.state_dict()[name]) for name, value in got.state_dict().items()) and float(want.scale_gradient) != 1
    more = fit_words[:-1] + [tmp_path / "other"]
    refuses(run("fit", "latents/gradient_topk,latents/topk", *more), "latents/gradient_topk", "latents/topk is not", "two runs")
    refuses(run("fit", "latents/gradient_topk", *more, "--store"), "leave --store out")
