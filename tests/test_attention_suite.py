"""The attention suite's parts: what is judged in which phase, what is said of lines, what is drawn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.attention.quest import Quest
from rarefy.attention.window import WindowSinks
from rarefy.builtin.model import recall_model
from rarefy.errors import BadInput
from rarefy.fidelity import Interval
from rarefy.frontier import Point
from rarefy.jobs.attention_suite import Cell
from rarefy.jobs.attention_suite_page import is_kept, kept_lines, kept_table, least_kept, statements, winners, worst
from rarefy.jobs.attention_suite_picture import kept_by_heads, shrunk
from rarefy.jobs.attention_suite_run import DENSE, Candidate, Reference, judged, log_probs, sit
from rarefy.jobs.attention_suite_tasks import RECALL, check_tasks, recall_sitting
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
    assert worst(MADE, "a/x", "decode", 0.1, 512) == ("one", 0.5, 0.25) and worst(MADE, "a/x", "prefill", 0.1, 512) is None
    assert kept_lines(MADE) == [["a/x", "decode", "0.50", "one", "0.50", "0.25"], ["a/y", "decode", "1.00", "two", "0.60", "0.30"]]
    said = statements(MADE)
    assert "In decode, a/x keeps every task within 5% from a density of 0.50 on." in said
    assert "a/y at budget 0.1 in decode: it loses 30% on average and 60% of two" in said or "a/y at budget 0.3" in said


def test_winners_at_each_budget() -> None:
    least = [row for row in winners(MADE) if row[3] == "0.1"]
    assert least == [["one", "decode", "512", "0.1", "a/y", "1.00"], ["two", "decode", "512", "0.1", "a/x", "1.00"]]
    assert ["one", "decode", "512", "0.3", "a/x", "0.99"] in winners(MADE) and len(winners(MADE)) == 6
    level = lines({("a/x", 0.1, "one"): 0.0, ("a/y", 0.1, "one"): 0.005})
    assert winners(level)[0][4] == "x = y"


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
