"""Tasks of sparse attention against oracles that look everything up in plain loops, and models that are known to solve them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rarefy.attention.quest import Quest
from rarefy.builtin.model import builtin_folder, recall_model
from rarefy.errors import BadInput
from rarefy.site import replaced
from rarefy.tasks.averaging import averaging, averaging_score
from rarefy.tasks.distance import by_distance, reach
from rarefy.tasks.needles import needles, places
from rarefy.tasks.recall import FILLER, KEYS, VALUES, Recall, accuracy_by_gap, distances, hits, mqar, needle, recall_accuracy, repeated
from rarefy.tasks.retrieval_heads import masking, retrieval_scores, without_heads
from rarefy.tasks.turns import accuracy_by_turn, turns
from rarefy.tasks.variables import variables

ROOM = KEYS, VALUES, FILLER


def looked_up(task: Recall) -> list[list[tuple[int, int]]]:
    """Of each sequence: (place of an answer, distance to the last earlier place of question and answer together), by a plain search."""
    out = []
    for ids, answer in zip(task.input_ids.tolist(), task.answer.tolist(), strict=True):
        row = []
        for t in (i for i, a in enumerate(answer) if a):
            before = [s for s in range(1, t) if ids[s - 1] == ids[t - 1] and ids[s] == ids[t]]
            row.append((t, t - before[-1] if before else 0))
        out.append(row)
    return out


# ------------------------------------------------------------------------------------------------------------ MQAR


@pytest.mark.parametrize(("length", "pairs"), [(4, 1), (64, 16), (65, 8), (200, 20)])
def test_mqar_asks_for_every_pair_once(length: int, pairs: int) -> None:
    task = mqar(*ROOM, length, pairs, 4, seed=1)
    assert task.input_ids.shape == (4, length) and task.answer.sum(1).tolist() == [pairs] * 4
    least = 10**9
    for ids, row in zip(task.input_ids.tolist(), looked_up(task), strict=True):
        table = dict(zip(ids[: 2 * pairs : 2], ids[1 : 2 * pairs : 2], strict=True))
        assert len(table) == pairs and {ids[t - 1]: ids[t] for t, _ in row} == table
        asked = {t for t, _ in row} | {t - 1 for t, _ in row}
        assert all(ids[t] in FILLER for t in range(2 * pairs, length) if t not in asked)
        least = min(least, min(d for _, d in row))
    assert least == task.gap
    assert torch.equal(task.input_ids, mqar(*ROOM, length, pairs, 4, seed=1).input_ids)


def test_gaps_of_mqar_follow_the_power_law() -> None:
    """One pair: its place is one draw from i ** (power - 1), whose expected counts are known."""
    count, spots = 4000, 8
    for power in (0.01, 1.0):
        at = mqar(*ROOM, 2 + 2 * spots, 1, count, power=power, seed=3).answer.float().argmax(1)
        law = torch.arange(1, spots + 1).double() ** (power - 1)
        expected = count * law / law.sum()
        found = torch.bincount((at - 3) // 2, minlength=spots).double()
        assert float(((found - expected) ** 2 / expected).sum()) < 24.3            # chi-square, 7 degrees of freedom, p = 0.001


def test_distances_and_the_gap_law() -> None:
    task = mqar(*ROOM, 80, 10, 6, power=1.0, seed=2)
    away = distances(task)
    for b, row in enumerate(looked_up(task)):
        assert [(t, int(away[b, t])) for t, _ in row] == row
    assert int((away > 0).sum()) == int(task.answer.sum())
    thrice = Recall(torch.tensor([[1, 2, 1, 2, 5, 1, 2, 1, 3]]), torch.tensor([[False] * 6 + [True, False, True]]), 0)
    assert distances(thrice).tolist() == [[0] * 6 + [3, 0, 0]]                       # the last of two places; 0 where it never stood before
    near = task.answer & (away < 40)                                               # a model that sees 39 tokens back
    law = accuracy_by_gap(near, task, [1, 40, 100])
    assert law["1-39"].mean == 1 and law["40-99"].mean == 0
    with pytest.raises(BadInput, match="rising"):
        accuracy_by_gap(near, task, [4, 4])


def test_what_mqar_cannot_make_is_refused() -> None:
    for more, named in (({"length": 39}, "length=39"), ({"power": 0.0}, "power=0"), ({"pairs": 65}, "pairs=65"), ({"filler": []}, "filler")):
        with pytest.raises(BadInput, match=named):
            mqar(**{"keys": KEYS, "values": VALUES, "filler": FILLER, "length": 40, "pairs": 10, "batch": 1, **more})


# --------------------------------------------------------------------------------------------------- needles, variables


@pytest.mark.parametrize(("length", "count", "asked"), [(6, 2, 1), (40, 9, 9), (128, 16, 4)])
def test_needles_are_all_there_and_some_are_asked_for(length: int, count: int, asked: int) -> None:
    task = needles(*ROOM, length, count, 5, asked=asked, seed=4)
    assert task.input_ids.shape == (5, length)
    least = 10**9
    for ids, row in zip(task.input_ids.tolist(), looked_up(task), strict=True):
        body = ids[: length - 2 * asked]
        assert sum(i in KEYS for i in body) == sum(i in VALUES for i in body) == count
        assert [t for t, _ in row] == list(range(length - 2 * asked + 1, length, 2)) and len({ids[t - 1] for t, _ in row}) == asked
        assert all(d > 0 for _, d in row)
        least = min(least, min(d for _, d in row))
    assert least == task.gap


def test_pieces_do_not_overlap_and_every_way_is_as_likely() -> None:
    generator = torch.Generator().manual_seed(0)
    at = places(6000, 5, 2, 2, generator)
    ways, counts = torch.unique(at, dim=0, return_counts=True)
    assert ways.tolist() == [[0, 2], [0, 3], [1, 3]] and float(((counts - 2000.0) ** 2 / 2000).sum()) < 13.8
    assert places(3, 9, 3, 3, generator).tolist() == [[0, 3, 6]] * 3
    with pytest.raises(BadInput, match="do not fit"):
        places(1, 8, 3, 3, generator)


@pytest.mark.parametrize(("length", "chains", "hops"), [(64, 4, 4), (20, 1, 3), (40, 5, 1)])
def test_variables_are_traced_to_their_value(length: int, chains: int, hops: int) -> None:
    """A chain is followed as an interpreter would: the statements of the body, in order, then from the last name to the value."""
    task = variables(*ROOM, length, 6, chains=chains, hops=hops, seed=5)
    for ids, answer in zip(task.input_ids.tolist(), task.answer.tolist(), strict=True):
        body, means, at = ids[: length - hops - 1], {}, 0
        while at < len(body):
            if body[at] in FILLER:
                at += 1
                continue
            name, stands = body[at], body[at + 1]
            assert name not in means and (stands in VALUES or stands in means), "defined once, and after what it names"
            assert at + 2 == len(body) or body[at + 2] in FILLER
            means[name] = stands
            at += 2
        assert len(means) == chains * hops
        trace, name = [], ids[length - hops - 1]
        while name in means:
            name = means[name]
            trace.append(name)
        assert ids[length - hops :] == trace and len(trace) == hops and trace[-1] in VALUES
        assert [t for t, a in enumerate(answer) if a] == list(range(length - hops, length))
    assert int(distances(task)[task.answer].min()) == task.gap


@pytest.mark.parametrize("announced", [False, True])
def test_turns_ask_one_context_again_and_again(announced: bool) -> None:
    task = turns(*ROOM, 120, 12, 4, questions=5, between=3, announced=announced, seed=6)
    assert task.count == 5 and task.context + task.count * task.turn == 120
    assert (distances(task.recall)[task.recall.answer] > 0).all() and int(distances(task.recall)[task.recall.answer].min()) == task.recall.gap
    for ids in task.recall.input_ids.tolist():
        asked = [ids[task.context + k * task.turn + 3] for k in range(5)]
        assert len(set(asked)) == 5 and all(key in ids[: task.context] for key in asked)
        assert (ids[task.context - 1] == asked[0]) == announced and ids[: task.context].count(asked[0]) == 1 + announced
        assert all(i in FILLER for k in range(5) for i in ids[task.context + k * task.turn :][:3])
    right = task.recall.answer.clone()
    right[:, task.context + task.turn :] = False                                   # only the first turn is answered
    assert [one.mean for one in accuracy_by_turn(right, task)] == [1, 0, 0, 0, 0]


# ----------------------------------------------------------------------------------------------------------- averaging


def test_closed_form_attention_averages_exactly_the_named() -> None:
    task = averaging(200, 8, 3, questions=5, seed=7)
    z = task.v_BGSD[:, 0, :200]
    for b in range(3):
        for m in range(5):
            named = task.named_BMQ[b, m].tolist()
            assert len(set(named)) == 8
            torch.testing.assert_close(task.answer_BMZ[b, m], sum(z[b, i] for i in named) / 8)
    naive = torch.softmax(task.q_BHTD @ task.k_BGSD.mT, -1)
    for b in range(3):
        for m in range(5):                                                         # 1 / q on each named position, nothing elsewhere
            there = torch.zeros(205).index_fill_(0, task.named_BMQ[b, m], 1 / 8)
            torch.testing.assert_close(naive[b, 0, m], there, atol=1e-4, rtol=0)
    out = scaled_dot_product_attention(task.q_BHTD, task.k_BGSD, task.v_BGSD, scale=1.0)
    assert averaging_score(out, task).mean > 0.999
    assert averaging_score(torch.zeros_like(out), task).mean == 0
    half = out.clone()
    half[:, :, ::2] = 0
    assert averaging_score(half, task).mean == pytest.approx(2 / 5, abs=1e-3)


def test_a_selector_that_cannot_hold_all_named_keys_loses_the_average() -> None:
    """Quest at 16 keys a page: 8 named keys lie in about 8 pages, so 3 of 13 pages cannot hold them and all of them do."""
    task = averaging(192, 8, 2, questions=8, seed=8)
    scores = []
    for budget in (0.2, 1.0):
        method = Quest(budget=budget, block=16)
        scores.append(averaging_score(method.attend(task.q_BHTD, task.k_BGSD, task.v_BGSD, scale=1.0), task).mean)
    assert scores[0] < 0.6 and scores[1] > 0.999


def test_what_averaging_cannot_make_is_refused() -> None:
    for arguments, named in (((4, 5, 1), "named=5"), ((40, 30, 1), "width=16"), ((0, 1, 1), "sources=0")):
        with pytest.raises(BadInput, match=named):
            averaging(*arguments, width=16)


# ----------------------------------------------------------------------------------------------------------- distance


def test_reach_finds_the_last_earlier_pair_of_the_same_document() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, (3, 60), generator=generator)
    doc = (torch.arange(60) // 25).expand(3, 60)
    got = reach(ids, doc)
    for b in range(3):
        for t in range(60):
            start = 25 * (t // 25)
            before = [s for s in range(start + 1, t) if t > start and ids[b, s - 1] == ids[b, t - 1] and ids[b, s] == ids[b, t]]
            assert got[b, t] == (t - before[-1] if before else 0)


def test_means_by_distance_are_over_tokens_of_that_distance() -> None:
    ids = torch.tensor([[1, 2, 3, 1, 2, 3, 9, 2, 3, 1]])
    doc = torch.zeros_like(ids)
    value = torch.arange(10.0)[None]
    away = reach(ids, doc)
    assert away.tolist() == [[0, 0, 0, 0, 3, 3, 0, 0, 3, 6]]
    got = by_distance(value, away, doc, edges=(1, 4, 8))
    assert {name: one.mean for name, one in got.items()} == {"new": (1 + 2 + 3 + 6 + 7) / 5, "1-3": (4 + 5 + 8) / 3, "4-7": 9.0}
    two = by_distance(torch.ones(1, 10), away, torch.tensor([[0] * 5 + [1] * 5]), edges=(1,))
    assert two["new"].mean == two["1+"].mean == 1
    with pytest.raises(BadInput, match="rising"):
        by_distance(value, away, doc, edges=(4, 2))


# ------------------------------------------------------------------------------------------------------------ models


def test_the_recall_model_solves_every_task_at_its_context() -> None:
    model = recall_model()
    tasks = {
        "mqar": mqar(*ROOM, 512, 64, 8, seed=11), "needle": needle(*ROOM, 512, 32, seed=11), "needles": needles(*ROOM, 512, 16, 8, asked=8, seed=11),
        "variables": variables(*ROOM, 512, 48, seed=11), "turns": turns(*ROOM, 512, 16, 8, announced=True, seed=11).recall,
    }
    scores = {name: recall_accuracy(model, task).mean for name, task in tasks.items()}
    assert min(scores.values()) >= 0.99, scores


def test_masking_a_head_zeroes_what_it_gives_and_nothing_else() -> None:
    """The naive way: its columns of the output projection set to zero."""
    model = recall_model()
    task = needles(*ROOM, 64, 8, 4, seed=12)
    with without_heads(model, [(1, 2), (0, 3)]), torch.no_grad():
        got = model(input_ids=task.input_ids, use_cache=False).logits
    width = model.config.head_dim
    for layer, head in ((1, 2), (0, 3)):
        model.model.layers[layer].self_attn.o_proj.weight.data[:, head * width : (head + 1) * width] = 0
    with torch.no_grad():
        torch.testing.assert_close(got, model(input_ids=task.input_ids, use_cache=False).logits, atol=1e-5, rtol=1e-5)
    for heads in ([(2, 0)], [(0, 4)], [(0, -1)]):
        with pytest.raises(BadInput, match="no heads"), without_heads(model, heads):
            pass


def test_retrieval_scores_are_shares_of_answers_looked_up_by_each_head() -> None:
    """Against transformers' own attention maps (eager), in a loop over answers."""
    model = recall_model()
    tasks = [needles(*ROOM, 96, 8, 4, asked=4, seed=13), needle(*ROOM, 64, 4, depth=0.0, seed=13)]
    got = retrieval_scores(model, tasks)
    want = torch.zeros(2, 4, dtype=torch.float64)
    model.set_attn_implementation("eager")
    for task in tasks:
        with torch.no_grad():
            out = model(input_ids=task.input_ids, use_cache=False, output_attentions=True)
        rows = looked_up(task)
        for b, row in enumerate(rows):
            for t, away in row:
                if int(out.logits[b, t - 1].argmax()) == int(task.input_ids[b, t]):
                    for layer in range(2):
                        for head in range(4):
                            hit = int(out.attentions[layer][b, head, t - 1].argmax()) == t - away
                            want[layer, head] += hit / sum(map(len, rows)) / 2
    torch.testing.assert_close(got, want)
    assert got[1].max() > 0.9 and got[0].min() < 0.1


