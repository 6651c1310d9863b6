"""`rarefy fit --objective` and `--resume-from`, `rarefy attribute` and `rarefy track`, on the tiny model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import Run, refuses, snapshot

import rarefy
from rarefy.latents.topk import TopK


@pytest.fixture
def words(tiny: Path, corpus: Path, tmp_path: Path) -> list[Any]:
    """A fit that takes a moment; the folder comes last."""
    return [tiny, "--site", "layers.0.resid_post", "--data", corpus, "--width", 64, "--k", 4, "--steps", 3, "--batch", 128,
            "--context", 32, "--tokens", 2000, "--out", tmp_path / "run"]


def test_an_end_to_end_run_saves_a_plain_dictionary_and_is_judged_as_one(run: Run, words: list[Any], tmp_path: Path) -> None:
    got = run("fit", "latents/topk,latents/random", *words, "--objective", "e2e+downstream", "--downstream", 0.5, "--json")
    assert got.code == 0, got
    parts = got.json["last"]["methods"]["latents/topk"]
    assert parts["kl"] > 0 and parts["downstream"] > 0
    assert isinstance(rarefy.load(tmp_path / "run/methods/latents__topk"), TopK)
    before = snapshot(tmp_path / "run/methods")
    shutil.rmtree(tmp_path / "run/methods")
    again = run("fit", "latents/topk,latents/random", *words, "--objective", "e2e+downstream", "--downstream", 0.5)
    assert again.code == 0 and snapshot(tmp_path / "run/methods") == before
    assert run("judge", tmp_path / "run", "--tokens", 500).code == 0
    refuses(run("fit", "latents/topk,latents/random", *words), "other settings", "objective: was 'e2e+downstream', now 'local'")


def test_a_run_is_gone_on_from(run: Run, words: list[Any], tmp_path: Path) -> None:
    assert run("fit", "latents/topk", *words).code == 0
    old = rarefy.load(tmp_path / "run/methods/latents__topk")
    for number, source in enumerate((tmp_path / "run", tmp_path / "run/methods/latents__topk")):
        out = [*words[:-1], tmp_path / f"tuned{number}", "--objective", "e2e", "--resume-from", source, "--lr", 1e-6]
        assert run("fit", "latents/topk", *out).code == 0
        new = rarefy.load(tmp_path / f"tuned{number}/methods/latents__topk")
        assert float((old.W_dec_FD - new.W_dec_FD).detach().abs().max()) < 1e-4 and float(new.scale) == float(old.scale)
    refuses(run("fit", "latents/gated", *words[:-1], tmp_path / "no", "--resume-from", tmp_path / "run"), "holds no fitted latents/gated")
    source = tmp_path / "run/methods/latents__topk"
    refuses(run("fit", "latents/gated", *words[:-1], tmp_path / "no", "--resume-from", source), "holds a latents/topk, not a latents/gated")
    refuses(run("fit", "latents/topk", *words[:-1], tmp_path / "no", "--width", 32, "--resume-from", source), "does not fit", "--width")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(("more", "said"), [
    (["--objective", "kl"], "must be one of local, e2e, e2e+downstream"),
    (["--objective", "e2e", "--store"], "leave --store out"),
    (["--objective", "e2e", "--batch", "16"], "must be at least --context 32"),
    (["--objective", "e2e", "--downstream", "1"], "with e2e leave it out"),
    (["--objective", "e2e+downstream", "--downstream", "0"], "use --objective e2e"),
    (["--objective", "e2e+downstream", "--site", "layers.1.resid_post"], "nothing downstream to compare"),
    (["--objective", "e2e", "--batch", "4096"], "lower"),
])
def test_objectives_that_make_no_sense_are_refused(run: Run, words: list[Any], tmp_path: Path, more: list[str], said: str) -> None:
    refuses(run("fit", "latents/topk", *words, *more), said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [["--objective", "e2e"], ["--downstream", "1"], ["--resume-from", "x"]])
def test_options_of_dictionaries_are_refused_for_other_methods(run: Run, tiny: Path, corpus: Path, tmp_path: Path, more: list[str]) -> None:
    got = run("fit", "weights/wanda", tiny, "--data", corpus, "--context", 32, "--out", tmp_path / "no", *more)
    refuses(got, f"{more[0]} is for dictionaries")


def test_a_latent_is_split_over_heads_and_tokens(run: Run, words: list[Any], tmp_path: Path) -> None:
    words[2] = "layers.1.attn.z"
    assert run("fit", "latents/topk", *words).code == 0
    got = run("attribute", tmp_path / "run", "--latent", 3, "--latent", 40, "--tokens", 600, "--json").json
    assert got["site"] == "layers.1.attn.z" and len(got["heads"]) == 4 and [x["latent"] for x in got["latents"]] == [3, 40]
    assert sum(h["share"] for h in got["heads"]) == pytest.approx(1, abs=1e-4)
    places = [p for x in got["latents"] for p in x["places"]]
    assert places
    for place in places:
        assert place["pre"] == pytest.approx(place["rest"] + sum(place["by_head"]), abs=1e-3) and place["pre"] > 0
        values = [s["value"] for s in place["sources"]]
        assert values == sorted(values, reverse=True) and all(0 <= s["position"] <= place["position"] for s in place["sources"])
    shown = run("attribute", tmp_path / "run", "--tokens", 600)
    assert shown.code == 0 and "latents mostly its own" in shown.out and "back" in shown.out
    refuses(run("attribute", tmp_path / "run", "--latent", 64), "latents 0..63")


def test_attribution_of_another_site_or_method_is_refused(run: Run, tiny: Path, corpus: Path, words: list[Any], tmp_path: Path) -> None:
    assert run("fit", "latents/topk", *words).code == 0
    refuses(run("attribute", tmp_path / "run"), "not one layer's attention output")
    assert run("fit", "neurons/wina", tiny, "--data", corpus, "--context", 32, "--out", tmp_path / "other").code == 0
    refuses(run("attribute", tmp_path / "other"), "holds no dictionary")


@pytest.fixture(scope="session")
def checkpoints(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The tiny model and what it might have been two steps earlier."""
    root, out = tmp_path_factory.mktemp("track"), []
    for number, far in enumerate((0.05, 0.02)):
        model, tokenizer, _ = rarefy.open_model(str(tiny))
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(7)
            for parameter in model.parameters():
                parameter.add_(far * torch.randn_like(parameter))
        model.save_pretrained(root / f"step-{number}")
        tokenizer.save_pretrained(root / f"step-{number}")
        out.append(root / f"step-{number}")
    return [*out, tiny]


