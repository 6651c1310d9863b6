"""The recall model of 8,192 tokens, what it is made from, and the suite at several lengths."""

from __future__ import annotations

import math

import pytest
import torch

from rarefy.builtin.model import recall_model
from rarefy.errors import BadInput
from rarefy.fidelity import Interval
from rarefy.frontier import Point
from rarefy.jobs.attention_suite import AttentionRequest, Cell, _cells, _too_long
from rarefy.jobs.attention_suite_findings import by_length, winners, with_length
from rarefy.jobs.attention_suite_page import tables
from rarefy.jobs.attention_suite_run import judged
from rarefy.jobs.attention_suite_tasks import check_tasks, recall_sitting
from rarefy.tasks.needles import needles
from rarefy.tasks.recall import FILLER, KEYS, VALUES, asked_again, distances, hits, mqar
from rarefy.tasks.recall_long import stretched, train_long_recall_model


def right(model: torch.nn.Module, length: int, batch: int) -> float:
    task = needles(KEYS, VALUES, FILLER, length, 16, batch, asked=8, seed=31)
    return float(hits(model, task, at_once=2)[task.answer].float().mean())


def test_which_model_answers_at_which_length() -> None:
    short, long = recall_model(), recall_model(8192)
    assert all(torch.equal(a, b) for a, b in zip(recall_model(512).state_dict().values(), short.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(recall_model(513).state_dict().values(), long.state_dict().values(), strict=True))
    assert right(short, 2048, 2) < 0.7                       # why there are two
    assert right(long, 512, 4) == right(long, 2048, 2) == 1.0
    for length in (0, 8193):
        with pytest.raises(BadInput, match=f"length={length}"):
            recall_model(length)


@pytest.mark.slow
def test_the_long_model_recalls_in_8192_tokens() -> None:
    model = recall_model(8192)
    assert right(model, 8192, 3) >= 0.99
    task = mqar(KEYS, VALUES, FILLER, 8192, 64, 2, power=1.0, seed=31)
    assert float(hits(model, task, at_once=1)[task.answer].float().mean()) >= 0.99


def test_slow_rotations_are_slowed_and_fast_ones_stay() -> None:
    short = recall_model()
    long = stretched(short, 8192)
    was, now = short.model.rotary_emb.inv_freq, long.model.rotary_emb.inv_freq
    length = 2 * math.pi / was
    torch.testing.assert_close(now[length < 128], was[length < 128])
    torch.testing.assert_close(now[length > 512], was[length > 512] / 16)
    between = (length >= 128) & (length <= 512)
    assert between.any() and (now[between] < was[between]).all() and (now[between] > was[between] / 16).all()
    assert short.config.rope_parameters["rope_type"] == "default" and long.config.max_position_embeddings == 16384 and not long.training
    assert right(short, 2048, 2) + 0.3 < right(long, 2048, 2)               # at once, without a step
    with pytest.raises(BadInput, match="longest=100"):
        stretched(short, 100)


def test_schooling_is_repeatable_and_leaves_its_model_alone() -> None:
    short, state, losses = recall_model(), torch.get_rng_state(), []
    first, again = (train_long_recall_model(short, 0, (1, 1), 512, on_step=lambda step, loss: losses.append(loss)) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state()) and losses[:2] == losses[2:] and not first.training
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(short.state_dict().values(), recall_model().state_dict().values(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(short.state_dict().values(), first.state_dict().values(), strict=True))


def test_questions_asked_again_have_the_answers_they_had() -> None:
    task = mqar(KEYS, VALUES, FILLER, 300, 20, 5, seed=2)
    more = asked_again(task, 6, seed=3)
    assert torch.equal(more.input_ids[:, :300], task.input_ids) and torch.equal(more.answer[:, :300], task.answer)
    assert more.answer[:, 300:].tolist() == [[False, True] * 6] * 5
    for ids in more.input_ids.tolist():
        table, asked = dict(zip(ids[0:40:2], ids[1:40:2], strict=True)), list(zip(ids[300::2], ids[301::2], strict=True))
        assert len({key for key, _ in asked}) == 6 and all(table[key] == value for key, value in asked)
    assert more.gap == int(distances(more)[more.answer].min()) and not torch.equal(more.input_ids, asked_again(task, 6, seed=4).input_ids)
    with pytest.raises(BadInput, match="count=21"):
        asked_again(task, 21)


@pytest.mark.parametrize(("length", "decoded"), [(512, 0), (2048, 8)])
def test_mqar_has_questions_in_the_part_that_is_decoded(length: int, decoded: int) -> None:
    sitting = recall_sitting("mqar", length, 3, None)
    assert sitting.ids_BT.shape == (3, length) and sitting.start == length - 64 and sitting.at_once == 4096 // length
    assert int(judged(sitting, "decode").sum(-1).min()) >= decoded
    assert all(name.startswith("gap ") for name in sitting.by)
    assert torch.equal(sum((group.long() for group in sitting.by.values()), torch.zeros(3, length).long()), sitting.answer_BT.long())


def test_tasks_of_the_model_under_test_are_left_out_where_it_is_too_short(tmp_path) -> None:
    request = AttentionRequest(["attention/quest"], "m", [0.1], tmp_path, ["needle", "text"], ["decode"], [512, 2048, 8192])
    assert _too_long(request, 2048, "m") == {"text at 8192": "m was built for 2048 tokens"} and _too_long(request, 8192, "m") == {}
    with pytest.raises(BadInput, match="length=512 is more than the 256 tokens that m was built for; leave it or text out"):
        _too_long(request, 256, "m")
    assert len(list(_cells(request, request.check()))) == 6
    check_tasks(["text"], [9000])
    with pytest.raises(BadInput, match="length=9000 is more than the 8192 tokens of the recall models; leave it or needle out"):
        check_tasks(["text", "needle"], [9000])


def line(loss: float, density: float, role: str = "method") -> Point:
    metrics = {"loss": Interval(loss, loss, loss), "score": Interval(1 - loss, 0, 1), "dense_score": Interval(1, 1, 1)}
    return Point("", "key", role, density, density, metrics)


MADE = {
    Cell("a/x", b, "decode", task, n): line(loss, b)
    for task, n, b, loss in (
        ("one", 512, 0.1, 0.4), ("one", 512, 0.3, 0.01), ("one", 8192, 0.1, 0.0), ("one", 8192, 0.3, 0.0),
        ("two", 512, 0.1, 0.0), ("two", 512, 0.3, 0.0), ("two", 8192, 0.1, 0.5), ("two", 8192, 0.3, 0.02), ("three", 512, 0.1, 0.9),
    )
}


def test_least_density_by_length() -> None:
    head, rows = by_length(MADE)
    assert head[3:] == ["512 tokens", "8192 tokens"]
    assert rows == [["a/x", "decode", "one", "0.30", "0.10"], ["a/x", "decode", "two", "0.10", "0.30"]]
    said = with_length(MADE)
    assert "falls in 1 case, rises in 1 and stays in 0 (a/x in decode of one: 0.30 at 512 tokens, 0.10 at 8192;" in said
    assert with_length({c: p for c, p in MADE.items() if c.length == 512}) == ""
    level = {c: p for c, p in MADE.items() if c.task == "two"} | {Cell("a/x", 0.1, "decode", "two", 8192): line(0.0, 0.1)}
    assert "falls in 0 cases, rises in 0 and stays in 1." in with_length(level)


def test_a_pattern_stands_among_the_budgets_that_it_fits() -> None:
    made = MADE | {Cell("patterns/p", 1.0, "decode", "two", 8192): line(0.2, 0.105)}
    best = {(row[0], row[2], row[3]): row[4] for row in winners(made)}
    assert best["two", "8192", "0.1"] == "patterns/p" and best["two", "8192", "0.3"] == "a/x" and best["two", "512", "0.1"] == "a/x"
    assert ("two", "8192", "1") not in best                                    # everything kept is dense: no budget to win at
    shown = tables(MADE)
    assert [t["title"] for t in shown][2:] == ["Which method wins at which length", "Does a longer context tolerate more sparsity?"]
    assert shown[2]["head"] == ["task", "phase", "budget", "512 tokens", "8192 tokens"]
    assert ["two", "decode", "0.1", "a/x 1.00", "a/x 0.50"] in shown[2]["rows"] and ["three", "decode", "0.1", "a/x 0.10", "–"] in shown[2]["rows"]


def test_what_is_read_before_decoding_is_read_once_and_copied() -> None:
    """Two candidates in turn say what they say alone: the cache kept is not the one that a decoding goes on with."""
    from rarefy.attention.window import WindowSinks
    from rarefy.jobs.attention_suite_run import DENSE, Candidate, log_probs

    def sitting():
        return recall_sitting("needles", 128, 3, recall_model())

    shared, window = sitting(), Candidate({"layers.*.attn": WindowSinks(budget=0.3, block=16).eval()})
    said = [log_probs(shared, "decode", one)[0] for one in (DENSE, window, DENSE, window)]
    assert list(shared.prefixes) == [0] and shared.prefixes[0].get_seq_length() == shared.start
    assert torch.equal(said[0], said[2]) and torch.equal(said[1], said[3]) and not torch.equal(said[0], said[1])
    for one, first in zip((DENSE, window), said, strict=False):
        assert torch.equal(log_probs(sitting(), "decode", one)[0], first)
