"""`rarefy export`, `rarefy import` and `fit --resume-from` another library's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import CONTEXT, Run, refuses, snapshot

from rarefy.formats import LAYOUTS, read_dictionary, write_dictionary
from rarefy.formats.units import settle
from rarefy.latents.gated import Gated
from rarefy.latents.jumprelu import JumpReLU
from rarefy.latents.topk import TopK
from rarefy.store.methods import load
from rarefy.store.run import read_run

SITE = "layers.0.resid_post"


@pytest.fixture
def fitted(run: Run, fit_words: list[Any], tmp_path: Path) -> Path:
    assert run("fit", "latents/topk", *fit_words, "--json").code == 0
    return tmp_path / "run"


def metrics(answer: Any) -> dict[str, float]:
    (point,) = (p for p in answer.json["points"] if p["role"] == "method")
    return {name: metric["mean"] for name, metric in point["metrics"].items()}


@pytest.mark.parametrize("layout", ["saelens", "saelens-v5", "sparsify", "dictionary_learning"])
def test_there_and_back_is_judged_the_same(run: Run, fitted: Path, tiny: Path, corpus: Path, tmp_path: Path, layout: str) -> None:
    answer = run("export", fitted, "--format", layout, "--out", tmp_path / "theirs", "--json").json
    assert answer["method"] == "latents/topk" and answer["format"] == layout and len(answer["files"]) == 2
    text = ["--data", corpus, "--context", CONTEXT, "--tokens", 4000]
    back = run("import", tmp_path / "theirs", tiny, "--site", SITE, *text, "--out", tmp_path / "back", "--json").json
    assert back["method"] == "latents/topk" and back["sites"] == [SITE] and back["format"] == layout.removesuffix("-v5")
    x = torch.randn(20, 32)
    ours, theirs = (load(folder / "methods" / "latents__topk") for folder in (fitted, tmp_path / "back"))
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), ours(x), rtol=1e-5, atol=1e-5)
    if layout == "saelens":
        judged = [metrics(run("judge", folder, "--tokens", 600, "--json")) for folder in (fitted, tmp_path / "back")]
        assert judged[0] == pytest.approx({**judged[1], "dead": judged[0]["dead"]}, rel=1e-3, abs=1e-4)
        assert run("show", tmp_path / "back", "--export", tmp_path / "page.html").code == 0
        assert run("check", tmp_path / "back").code == 0


def test_a_transcoder_by_what_its_files_say(run: Run, fit_words: list[Any], tiny: Path, corpus: Path, tmp_path: Path) -> None:
    words = [SITE if w == "layers.0.resid_post" else w for w in fit_words]
    words[words.index(SITE)] = "layers.1.mlp.in"
    assert run("fit", "latents/relu", *words, "--target", "layers.1.mlp.out").code == 0
    assert run("export", tmp_path / "run", "--format", "circuit-tracer", "--out", tmp_path / "theirs").code == 0
    assert sorted(p.name for p in (tmp_path / "theirs").iterdir()) == ["config.yaml", "layer_1.safetensors"]
    text = ["--data", corpus, "--context", CONTEXT, "--tokens", 4000]
    back = run("import", tmp_path / "theirs", tiny, *text, "--out", tmp_path / "back", "--json").json
    assert back["says"]["target"] == "layers.1.mlp.out"
    made = read_run(tmp_path / "back")["made"]
    assert (made["sites"], made["target"], made["imported"]["format"]) == (["layers.1.mlp.in"], "layers.1.mlp.out", "circuit-tracer")
    judged = [metrics(run("judge", tmp_path / folder, "--tokens", 600, "--json")) for folder in ("run", "back")]
    assert judged[0] == pytest.approx({**judged[1], "dead": judged[0]["dead"]}, rel=1e-3, abs=1e-4)


def test_training_goes_on_from_another_library(run: Run, fitted: Path, fit_words: list[Any], tmp_path: Path) -> None:
    """A step at a rate of nothing leaves the function as it was; a real one moves it; a run taken up again does not begin anew."""
    run("export", fitted, "--out", tmp_path / "theirs")
    before = read_dictionary(tmp_path / "theirs").method
    out = fit_words.index("--out")
    words = [*fit_words[:out], *fit_words[out + 2 :], "--resume-from", tmp_path / "theirs"]
    words[words.index("--lr") + 1] = 1e-12
    assert run("fit", "latents/topk", *words, "--out", tmp_path / "still").code == 0
    x = torch.randn(20, 32)
    still = load(tmp_path / "still" / "methods" / "latents__topk")
    assert float(still.scale) != 1.0 and float(still.scale) == 2.0 ** round(torch.log2(still.scale).item())
    with torch.no_grad():
        torch.testing.assert_close(still(x), before(x), rtol=1e-4, atol=1e-4)
    words[words.index("--lr") + 1] = 0.01
    first = run("fit", "latents/topk", *words, "--out", tmp_path / "more", "--json").json
    moved = load(tmp_path / "more" / "methods" / "latents__topk")
    with torch.no_grad():
        assert not torch.allclose(moved(x), before(x), rtol=1e-3, atol=1e-3)
    assert first["last"]["methods"]["latents/topk"]["fvu"] < 1
    assert run("fit", "latents/topk", *words, "--out", tmp_path / "more", "--json").json["finished_before"]


def test_training_refuses_what_does_not_fit(run: Run, fitted: Path, fit_words: list[Any], tmp_path: Path) -> None:
    run("export", fitted, "--out", tmp_path / "theirs")
    words = [*fit_words[: fit_words.index("--out")], "--out", tmp_path / "new", "--resume-from", tmp_path / "theirs"]
    refuses(run("fit", "latents/relu", *words), "holds a latents/topk, not a latents/relu")
    refuses(run("fit", "latents/topk,latents/relu", *words), "one dictionary of another library")
    words[words.index("--width") + 1] = 32
    refuses(run("fit", "latents/topk", *words), "W_dec_FD", "[64, 32]", "--width")
    (tmp_path / "theirs" / "sae_weights.safetensors").write_bytes(b"x")
    refuses(run("fit", "latents/topk", tmp_path / "no-such-model", *words[1:]), "sae_weights.safetensors")       # before the model is looked for
    assert not (tmp_path / "new").exists()


def test_export_refuses(run: Run, fitted: Path, fit_words: list[Any], tmp_path: Path) -> None:
    refuses(run("export", fitted, "--format", "numpy", "--out", tmp_path / "a"), "'numpy'", *LAYOUTS)
    refuses(run("export", fitted, "--method", "latents/relu", "--out", tmp_path / "a"), "holds latents/topk")
    refuses(run("export", fitted, "--format", "gemma_scope", "--out", tmp_path / "a"), "topk", "to_jumprelu")
    refuses(run("export", fitted, "--format", "circuit-tracer", "--out", tmp_path / "a"), "convert")
    refuses(run("export", tmp_path / "none", "--out", tmp_path / "a"), "not a run")
    assert not (tmp_path / "a").exists()
    before = snapshot(fitted)
    refuses(run("export", fitted, "--out", fitted), "already")
    assert snapshot(fitted) == before
    assert run("export", fitted / "methods" / "latents__topk", "--out", tmp_path / "a").code == 0
    assert json.loads((tmp_path / "a" / "cfg.json").read_text())["metadata"]["hook_name"] is None


def test_import_refuses(run: Run, fitted: Path, tiny: Path, corpus: Path, tmp_path: Path) -> None:
    run("export", fitted / "methods" / "latents__topk", "--out", tmp_path / "theirs")
    text = ["--data", corpus, "--context", CONTEXT, "--tokens", 4000, "--out", tmp_path / "back"]
    refuses(run("import", tmp_path / "theirs", tiny, *text), "--site")
    refuses(run("import", tmp_path / "theirs", tiny, "--site", "layers.0.mlp.hidden", *text), "32 channels", "48")
    refuses(run("import", fitted, tiny, "--site", SITE, *text), "rarefy.load")
    refuses(run("import", tmp_path / "none", tiny, "--site", SITE, *text), "does not exist")
    refuses(run("import", tmp_path / "theirs", tiny, "--site", "layers.*.resid_post", *text), "2 sites")
    assert not (tmp_path / "back").exists()
    assert run("import", tmp_path / "theirs", tiny, "--site", "blocks.0.hook_resid_post", *text).code == 0
    refuses(run("import", tmp_path / "theirs", tiny, "--site", "layers.1.resid_post", *text), "begun with other settings")


@pytest.mark.parametrize("make", [lambda: TopK(6, 12, 3), lambda: JumpReLU(6, 12), lambda: Gated(6, 12), lambda: TopK(6, 12, 3, d_out=6, skip=True)])
@pytest.mark.parametrize("size", [1e-3, 37.0])
def test_units_are_settled_without_moving_a_bit(make: Any, size: float) -> None:
    """The scale fits the rows to a factor of sqrt 2; encoder, biases and output keep their bits but for the logarithm of a threshold."""
    method, x = make(), size * torch.randn(500, 6)
    with torch.no_grad():
        for p in method.parameters():
            p.normal_(std=0.5)
        method.b_enc_F.mul_(size)
        before = method(x)
        y = x if not method.transcodes else 5 * x
        settle(method, x, y)
        assert 2**-0.6 < float((method.scaled(x) - method.scaled(x).mean(0)).square().mean().sqrt()) < 2**0.6
        if isinstance(method, JumpReLU):
            torch.testing.assert_close(method(x), before, rtol=1e-6, atol=1e-6 * size)
        else:
            assert torch.equal(method(x), before)
        again = {k: v.clone() for k, v in method.state_dict().items()}
        settle(method, 100 * x, 100 * y)
        assert all(torch.equal(v, again[k]) for k, v in method.state_dict().items())


def test_a_written_folder_is_read_by_its_files_not_by_its_name(tmp_path: Path) -> None:
    write_dictionary(TopK(6, 12, 3).eval(), tmp_path / "layer_0.safetensors", "sparsify")
    assert read_dictionary(tmp_path / "layer_0.safetensors").layout == "sparsify"