def track_words(checkpoints: list[Path], corpus: Path, out: Path) -> list[Any]:
    return ["latents/topk", *checkpoints, "--site", "layers.0.resid_post", "--data", corpus, "--width", 48, "--k", 4, "--steps", 20,
            "--later-steps", 4, "--batch", 128, "--lr", 0.002, "--context", 32, "--tokens", 2000, "--out", out]


def test_a_dictionary_is_followed_over_checkpoints(run: Run, checkpoints: list[Path], corpus: Path, tmp_path: Path) -> None:
    words = track_words(checkpoints, corpus, tmp_path / "series")
    got = run("track", *words, "--json")
    assert got.code == 0, got
    found = got.json["checkpoints"]
    assert [c["steps"] for c in found] == [20, 4, 4] and [Path(c["model"]).name for c in found] == ["step-0", "step-1", "tiny"]
    assert found[-1]["cosine_to_last"] == found[0]["cosine_to_previous"] == found[0]["identity_kept"] == 1
    assert all(len(c["latents"]["formation"]) == 48 and c["formation"] > 0 and 0 < c["fvu"] < 1.5 and c["l0"] <= 4 for c in found)
    assert min(c["cosine_to_previous"] for c in found) > 0.8 and min(c["identity_kept"] for c in found) > 0.9
    assert run("check", tmp_path / "series").code == 0
    assert run("judge", tmp_path / "series/02", "--tokens", 500).code == 0
    before = snapshot(tmp_path / "series/01/methods")
    shutil.rmtree(tmp_path / "series/01/methods")              # cut off there, and done again
    again = run("track", *words)
    assert again.code == 0 and "same latent as before" in again.out and snapshot(tmp_path / "series/01/methods") == before
    refuses(run("track", *words, "--later-steps", 5), "other settings", "later_steps: was 4, now 5")


def test_cold_dictionaries_begin_anew(run: Run, checkpoints: list[Path], corpus: Path, tmp_path: Path) -> None:
    got = run("track", *track_words(checkpoints[:2], corpus, tmp_path / "cold"), "--cold", "--json").json["checkpoints"]
    assert got[1]["identity_kept"] < 0.5 and got[1]["cosine_to_previous"] < 0.6


@pytest.mark.parametrize(("change", "said"), [
    (lambda w: [w[0], w[1], *w[4:]], "at least two checkpoints"),
    (lambda w: [w[0], w[1], w[1], *w[4:]], "named twice"),
    (lambda w: ["latents/random", *w[1:]], "not a dictionary that is trained"),
    (lambda w: [*w, "--later-steps", 0], "later_steps=0"),
    (lambda w: [*w, "--set", "colour=1"], "no argument 'colour'"),
])
def test_series_that_make_no_sense_are_refused(
    run: Run, checkpoints: list[Path], corpus: Path, tmp_path: Path, change: Callable[[list[Any]], list[Any]], said: str,
) -> None:
    refuses(run("track", *change(track_words(checkpoints, corpus, tmp_path / "no"))), said)
    assert not (tmp_path / "no").exists()