@pytest.mark.slow
def test_masking_retrieval_heads_breaks_recall_and_masking_others_does_not() -> None:
    """The built-in code model copies repeated random tokens by a few of its 24 heads."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(builtin_folder(), dtype=torch.float32).eval()
    pool = range(256, 3840)
    found = masking(model, [repeated(pool, period, 8, seed=period) for period in (32, 64, 128)], repeated(pool, 64, 24, seed=99), draws=3)
    assert 3 <= len(found.heads) <= 8
    assert found.dense.mean > 0.3 and found.without.mean < 0.05
    assert min(one.mean for one in found.others) > 0.8 * found.dense.mean


def test_a_threshold_that_leaves_nothing_to_compare_is_refused() -> None:
    with pytest.raises(BadInput, match="no comparison"):
        masking(recall_model(), [needle(*ROOM, 64, 4, seed=1)], needle(*ROOM, 64, 4, seed=2), at_least=1.1)


def test_hits_see_a_method_that_is_in_place() -> None:
    model, task = recall_model(), needles(*ROOM, 256, 16, 4, asked=8, seed=14)
    assert hits(model, task).sum() == task.answer.sum()
    with replaced(model, {"layers.*.attn": Quest(budget=0.06)}):
        assert hits(model, task).sum() < task.answer.sum()
    assert math.isclose(recall_accuracy(model, task).mean, 1.0)
