"""Recall from context: what the sequences promise, and what sparse attention does to a model that lives by it."""

from __future__ import annotations

import pytest
import torch

from rarefy.attention.quest import Quest
from rarefy.attention.random import RandomBlocks
from rarefy.attention.window import WindowSinks
from rarefy.builtin.model import recall_model
from rarefy.errors import BadInput
from rarefy.site import replaced
from rarefy.tasks.recall import FILLER, KEYS, VALUES, Recall, key_value, needle, recall_accuracy, repeated
from rarefy.tasks.recall_training import train_recall_model


def answered_from_context(task: Recall) -> int:
    """Least distance from an answer back to its earlier place; fails if the token before does not determine it."""
    least = 10**9
    for ids, answer in zip(task.input_ids.tolist(), task.answer.tolist(), strict=True):
        for t in (i for i, a in enumerate(answer) if a):
            before = [i for i in range(t - 1) if ids[i] == ids[t - 1]]
            assert before and {ids[i + 1] for i in before} == {ids[t]}
            least = min(least, t - before[-1] - 1)
    return least


@pytest.mark.parametrize("pairs, gap", [(1, 0), (5, 0), (5, 17), (64, 3)])
def test_key_value(pairs: int, gap: int) -> None:
    task = key_value(KEYS, VALUES, pairs, 3, filler=FILLER, gap=gap, seed=1)
    assert task.input_ids.shape == (3, 4 * pairs + gap) and task.answer.sum(-1).tolist() == [pairs] * 3
    assert answered_from_context(task) >= task.gap
    assert torch.equal(task.input_ids, key_value(KEYS, VALUES, pairs, 3, filler=FILLER, gap=gap, seed=1).input_ids)
    assert not torch.equal(task.input_ids, key_value(KEYS, VALUES, pairs, 3, filler=FILLER, gap=gap, seed=2).input_ids)


def test_repeated() -> None:
    task = repeated(range(20), 9, 4, start=99)
    assert answered_from_context(task) == task.gap == 9
    assert torch.equal(task.input_ids[:, 1:10], task.input_ids[:, 10:]) and (task.input_ids[:, 0] == 99).all()


@pytest.mark.parametrize("length", [4, 5, 256])
@pytest.mark.parametrize("depth", [None, 0.0, 0.5, 1.0])
def test_needle(length: int, depth: float | None) -> None:
    task = needle(KEYS, VALUES, FILLER, length, 8, depth=depth, seed=3)
    assert task.input_ids.shape == (8, length) and torch.equal(task.answer.nonzero()[:, 1], torch.full((8,), length - 1))
    assert answered_from_context(task) == task.gap
    assert ((task.input_ids < 64).sum(-1) == 2).all()                  # one key, twice
    if depth is not None:
        assert (task.input_ids[:, round(depth * (length - 4))] < 64).all()


def test_what_cannot_be_made_is_refused() -> None:
    for wrong, arguments in (("length=3", {"length": 3}), ("depth=1.5", {"depth": 1.5}), ("filler", {"filler": []}), ("batch=0", {"batch": 0})):
        with pytest.raises(BadInput, match=wrong):
            needle(**{"keys": KEYS, "values": VALUES, "filler": FILLER, "length": 9, "batch": 1, **arguments})
    with pytest.raises(BadInput, match="gap=3 needs filler"):
        key_value(KEYS, VALUES, 2, 1, gap=3)
    with pytest.raises(BadInput, match="pairs=65"):
        key_value(KEYS, VALUES, 65, 1)


class Oracle(torch.nn.Module):
    """Looks its answer up in the sequence; `reach` says how far back."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.reach = reach

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
        logits = torch.zeros(*input_ids.shape, 192)
        for b, ids in enumerate(input_ids.tolist()):
            for t, token in enumerate(ids):
                for back in range(1, min(t, self.reach) + 1):
                    if ids[t - back] == token:
                        logits[b, t, ids[t - back + 1]] = 1
        return type("Out", (), {"logits": logits})


def test_accuracy_of_a_model_that_looks_it_up() -> None:
    task = needle(KEYS, VALUES, FILLER, 40, 16, depth=0.25)
    assert recall_accuracy(Oracle(40), task).mean == 1.0               # type: ignore[arg-type]
    assert recall_accuracy(Oracle(task.gap - 1), task).mean == 0.0     # type: ignore[arg-type]


def test_training_is_repeatable_and_leaves_the_random_state_alone() -> None:
    state, losses = torch.get_rng_state(), []
    first, again = (train_recall_model(0, 3, on_step=lambda step, loss: losses.append(loss)) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state()) and losses[:3] == losses[3:] and not first.training
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


def check_what_sparsity_loses(model: torch.nn.Module, batch: int) -> None:
    task = key_value(KEYS, VALUES, 32, batch, filler=FILLER, gap=128, seed=9)
    assert task.input_ids.shape[1] == 256
    assert recall_accuracy(model, task).mean >= 0.99
    assert recall_accuracy(model, needle(KEYS, VALUES, FILLER, 256, 8 * batch, seed=9)).mean >= 0.99
    kept = {}
    for cls in (Quest, WindowSinks, RandomBlocks):
        method = cls(budget=0.25, block=16)
        with replaced(model, {"layers.*.attn": method}):
            kept[cls.name] = recall_accuracy(model, task).mean
        assert abs(method.measured_density() - 0.25) < 0.06
    assert kept["attention/quest"] > kept["attention/window"] + 0.3
    assert kept["attention/quest"] > kept["attention/random"] + 0.3


def test_pages_chosen_by_the_query_keep_recall_that_a_window_loses() -> None:
    check_what_sparsity_loses(recall_model(), 16)


class Enough(Exception):
    """Ends a training."""


@pytest.mark.slow
def test_training_the_recall_model_learns_to_look_back_within_its_first_lesson() -> None:
    """Four pairs by step 250, from ln 64 nats an answer; scripts/train_recall.py goes on from there and asserts 0.99 of every task."""
    losses: list[float] = []

    def note(step: int, loss: float) -> None:
        losses.append(loss)
        if step == 250:
            raise Enough

    with pytest.raises(Enough):
        train_recall_model(on_step=note)
    assert sum(losses[:20]) / 20 > 3.5 and sum(losses[-40:]) / 40 < 0.5
