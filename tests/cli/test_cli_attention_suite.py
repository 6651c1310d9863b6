"""`rarefy sweep --suite attention`: its lines, a killed run taken up, refusals, the page."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from cli_tools import Run, build_tiny, refuses, save_byte_tokenizer

from rarefy.jobs import attention_suite
from rarefy.store.lines import read_lines
from rarefy.ui import read_report


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, built for 128 tokens: the recall tasks need 96."""
    folder, model = tmp_path_factory.mktemp("models") / "longer", build_tiny()
    model.config.max_position_embeddings = 128
    model.save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture
def words(tiny: Path, corpus: Path) -> list[Any]:
    return [
        "sweep", "attention/quest,attention/window", tiny, "--suite", "attention", "--data", corpus, "--tokens", 400, "--lengths", "96",
        "--sequences", 2, "--budget", "0.3,1.0", "--tasks", "mqar,averaging,text",
    ]


def keys(out: Path) -> list[tuple[Any, ...]]:
    return [tuple(r[k] for k in ("task", "length", "method", "budget", "phase")) for r in read_lines(out / "points.jsonl")]


def test_every_cell_has_a_line_and_everything_kept_is_dense(run: Run, words: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    got = run(*words, "--out", out, "--json")
    assert got.code == 0, got.err
    points = got.json["points"]
    methods = ("attention/quest", "attention/window")
    assert keys(out) == [(t, 96, m, b, p) for t in ("mqar", "averaging", "text") for m in methods for b in (0.3, 1.0) for p in ("prefill", "decode")]
    for point in points:
        metrics, cost = point["metrics"], point["cost"]
        assert metrics["dense_score"]["mean"] > 0.99
        if point["budget"] == 1:
            assert abs(metrics["loss"]["mean"]) < 1e-3 and point["density"] == 1 and abs(metrics.get("kl", {"mean": 0})["mean"]) < 1e-5
        else:
            assert 0.2 < point["density"] < 0.5 and cost["flops"] < cost["dense_flops"]
        assert cost["ms"] > 0
    losses = {(p["task"], p["phase"]): p["metrics"]["loss"]["mean"] for p in points if p["method"] == "attention/window" and p["budget"] == 0.3}
    assert losses["mqar", "prefill"] > 0.2 and losses["averaging", "decode"] > 0.2        # a window finds neither
    report: Any = read_report(out)
    assert [t["title"] for t in report["tables"]][0] == "How sparse is still good" and len(report["units"]) == 6
    kept = report["grids"][0]                                                             # layers x heads of the model under test
    assert len(kept["values"]) == len(kept["rows"]) == 2 and all(0 < v <= 1 for row in kept["values"] for v in row)
    shown = run(*words, "--out", out)                                                     # nothing is measured again, and people can read it
    assert shown.code == 0 and "attention/window" in shown.out and "rarefy show" in shown.out and len(keys(out)) == 24


def test_a_killed_run_goes_on_with_what_is_missing(run: Run, words: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, measured = tmp_path / "run", []
    whole = attention_suite._measure

    def cut(one: Any, cell: Any, *rest: Any) -> Any:
        measured.append(cell)
        if len(measured) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(one, cell, *rest)

    monkeypatch.setattr(attention_suite, "_measure", cut)
    assert run(*words, "--phases", "prefill", "--tasks", "mqar,averaging", "--out", out).code == 143
    before = (out / "points.jsonl").read_bytes()
    assert len(keys(out)) == 3
    assert run(*words, "--phases", "prefill", "--tasks", "mqar,averaging", "--out", out).code == 0
    assert (out / "points.jsonl").read_bytes().startswith(before) and len(measured) == 4 + 5
    assert len(set(keys(out))) == len(keys(out)) == 8
    assert run(*words, "--phases", "prefill", "--tasks", "mqar,averaging", "--budget", "0.3,0.6,1.0", "--out", out).code == 0     # more budgets
    assert len(keys(out)) == 12
    refuses(run(*words, "--sequences", 3, "--out", out), "begun with other settings")


def test_cache_policies_are_judged_in_decoding_alone(run: Run, words: list[Any], tmp_path: Path) -> None:
    words[1] = "cache/window"
    got = run(*words, "--tasks", "needles,averaging", "--out", tmp_path / "run", "--json")
    assert got.code == 0, got.err
    points = got.json["points"]
    assert [(p["task"], p["phase"], p["budget"]) for p in points] == [("needles", "decode", 0.3), ("needles", "decode", 1.0)]
    few, all_ = points
    assert few["metrics"]["loss"]["mean"] > 0.2 and abs(all_["metrics"]["loss"]["mean"]) < 1e-6
    assert 0.2 < few["density"] < 0.45 and few["cost"]["bytes"] < all_["cost"]["bytes"]


def test_an_expression_is_a_method_and_shorter_lengths_may_be_added(run: Run, words: list[Any], tmp_path: Path) -> None:
    words[1] = "window(8) | sinks(2), heads(window(4), window(16)), cache/window"
    got = run(*words, "--lengths", 112, "--tasks", "needle", "--budget", "0.3", "--out", tmp_path / "run", "--json")
    assert got.code == 0, got.err
    points, left_out = got.json["points"], got.json["left_out"]
    both = [(m, phase) for m in ("window(8) | sinks(2)", "heads(window(4), window(16))") for phase in ("prefill", "decode")]
    assert [(p["method"], p["phase"]) for p in points] == [*both, ("cache/window", "decode")]
    pairs = sum(min(t + 1, 8) + min(max(0, t - 7), 2) for t in range(112)) / (112 * 113 / 2)
    assert points[0]["density"] == pytest.approx(pairs, rel=1e-6)
    assert list(left_out) == ["cache/window, prefill"]                                    # said, not skipped in silence
    assert run(*words, "--lengths", "96,112", "--tasks", "needle", "--budget", "0.3", "--out", tmp_path / "run").code == 0
    assert len(keys(tmp_path / "run")) == 10


def test_show_says_how_a_pattern_is_drawn(run: Run) -> None:
    refuses(run("show", "window(8) | sinks(2)"), "rarefy draw 'window(8) | sinks(2)'")


def test_a_policy_that_has_no_place_in_a_run_is_refused_before_it(run: Run, words: list[Any], tmp_path: Path) -> None:
    words[1] = "cache/window"
    for more in (["--phases", "prefill"], ["--tasks", "averaging"]):
        refuses(run(*words, *more, "--out", tmp_path / "run"), "cache/window is a cache's policy, at work in a model's decoding alone")


@pytest.mark.parametrize(("more", "named"), [
    (["--suite", "latents"], "no suite 'latents'"), (["--tasks", "nothing"], "no task 'nothing'"), (["--phases", "training"], "no phase 'training'"),
    (["--lengths", "50"], "length=50"), (["--lengths", "a"], "--lengths 'a'"), (["--sequences", "0"], "sequences=0"),
    (["--set", "nothing=1"], "nothing"), (["--lengths", "4096"], "length=4096"), (["--sequences", "1"], "no interval"),
    (["--phases", ""], "no phase"),
    (["--lengths", "96,96"], "96 is named twice"), (["--tasks", "mqar,mqar"], "mqar is named twice"),
    (["--phases", "decode,decode"], "decode is named twice"),
])
def test_requests_that_cannot_be_served_leave_nothing(run: Run, words: list[Any], tmp_path: Path, more: list[str], named: str) -> None:
    refuses(run(*words, *more, "--out", tmp_path / "run"), named)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("method", "named"), [
    ("latents/topk", "latents/topk is a method of unit 'latent'"), ("window(8) | sinkz(2)", "did you mean sinks"),
    ("attention/nothing", "unknown method"), ("attention/quest,attention/quest", "twice"),
])
def test_what_chooses_no_keys_is_refused(run: Run, words: list[Any], tmp_path: Path, method: str, named: str) -> None:
    words[1] = method
    refuses(run(*words, "--out", tmp_path / "run"), named)
