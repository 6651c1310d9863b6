"""The commands of the README on the built-in model and the standard library, made small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from cli_tools import Run

import rarefy

pytestmark = pytest.mark.slow
SMALL = ["--context", 256, "--tokens", 60_000]


def test_a_dictionary_from_fitting_to_its_page(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "runs/x"
    words = ["builtin", "--site", "layers.3.resid_post", "--width", 1024, "--k", 32, "--data", "stdlib", "--steps", 80, "--batch", 512]
    assert run("fit", "latents/topk,latents/gated", *words, *SMALL, "--out", out).code == 0
    got = run("judge", out, "--against", "dense,latents/random", "--tokens", 6000, "--json")
    assert got.code == 0
    found = {p["method"]: {k: m["mean"] for k, m in p["metrics"].items()} for p in got.json["points"]}
    assert list(found) == ["dense", "latents/topk", "latents/gated", "latents/random"]
    assert found["latents/topk"]["loss_recovered"] > found["latents/random"]["loss_recovered"] + 0.05
    assert found["latents/topk"]["l0"] <= 32 and found["latents/topk"]["fvu"] < found["latents/random"]["fvu"]
    assert run("show", out, "--export", tmp_path / "page.html").code == 0 and run("check", tmp_path / "runs").code == 0


def test_pruning_from_the_frontier_to_a_folder(run: Run, tmp_path: Path) -> None:
    words = ["builtin", "--data", "stdlib", "--context", 256, "--calibration", 6000]
    methods = "weights/wanda,weights/magnitude,weights/random"
    got = run("sweep", methods, *words, "--budget", "0.3:0.9:0.3", "--tokens", 6000, "--out", tmp_path / "s", "--json")
    assert got.code == 0
    increase = {(p["method"], p["budget"]): p["metrics"]["ce_increase"] for p in got.json["points"]}
    for budget in (0.3, 0.6):
        assert increase["weights/wanda", budget]["high"] < increase["weights/random", budget]["low"]
        assert increase["weights/magnitude", budget]["high"] < increase["weights/random", budget]["low"]
    assert run("apply", "weights/wanda", *words, "--budget", 0.5, "--out", tmp_path / "pruned").code == 0
    pruned, (dense, _, _) = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32), rarefy.open_model("builtin")
    for name, value in pruned.state_dict().items():
        whole = dense.state_dict()[name]
        share = float((value == whole).double().mean())
        assert share == pytest.approx(0.5, abs=0.01) if "_proj" in name else share == 1
        assert ((value == whole) | (value == 0)).all()
