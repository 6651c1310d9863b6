"""`rarefy judge` on where a dictionary's error lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_tools import Run


@pytest.mark.parametrize("more", [[], ["--target", "layers.1.resid_post"]])
def test_judge_says_where_the_error_lies(run: Run, fit_words: list[Any], tmp_path: Path, more: list[Any]) -> None:
    assert run("fit", "latents/topk", *fit_words, *more).code == 0
    words = ["--tokens", 600, *([] if more else ["--against", "dense,latents/random"])]
    judged = run("judge", tmp_path / "run", *words, "--json")
    assert judged.code == 0 and judged.err == ""
    names = ["latents/topk"] if more else ["latents/topk", "latents/random"]
    assert list(judged.json["errors"]) == names and json.loads((tmp_path / "run/errors.json").read_text())["dictionaries"] == judged.json["errors"]
    there = {p["method"]: p["metrics"] for p in judged.json["points"]}
    for name in names:
        error = judged.json["errors"][name]
        assert error["ce_increase"]["all"]["mean"] == there[name]["ce_increase"]["mean"]
        assert error["ce_increase"]["linear"]["mean"] == there[name]["ce_linear_error"]["mean"]
        assert error["linear"] + error["nonlinear"] == pytest.approx(1) and len(error["fvu_by_norm"]) == 10
        assert "1" in error["fvu_by_position"] and all(v is None or v > 0 for v in error["fvu_by_position"].values())
    assert [note.split(":")[0] for note in judged.json["notes"]] == ["latents/topk"] and "by position" in judged.json["notes"][0]
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["notes"] == judged.json["notes"]
