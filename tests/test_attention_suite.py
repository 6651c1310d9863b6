"""The attention suite's parts: what is judged in which phase, what is said of lines, what is drawn."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from rarefy.attention.quest import Quest
from rarefy.attention.window import WindowSinks
from rarefy.builtin.corpus import Batch
from rarefy.builtin.model import recall_model
from rarefy.catalogue import card
from rarefy.cli_attention import split
from rarefy.errors import BadInput
from rarefy.fidelity import Interval
from rarefy.frontier import Point
from rarefy.jobs import attention_suite_methods
from rarefy.jobs.attention_suite import Cell
from rarefy.jobs.attention_suite_findings import is_kept, kept_lines, kept_table, least_kept, statements, telling, untelling, winners, worst
from rarefy.jobs.attention_suite_methods import CALIBRATION, Candidates
from rarefy.jobs.attention_suite_page import tables
from rarefy.jobs.attention_suite_picture import kept_by_heads, shrunk
from rarefy.jobs.attention_suite_run import DENSE, Candidate, Reference, judged, log_probs, sit
from rarefy.jobs.attention_suite_tasks import RECALL, check_tasks, recall_sitting, text_sitting
from rarefy.ui.schema import validate


def point(loss: float, density: float, half: float = 0.0, role: str = "method") -> Point:
    metrics = {"loss": Interval(loss, loss - half, loss + half), "score": Interval(1 - loss, 0, 1), "dense_score": Interval(1, 1, 1)}
    return Point("", "key", role, density, density, metrics)


def lines(table: dict[tuple[str, float, str], float]) -> dict[Cell, Point]:
    """(method, budget, task) -> loss, in decoding at 512."""
    return {Cell(m, b, "decode", t, 512): point(loss, b) for (m, b, t), loss in table.items()}


MADE = lines({
    ("a/x", 0.1, "one"): 0.5, ("a/x", 0.3, "one"): 0.01, ("a/x", 0.5, "one"): 0.0, ("a/x", 0.1, "two"): 0.0, ("a/x", 0.3, "two"): 0.2,
    ("a/x", 0.5, "two"): 0.02, ("a/y", 0.1, "one"): 0.0, ("a/y", 0.3, "one"): 0.9, ("a/y", 0.5, "one"): 0.0, ("a/y", 0.1, "two"): 0.6,
    ("a/y", 0.3, "two"): 0.3, ("a/y", 0.5, "two"): 0.3,
})


def test_a_task_is_kept_from_the_density_on_above_which_nothing_is_lost() -> None:
    assert least_kept(MADE, "a/x", "decode", "one", 512) == 0.3 and least_kept(MADE, "a/x", "decode", "two", 512) == 0.5
    assert least_kept(MADE, "a/y", "decode", "one", 512) == 0.5                # 0.1 does not count: 0.3 loses
    assert least_kept(MADE, "a/y", "decode", "two", 512) is None
    assert kept_table(MADE) == (["method", "phase", "one", "two"], [["a/x", "decode", "0.30", "0.50"], ["a/y", "decode", "0.50", "1.00"]])


def test_the_interval_counts_and_not_the_mean_alone() -> None:
    assert is_kept(point(0.01, 0.1)) and is_kept(point(0.02, 0.1, 0.02)) and not is_kept(point(0.02, 0.1, 0.04)) and not is_kept(point(0.06, 0.1))


def test_the_worst_task_and_the_mean() -> None:
    assert worst(MADE, "a/x", "decode", 0.1, 512) == ("one", 0.5, 0.25, 0.1) and worst(MADE, "a/x", "prefill", 0.1, 512) is None
    assert kept_lines(MADE) == [                                                # at the middle budget, the best first
        ["a/x", "decode", "0.50", "two", "0.20", "0.11", "0.30"], ["a/y", "decode", "1.00", "one", "0.90", "0.60", "0.30"],
    ]
    said = statements(MADE)
    assert "In decode, a/x keeps every task within 5% from a density of 0.50 on." in said
    assert "The mean hides most for a/y in decode: with 30% of the keys it loses 60% on average and 90% of one." in said


def test_a_method_that_sat_fewer_tasks_is_not_said_to_keep_them_all() -> None:
    made = MADE | lines({("a/one", 0.1, "one"): 0.0})                           # as where a run was cut short
    assert "a/one" not in statements(made).split(" The mean")[0] and next(r for r in kept_lines(made) if r[0] == "a/one")[2] == "–"
    policy = lines({("a/x", 0.1, "one"): 0.0, ("a/x", 0.1, "averaging"): 0.9, ("cache/p", 0.1, "one"): 0.0})
    assert "In decode, cache/p keeps every task within 5% from a density of 0.10 on." in statements(policy)


def test_winners_at_each_budget() -> None:
    least = [row for row in winners(MADE) if row[3] == "0.1"]
    assert least == [["one", "decode", "512", "0.1", "a/y", "1.00"], ["two", "decode", "512", "0.1", "a/x", "1.00"]]
    assert ["one", "decode", "512", "0.3", "a/y = a/x", "1.00"] in winners(MADE) and len(winners(MADE)) == 6       # a/y did it with less
    level = lines({("attention/x", 0.1, "one"): 0.0, ("cache/y", 0.1, "one"): 0.005})
    assert winners(level)[0][4] == "x = cache/y"


def test_what_keeps_more_than_it_was_told_wins_nothing_at_that_budget() -> None:
    made = lines({("a/x", 0.1, "one"): 0.2, ("a/x", 0.5, "one"): 0.1, ("a/all", 0.1, "one"): 0.0, ("a/all", 0.5, "one"): 0.0})
    for cell in [c for c in made if c.method == "a/all"]:
        made[cell] = point(0.0, 1.0)                                            # as methods for prefill alone decode: densely
    assert [row[3:] for row in winners(made)] == [["0.1", "a/x", "0.80"], ["0.5", "a/x", "0.90"]]
    made[Cell("patterns/z", 1.0, "decode", "one", 512)] = point(0.05, 0.4)      # no budget: competes where it keeps no more
    assert [row[3:] for row in winners(made)] == [["0.1", "a/x", "0.80"], ["0.5", "patterns/z", "0.95"]]
    assert kept_lines(made)[-1] == ["a/all", "decode", "1.00", "–", "–", "–", "–"] and "a/all" not in statements(made)
    many = lines({(f"attention/m{i}", 0.1, "one"): 0.001 * i for i in range(6)})
    assert winners(many)[0][4] == "m0 = m1 = m2 and 3 more"


def test_a_task_that_the_dense_model_cannot_do_is_not_kept_but_left_out() -> None:
    made = lines({("a/x", 0.1, "one"): 0.5, ("a/x", 0.1, "two"): 0.0})
    here = next(c for c in made if c.task == "two")
    made[here].metrics["dense_score"] = Interval(0.02, 0.0, 0.04)
    assert {c.task for c in telling(made)} == {"one"} and list(untelling(made)) == ["two at 512, from the findings"]
    assert "0.02" in untelling(made)["two at 512, from the findings"]
    assert "does none of these tasks" in statements(telling({here: made[here]})) and kept_lines(telling({here: made[here]})) == []


def test_long_tables_leave_out_the_rows_that_say_nothing() -> None:
    few = {("a/good", 0.1, "one"): 0.0} | {(f"a/m{i}", 0.1, "one"): 0.9 for i in range(5)}
    assert len(tables(lines(few))[0]["rows"]) == 6
    many = lines(few | {(f"a/m{i}", 0.1, "one"): 0.9 for i in range(30)})
    kept, worst_task, *_ = tables(many)
    assert kept["rows"] == [["a/good", "decode", "0.10"]] and "Left out: 30 in decode" in kept["note"]
    assert len(worst_task["rows"]) == 31 and worst_task["rows"][0][0] == "a/good"


def test_one_document_has_intervals_over_its_windows() -> None:
    ids, place = torch.arange(64).view(4, 16) % 7, torch.arange(16)
    one, two = torch.zeros(4, 16, dtype=torch.long), torch.tensor([0, 0, 1, 1])[:, None].expand(4, 16)
    sitting = text_sitting([Batch(ids, one, place)], None)
    assert sitting.doc_BT[:, 0].tolist() == [0, 1, 2, 3] and int(sitting.answer_BT.sum()) == 4 * 15
    assert text_sitting([Batch(ids, two, place)], None).doc_BT[:, 0].tolist() == [0, 0, 1, 1]


def test_a_fit_is_shared_by_the_phases_of_a_budget_and_by_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    sitting, fitted = recall_sitting("needle", 96, 6, recall_model()), []
    real = attention_suite_methods.calibrate
    monkeypatch.setattr(attention_suite_methods, "calibrate", lambda *a, **k: (fitted.append(sum(len(b.input_ids) for b in a[2])), real(*a, **k))[1])
    candidates, one = Candidates({}), card("attention/double_sparsity")
    first, again = (candidates.of(one, 0.5, sitting=sitting) for _ in range(2))
    assert fitted == [CALIBRATION] and first.methods[0] is not again.methods[0] and first.methods[0].ready
    for a, b in zip(first.methods, again.methods, strict=True):
        assert a.state_dict().keys() == b.state_dict().keys() and all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())
    candidates.of(one, 0.25, sitting=sitting)
    candidates.of(one, 0.25, sitting=recall_sitting("needle", 128, 6, recall_model()))
    assert fitted == [CALIBRATION] * 3
    long = dataclasses.replace(sitting, length=3000, at_once=1)
    assert [len(b.input_ids) for b in attention_suite_methods.calibration(long)] == [1, 1]
    assert sum(len(b.input_ids) for b in attention_suite_methods.calibration(dataclasses.replace(sitting, length=100_000))) == 1
    few = dataclasses.replace(sitting, ids_BT=sitting.ids_BT[:2], doc_BT=sitting.doc_BT[:2], at_once=2)                # fewer than are wanted
    assert [len(b.input_ids) for b in attention_suite_methods.calibration(few)] == [2]


@pytest.mark.parametrize(("text", "names"), [
    ("a/x, a/y", ["a/x", "a/y"]), ("blocks(8, window(2) | keys(0)),a/x", ["blocks(8, window(2) | keys(0))", "a/x"]), ("a/x,,", ["a/x"]),
    ("on_layers([0, 1], window(2), full())", ["on_layers([0, 1], window(2), full())"]),
])
def test_a_comma_inside_brackets_is_the_expressions_own(text: str, names: list[str]) -> None:
    assert split(text) == names


@pytest.mark.parametrize("task", RECALL)
def test_decoding_says_what_prefill_says_when_everything_is_kept(task: str) -> None:
    reference = Reference(recall_sitting(task, 96 if task == "mqar" else 128, 3, recall_model()))
    prefill = reference.at("prefill")
    decode, cache = log_probs(reference.sitting, "decode", DENSE)
    later = judged(reference.sitting, "decode")
    assert later.any() and len(decode) == int(later.sum()) and cache.get_seq_length() == reference.sitting.ids_BT.shape[1]
    torch.testing.assert_close(decode, prefill[later[reference.sitting.answer_BT]], atol=1e-4, rtol=1e-4)


def test_figures_are_those_of_a_plain_loop() -> None:
    reference = Reference(recall_sitting("mqar", 128, 4, recall_model()))
    sitting, method = reference.sitting, WindowSinks(budget=0.4)
    metrics, density, cost = sit(reference, "prefill", Candidate({"layers.*.attn": method}))
    log_AV, _ = log_probs(sitting, "prefill", Candidate({"layers.*.attn": method}))
    places, right, dense_right, kl = sitting.answer_BT.nonzero().tolist(), [0] * 4, [0] * 4, 0.0
    near = {name: [0, 0] for name in sitting.by}
    for (b, t), p, d in zip(places, log_AV, reference.all_AV, strict=True):
        hit = int(p.argmax()) == int(sitting.ids_BT[b, t])
        right[b] += hit
        dense_right[b] += int(d.argmax()) == int(sitting.ids_BT[b, t])
        kl += float((d.exp() * (d - p)).sum()) / len(places)
        for name, group in sitting.by.items():
            if group[b, t]:
                near[name][0] += hit
                near[name][1] += 1
    assert metrics["score"].mean == pytest.approx(sum(right) / len(places)) and metrics["kl"].mean == pytest.approx(kl, rel=1e-4)
    assert metrics["loss"].mean == pytest.approx((sum(dense_right) - sum(right)) / len(places)) and metrics["loss"].mean > 0.1
    assert {n.removeprefix("score, "): m.mean for n, m in metrics.items() if n.startswith("score, ")} == pytest.approx(
        {n: hit / count for n, (hit, count) in near.items() if count}
    )
    assert density == pytest.approx(0.4, abs=0.02) and cost["flops"] / cost["dense_flops"] == pytest.approx(density, rel=1e-6)
    assert metrics["score, gap 1-63"].mean > metrics["score, gap 64-127"].mean


@pytest.mark.parametrize("name", ["attention/window", "patterns/s2", "attention/chunked"])
def test_work_is_counted_for_every_layer_a_query(name: str) -> None:
    reference = Reference(recall_sitting("needle", 96, 2, recall_model()))
    config = reference.sitting.model.config
    whole = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    for phase, keys in (("prefill", 97 / 2), ("decode", 96)):                      # keys seen by a query, on average, and by the last
        _, density, cost = sit(reference, phase, Candidates({}).of(card(name), 0.5, sitting=reference.sitting))
        assert cost["dense_flops"] == pytest.approx(whole * keys) and cost["dense_bytes"] == pytest.approx(2 * whole * keys)
        assert cost["bytes"] == pytest.approx(2 * whole * keys * density)
        if (name, phase) != ("attention/chunked", "prefill"):                      # which chooses; decoding it is dense, and chooses nothing
            assert cost["flops"] == pytest.approx(whole * keys * density)
    assert density == 1 or name != "attention/chunked"


def test_heads_keep_what_their_masks_say() -> None:
    sitting = recall_sitting("needle", 96, 1, recall_model())
    method = Quest(budget=0.4, block=8)
    keepers = kept_by_heads(sitting, {"layers.0.attn": method, "layers.1.attn": method})
    assert len(keepers) == 2
    for keeper in keepers:
        assert keeper.pairs_HTS is not None and keeper.pairs_HTS.shape == (4, 96, 96)
        torch.testing.assert_close(keeper.density_H.double(), keeper.pairs_HTS.double().sum((1, 2)) / (96 * 97 / 2))
        assert ((keeper.mass_H > 0) & (keeper.mass_H <= 1 + 1e-6)).all() and not keeper.pairs_HTS.triu(1).any()
    full = kept_by_heads(sitting, {"layers.0.attn": Quest(budget=1.0), "layers.1.attn": Quest(budget=1.0)})
    assert all(torch.allclose(k.mass_H, torch.ones(4)) and torch.allclose(k.density_H, torch.ones(4)) for k in full)


def test_a_shrunk_mask_keeps_the_share_of_each_cell() -> None:
    pairs: Tensor = torch.rand(13, 17, generator=torch.Generator().manual_seed(0)) > 0.6
    got = shrunk(pairs, 4)
    for i in range(4):
        for j in range(4):
            inside = [bool(pairs[t, s]) for t in range(13) for s in range(17) if t * 4 // 13 == i and s * 4 // 17 == j]
            assert float(got[i, j]) == pytest.approx(sum(inside) / len(inside))
    assert torch.equal(shrunk(pairs, 64).bool()[:, :13].any(), pairs.any()) and shrunk(torch.ones(3, 3), 64).tolist() == [[1.0] * 3] * 3


def test_tasks_and_lengths_are_checked() -> None:
    for tasks, lengths, named in ((["x"], [96], "no task"), ([], [96], "no task or no length"), (["mqar"], [95], "length=95")):
        with pytest.raises(BadInput, match=named):
            check_tasks(tasks, lengths)


@pytest.mark.parametrize(("part", "named"), [
    ({"tables": [{"title": "t", "note": "", "head": ["a", "b"], "rows": [["1"]]}]}, r"tables\[0\].rows\[0\]"),
    ({"tables": [{"title": "t", "note": "", "head": ["a"], "rows": [[1]]}]}, r"tables\[0\].rows\[0\]"),
    ({"grids": [{"title": "t", "note": "", "columns": ["a"], "rows": [], "values": [[0.1, 0.2]], "figures": True}]}, r"grids\[0\].columns"),
    ({"grids": [{"title": "t", "note": "", "columns": [], "rows": [], "values": [[0.1, 0.2], [0.1]], "figures": True}]}, r"grids\[0\].values\[1\]"),
    ({"grids": [{"title": "t", "note": "", "columns": [], "rows": [], "values": [[0.1]], "figures": 1}]}, r"grids\[0\].figures"),
])
def test_a_page_with_tables_or_grids_that_do_not_fit_is_refused(part: dict[str, object], named: str) -> None:
    made = {"command": "", "versions": {}, "seconds": 1.0, "machine": "", "date": ""}
    model = {"name": "", "params": 1, "layers": 1, "d_model": 1, "vocab": 1, "data": "", "heldout": ""}
    empty = {name: [] for name in ("steps", "units", "curves", "costs", "notes")}
    report = {"schema": 1, "title": "t", "made": made, "model": model, "latents": None, **empty}
    good = {"title": "t", "note": "", "columns": ["a"], "rows": ["b"], "values": [[None]], "figures": True}
    assert validate({**report, "tables": [], "grids": [good]})
    with pytest.raises(BadInput, match=named):
        validate({**report, **part})
