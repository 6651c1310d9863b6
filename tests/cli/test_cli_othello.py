"""`rarefy judge --suite othello`: the shipped model keeps a board in mind, and dictionaries are asked how much of it they hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_tools import Run

from rarefy.builtin.model import othello_model
from rarefy.tasks.othello import SIZE, games


def test_the_shipped_model_plays_by_the_rules_on_games_it_never_saw() -> None:
    held = games(60, seed=987_654)
    with torch.no_grad():
        logits = othello_model()(input_ids=held.input_ids).logits[..., : SIZE**2]
    first = held.legal.gather(-1, logits.argmax(-1, keepdim=True))[..., 0][held.live].float().mean()
    by_chance = (held.legal.sum(-1).float() / SIZE**2)[held.live].mean()
    assert first > 0.95 and by_chance < 0.25


@pytest.mark.slow
def test_layers_methods_and_what_stands_beside_them(run: Run, tmp_path: Path) -> None:
    more = ("--suite", "othello", "--seeds", 1, "--steps", 30, "--out", tmp_path / "suite", "--json")
    first, second = run("judge", "latents/topk", *more), run("judge", "latents/topk", "latents/relu", *more)
    assert first.code == second.code == 0, first.err + second.err
    lines, again = first.json["lines"], second.json["lines"]
    assert {line["layer"] for line in lines} == {0, 1, 2, 3}
    assert {line["method"] for line in lines} == {"untrained model", "neurons", "latents/random", "latents/topk"}
    assert again[: len(lines)] == lines and {line["method"] for line in again[len(lines) :]} == {"latents/relu"}
    at = {(line["layer"], line["method"]): line["seeds"][0] for line in again}
    assert at[3, "neurons"]["probe"] > at[3, "untrained model"]["probe"] + 0.05         # the model works the board out
    assert all(0 <= at[layer, "latents/topk"][m] <= 1 for layer in range(4) for m in ("coverage", "board", "auroc"))


def test_what_is_no_dictionary_of_rows_is_refused_before_any_game(run: Run, tmp_path: Path) -> None:
    answer = run("judge", "weights/wanda", "--suite", "othello", "--out", tmp_path / "x")
    assert answer.code == 2 and "weights/wanda is not a dictionary" in answer.err and not (tmp_path / "x").exists()
