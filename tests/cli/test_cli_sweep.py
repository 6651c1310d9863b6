"""`rarefy sweep` and `rarefy apply` against masks worked out by hand and folders opened by transformers alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from cli_tools import CONTEXT, Run, build_tiny, refuses, snapshot

import rarefy
from rarefy.jobs import sweep as job
from rarefy.jobs.apply import RECORD
from rarefy.store.lock import RunLock

INNER = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
LINEAR = [f"model.layers.{n}.{path}_proj" for n in (0, 1) for path in INNER]


@pytest.fixture
def words(tiny: Path, corpus: Path, tmp_path: Path) -> list[Any]:
    """What follows the methods of a small `rarefy sweep`."""
    return [tiny, "--data", corpus, "--tokens", 500, "--calibration", 500, "--context", CONTEXT, "--out", tmp_path / "sweep"]


def points(answer: Any) -> dict[tuple[str, float], Any]:
    return {(p["method"], p["budget"]): p for p in answer.json["points"]}


@torch.no_grad()
def magnitude_ce(tiny: Path, corpus: Path, budget: float) -> float:
    """CE with the smallest weights of every row set to 0."""
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny)
    text = rarefy.text(str(corpus), tokenizer, context=CONTEXT, fit_tokens=500, judge_tokens=500)
    model, total = build_tiny(), []
    for path in LINEAR:
        weight = model.get_submodule(path).weight
        drop = weight.abs().argsort(dim=-1)[:, : weight.shape[1] - round(budget * weight.shape[1])]
        weight.scatter_(-1, drop, 0.0)
    for batch in text.judge:
        log_BTV = model(input_ids=batch.input_ids).logits.double().log_softmax(-1)
        same = batch.doc[:, 1:] == batch.doc[:, :-1]
        total.append(-log_BTV[:, :-1].gather(-1, batch.input_ids[:, 1:, None])[..., 0][same])
    return float(torch.cat(total).mean())


def test_methods_at_budgets_are_measured(run: Run, tiny: Path, corpus: Path, words: list[Any], tmp_path: Path) -> None:
    got = run("sweep", "weights/wanda,weights/magnitude,weights/random", *words, "--budget", "0.3:0.9", "--json")
    assert got.code == 0 and got.err == ""
    found = points(got)
    assert set(found) == {("dense", 1.0)} | {(f"weights/{m}", b) for m in ("wanda", "magnitude", "random") for b in (0.3, 0.45, 0.6, 0.75, 0.9)}
    for (_, budget), point in found.items():
        assert abs(point["density"] - budget) < 0.02       # rows of 32 and 48 weights keep a whole number
    for budget in (0.3, 0.75):
        assert found["weights/magnitude", budget]["metrics"]["ce"]["mean"] == pytest.approx(magnitude_ce(tiny, corpus, budget), rel=1e-4)
    report = json.loads((tmp_path / "sweep/report.json").read_text())
    assert len(report["units"]) == 1 and len(report["units"][0]["points"]) == 16
    assert run("check", tmp_path / "sweep").code == 0


def test_points_there_are_kept_when_it_goes_on(run: Run, words: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitter, made = job.Fitter.__call__, []

    def cut(self: Any, card: Any, budget: float) -> Any:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append((card.name, budget))
        return fitter(self, card, budget)

    with monkeypatch.context() as patch:
        patch.setattr(job.Fitter, "__call__", cut)
        got = run("sweep", "weights/magnitude", *words, "--budget", "0.2:0.8:0.2")
        assert got.code == 130 and "goes on" in got.line
    kept = (tmp_path / "sweep/points.jsonl").read_text()
    assert len(kept.splitlines()) == 2
    made.clear()
    monkeypatch.setattr(job.Fitter, "__call__", lambda self, card, budget: made.append((card.name, budget)) or fitter(self, card, budget))
    first = run("sweep", "weights/magnitude", *words, "--budget", "0.2:0.8:0.2", "--json")
    assert first.code == 0 and made == [("weights/magnitude", 0.6), ("weights/magnitude", 0.8)]
    assert (tmp_path / "sweep/points.jsonl").read_text().startswith(kept)
    made.clear()                                            # more methods and budgets later: only those are measured
    more = run("sweep", "weights/magnitude,weights/random", *words, "--budget", "0.4,0.5", "--json")
    assert made == [("weights/magnitude", 0.5), ("weights/random", 0.4), ("weights/random", 0.5)]
    assert {k: v for k, v in points(more).items() if k in points(first)} == points(first) and len(more.json["points"]) == 8
    shutil.rmtree(tmp_path / "sweep")
    again = run("sweep", "weights/magnitude", *words, "--budget", "0.2:0.8:0.2", "--json")
    assert again.json == first.json


def test_a_sweep_with_other_settings_or_text_is_refused(run: Run, corpus: Path, words: list[Any], tmp_path: Path) -> None:
    mine = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    words = [mine if w == corpus else w for w in words]
    assert run("sweep", "weights/magnitude", *words, "--budget", "0.5").code == 0
    before = snapshot(tmp_path / "sweep")
    refuses(run("sweep", "weights/magnitude", *words, "--budget", "0.5", "--tokens", "400"), "request.tokens: was 500, now 400")
    refuses(run("sweep", "weights/magnitude", *words, "--budget", "0.5", "--set", "group=layer"), "group", "layer")
    refuses(run("fit", "weights/wanda", words[0], "--data", mine, "--out", tmp_path / "sweep"), "command: was 'sweep', now 'fit'")
    for path in mine.glob("*.txt"):
        path.write_text(path.read_text().replace("alpha", "omega"))
    refuses(run("sweep", "weights/magnitude", *words, "--budget", "0.5"), "text: was")
    assert snapshot(tmp_path / "sweep") == before


@pytest.mark.parametrize("methods", ["neurons/wina,neurons/teal,neurons/random", "attention/quest,attention/window,attention/random"])
def test_neurons_and_attention(run: Run, words: list[Any], methods: str) -> None:
    got = run("sweep", methods, *words, "--budget", "0.5,1.0", "--json")
    assert got.code == 0
    found = points(got)
    for name in methods.split(","):
        full, half = found[name, 1.0], found[name, 0.5]
        assert full["density"] == pytest.approx(1, abs=1e-6) and full["metrics"]["ce_increase"]["mean"] == pytest.approx(0, abs=1e-5)
        assert full["metrics"]["top1"]["mean"] == 1 and half["metrics"]["kl"]["mean"] > 0.001
        if "attention" not in name:
            assert half["density"] == pytest.approx(0.5, abs=0.06)
            assert half["cost"]["flops"] < full["cost"]["flops"] <= full["cost"]["dense_flops"] * 1.1


def test_units_are_never_mixed_into_one_verdict(run: Run, words: list[Any], tmp_path: Path) -> None:
    got = run("sweep", "weights/magnitude,weights/random,neurons/wina", *words, "--budget", "0.5", "--json")
    assert got.code == 0 and "wina" not in got.json["verdict"]
    assert "weights/random" in got.json["verdict"] and "weights/magnitude" in got.json["verdict"]
    assert [u["unit"] for u in json.loads((tmp_path / "sweep/report.json").read_text())["units"]] == ["weights", "neurons"]


# --------------------------------------------------------------------------------------------------------- apply


def apply_words(tiny: Path, corpus: Path, out: Path) -> list[Any]:
    return [tiny, "--data", corpus, "--calibration", 500, "--context", CONTEXT, "--out", out]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(48).view(2, 24) * 5 % 257).logits


@torch.no_grad()
def masked(folder: Path) -> Any:
    """The dense model with the zeros of the saved one."""
    model, zeros = build_tiny(), tf.AutoModelForCausalLM.from_pretrained(folder)
    for path in LINEAR:
        model.get_submodule(path).weight[zeros.get_submodule(path).weight == 0] = 0
    return model


def kept(folder: Path, path: str) -> torch.Tensor:
    return tf.AutoModelForCausalLM.from_pretrained(folder).get_submodule(path).weight != 0


def test_what_is_applied_opens_in_transformers_and_is_the_masked_model(run: Run, tiny: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep/pruned"
    got = run("apply", "weights/wanda", *apply_words(tiny, corpus, out), "--budget", 0.5, "--json")
    assert got.code == 0 and got.err == "" and got.json["weights_kept"] == 0.5 and len(got.json["sites"]) == 14
    for path in LINEAR:
        assert (kept(out, path).sum(-1) * 2 == kept(out, path).shape[1]).all()
    model = tf.AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(model), logits(masked(out)))
    assert tf.AutoTokenizer.from_pretrained(out)("a b")["input_ids"] == tf.AutoTokenizer.from_pretrained(tiny)("a b")["input_ids"]
    assert [p.name for p in out.parent.iterdir()] == ["pruned"]
    record = json.loads((out / RECORD).read_text())
    assert record["made"]["method"] == "weights/wanda" and len(record["made"]["model"]["sha256"]) == 64
    again = run("sweep", "weights/magnitude", out, "--data", corpus, "--tokens", 300, "--calibration", 300, "--context", CONTEXT, "--budget", "1",
                "--out", tmp_path / "s")
    assert again.code == 0                                  # and in rarefy itself


def test_the_masks_are_those_of_a_run_with_the_same_settings(run: Run, tiny: Path, corpus: Path, tmp_path: Path) -> None:
    assert run("apply", "weights/wanda", *apply_words(tiny, corpus, tmp_path / "pruned"), "--budget", 0.4).code == 0
    words = [tiny, "--data", corpus, "--tokens", 500, "--context", CONTEXT, "--budget", 0.4, "--out", tmp_path / "run"]
    assert run("fit", "weights/wanda", *words).code == 0
    for n in (0, 1):
        mask = rarefy.load(tmp_path / f"run/methods/layers.{n}.down_proj").select().mask
        assert torch.equal(mask, kept(tmp_path / "pruned", f"model.layers.{n}.mlp.down_proj"))


@pytest.mark.parametrize("share", ["owl", "erk"])
def test_shares_spend_the_whole_budget_unevenly(run: Run, tiny: Path, corpus: Path, tmp_path: Path, share: str) -> None:
    out = tmp_path / "pruned"
    got = run("apply", "weights/wanda", *apply_words(tiny, corpus, out), "--budget", 0.5, "--share", share, "--json")
    assert got.code == 0 and got.json["weights_kept"] == pytest.approx(0.5, abs=0.02)
    fractions = [float(kept(out, path).double().mean()) for path in LINEAR]
    assert max(fractions) - min(fractions) > 0.02
    named = {"q": "self_attn.q", "down": "mlp.down"}
    for short, path in named.items():
        assert got.json["sites"][f"layers.1.{short}_proj"] == pytest.approx(float(kept(out, f"model.layers.1.{path}_proj").double().mean()))
    if share == "erk":                                      # (O + I) / (O I): the smaller the matrix, the denser
        assert kept(out, "model.layers.0.self_attn.k_proj").double().mean() > kept(out, "model.layers.0.mlp.up_proj").double().mean() + 0.1


def test_n_of_m(run: Run, tiny: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    assert run("apply", "weights/magnitude", *apply_words(tiny, corpus, out), "--set", "n=2", "--set", "m=4").code == 0
    for path in LINEAR:
        assert (kept(out, path).unflatten(-1, (-1, 4)).sum(-1) == 2).all()
    again = ["apply", "weights/magnitude", *apply_words(tiny, corpus, tmp_path / "b"), "--set", "n=2"]
    refuses(run(*again, "--set", "m=5"), "layers.0.q_proj", "m=5", "d_in=32")
    refuses(run(*again, "--set", "m=4", "--share", "owl"), "--share owl")
    refuses(run(*again, "--set", "m=4", "--budget", 0.3), "2:4")
    assert not (tmp_path / "b").exists()


def test_a_model_stored_in_bfloat16_stays_in_it(run: Run, tiny: Path, corpus: Path, tmp_path: Path) -> None:
    half = Path(shutil.copytree(tiny, tmp_path / "half"))
    build_tiny().to(torch.bfloat16).save_pretrained(half)
    assert run("apply", "weights/wanda", *apply_words(half, corpus, tmp_path / "pruned")).code == 0
    assert tf.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="auto").dtype == torch.bfloat16
    dense, sparse = (tf.AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).state_dict() for f in (half, tmp_path / "pruned"))
    for name, value in sparse.items():
        assert ((value == dense[name]) | (value == 0)).all()


def test_gpt2_keeps_its_transposed_layers(run: Run, tiny: Path, corpus: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "gpt2", ignore=shutil.ignore_patterns("*.safetensors")))
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 256, "eos_token_id": 256}
    model = tf.GPT2LMHeadModel(tf.GPT2Config(**sizes)).eval()
    model.save_pretrained(folder)
    assert run("apply", "weights/magnitude", *apply_words(folder, corpus, tmp_path / "pruned"), "--budget", 0.25).code == 0
    pruned = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    weight_IO = pruned.transformer.h[1].mlp.c_fc.weight
    assert ((weight_IO != 0).sum(0) == 8).all()             # a quarter of each output's inputs, which Conv1D keeps in columns
    dense_IO = model.transformer.h[1].mlp.c_fc.weight
    assert torch.equal(weight_IO[weight_IO != 0], dense_IO[weight_IO != 0])


def test_what_is_there_is_never_written_over(run: Run, tiny: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    out.mkdir()
    assert run("apply", "weights/magnitude", *apply_words(tiny, corpus, out)).code == 0           # an empty folder is taken
    before = snapshot(tmp_path)
    refuses(run("apply", "weights/magnitude", *apply_words(tiny, corpus, out)), "is there already", "another --out")
    refuses(run("apply", "weights/magnitude", *apply_words(tiny, corpus, out / "config.json")), "is there already")
    assert snapshot(tmp_path) == before


def test_what_a_crash_left_beside_is_cleared(run: Run, tiny: Path, corpus: Path, tmp_path: Path) -> None:
    part = tmp_path / ".tmp-pruned"
    (part / "deep").mkdir(parents=True)
    (part / "old.safetensors").write_text("half")
    with RunLock(part):
        refuses(run("apply", "weights/magnitude", *apply_words(tiny, corpus, tmp_path / "pruned")), "being written by process")
    assert (part / "old.safetensors").exists()
    assert run("apply", "weights/magnitude", *apply_words(tiny, corpus, tmp_path / "pruned")).code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["pruned"] and not (tmp_path / "pruned/old.safetensors").exists()
    assert not (tmp_path / "pruned/.lock").exists()


@pytest.mark.parametrize(("method", "more", "said"), [
    ("neurons/wina", [], "only weights methods"), ("latents/topk", [], "only weights methods"),
    ("weights/wanda", ["--share", "fair"], "uniform, erk, owl"), ("weights/wanda", ["--budget", "0"], "(0, 1]"),
    ("weights/wanda", ["--set", "budget=0.3"], "--budget"), ("weights/wanda", ["--set", "q=1"], "group, m, n"),
    ("weights/wanda", ["--set", "group=[1]"], "list"), ("weights/wanda", ["--site", "layers.0.resid_post"], "stream site"),
])
def test_what_cannot_be_applied(run: Run, tiny: Path, corpus: Path, tmp_path: Path, method: str, more: list[str], said: str) -> None:
    refuses(run("apply", method, *apply_words(tiny, corpus, tmp_path / "b"), *more), said)
    assert list(tmp_path.iterdir()) == []
