"""Judge and frontier against closed forms, a token at a time, and brute force.

Shape letters: B = windows, T = tokens, D = width, V = vocabulary, C = documents.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rarefy
from rarefy import catalogue, frontier
from rarefy.errors import BadInput, Damaged
from rarefy.fidelity import Interval
from rarefy.frontier import Frontier, Judge, Point, pareto, sweep
from rarefy.neurons.linear import InputSparseLinear
from rarefy.selection import Selection
from site_models import VOCAB, build


@dataclass
class Batch:
    input_ids: Tensor
    doc: Tensor
    attention_mask: Tensor | None = None


def windows(B: int = 6, T: int = 14, docs: int = 5) -> tuple[Tensor, Tensor]:
    """Token ids, and documents of uneven length that run across windows; the last one is a single token, nobody's prediction."""
    g = torch.Generator().manual_seed(1)
    ends = torch.randperm(B * T - 2, generator=g)[: docs - 1].sort().values + 1
    doc = torch.searchsorted(ends, torch.arange(B * T), right=True)
    doc[-1] = docs
    return torch.randint(VOCAB, (B, T), generator=g), doc.view(B, T)


def batches(size: int = 2, **more: Any) -> list[Batch]:
    ids, doc = windows(**more)
    return [Batch(i, d) for i, d in zip(ids.split(size), doc.split(size), strict=True)]


class Half(nn.Module):
    """A linear layer that leaves out every other input."""

    def __init__(self, old: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(old.weight.detach() * (torch.arange(old.weight.shape[1]) % 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


SITE, PATH = "layers.0.up_proj", "model.layers.0.mlp.up_proj"


@torch.no_grad()
def by_token(held: list[Batch], dense: Any, sparse: Any) -> list[dict[str, float]]:
    """Every predicted token of every window, run alone and without padding."""
    out = []
    for batch in held:
        for b in range(len(batch.input_ids)):
            real = torch.ones_like(batch.input_ids[b]) if batch.attention_mask is None else batch.attention_mask[b]
            ids_T, doc_T = batch.input_ids[b][real.bool()], batch.doc[b][real.bool()]
            p_TV, q_TV = (m(input_ids=ids_T[None]).logits[0].double().softmax(-1) for m in (dense, sparse))
            for t in range(len(ids_T) - 1):
                if doc_T[t] == doc_T[t + 1]:
                    p, q, next_ = p_TV[t], q_TV[t], ids_T[t + 1]
                    out.append({
                        "doc": int(doc_T[t]), "ce": -math.log(q[next_]), "ce_increase": math.log(p[next_]) - math.log(q[next_]),
                        "kl": float((p * (p / q).log()).sum()), "top1": float(p.argmax() == q.argmax()),
                    })
    return out


def ratio(rows: list[dict[str, float]], name: str) -> tuple[float, float, float]:
    """Mean over tokens with the interval of a ratio over documents, written out."""
    docs = sorted({r["doc"] for r in rows})
    total = [sum(r[name] for r in rows if r["doc"] == d) for d in docs]
    count = [sum(1 for r in rows if r["doc"] == d) for d in docs]
    mean, n = sum(total) / sum(count), len(docs)
    spread = sum((t - mean * c) ** 2 for t, c in zip(total, count, strict=True)) * n / (n - 1)
    half = 1.96 * math.sqrt(spread) / sum(count)
    return mean, mean - half, mean + half


def swapped() -> tuple[Any, Any]:
    """(dense, the same with Half at PATH)."""
    dense, sparse = build("llama"), build("llama")
    sparse.model.layers[0].mlp.up_proj = Half(sparse.model.layers[0].mlp.up_proj)
    return dense, sparse


def check(point: Point, rows: list[dict[str, float]]) -> None:
    for name in ("ce", "ce_increase", "kl", "top1"):
        got = point.metrics[name]
        assert (got.mean, got.low, got.high) == pytest.approx(ratio(rows, name), rel=1e-4, abs=2e-6), name


def test_every_metric_and_interval_by_hand() -> None:
    dense, sparse = swapped()
    rows = by_token(batches(), dense, sparse)
    judge = Judge(dense, batches())
    assert judge.tokens == 84 and judge.documents == 6 and len({r["doc"] for r in rows}) == 5
    check(judge.measure({SITE: Half(dense.get_submodule(PATH))}, method="half", unit="weight"), rows)
    there = judge.dense("weight")
    assert (there.method, there.role, there.density) == ("dense", "dense", 1.0)
    assert there.metrics["ce"].mean == pytest.approx(ratio(by_token(batches(), dense, dense), "ce")[0], rel=1e-5)
    assert there.metrics["ce_increase"] == there.metrics["kl"] == Interval(0, 0, 0) and there.metrics["top1"].mean == 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_nowhere(side: str) -> None:
    dense, sparse = swapped()
    ids, doc = windows()
    held = []
    for b in range(len(ids)):
        pad = b % 4                                         # other padding in every window
        mask = torch.ones(1, ids.shape[1], dtype=torch.long)
        if pad:
            mask[:, slice(0, pad) if side == "left" else slice(-pad, None)] = 0
        held.append(Batch(ids[b : b + 1], doc[b : b + 1], mask))
    check(Judge(dense, held).measure({SITE: Half(dense.get_submodule(PATH))}, method="half", unit="weight"), by_token(held, dense, sparse))


@pytest.mark.parametrize("size", [1, 4, 6])
def test_how_text_is_batched_does_not_matter(size: int) -> None:
    model = build("llama")
    plan = {SITE: Half(model.get_submodule(PATH))}
    one, other = (Judge(model, batches(s)).measure(plan, method="half", unit="weight") for s in (2, size))
    for name, got in other.metrics.items():
        assert (got.mean, got.low, got.high) == pytest.approx((one.metrics[name].mean, one.metrics[name].low, one.metrics[name].high), abs=2e-5)


def test_without_room_for_the_dense_model_it_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    plan = {SITE: Half(model.get_submodule(PATH))}
    kept = Judge(model, batches()).measure(plan, method="half", unit="weight")
    monkeypatch.setattr(frontier, "LOG_PROBS_KEPT", 0)
    assert Judge(model, batches()).measure(plan, method="half", unit="weight") == kept


def test_nothing_changed_costs_nothing_and_the_model_comes_back() -> None:
    model = build("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    point = Judge(model, batches()).measure({"layers.1.resid_post": lambda x: x}, method="same", unit="latent")
    assert point.metrics["ce_increase"].mean == 0 and point.metrics["top1"].mean == 1 and abs(point.metrics["kl"].mean) < 1e-7
    assert point.density == point.budget == 1.0 and point.cost == {}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_no_text_and_no_tokens() -> None:
    with pytest.raises(BadInput, match="no held-out text"):
        Judge(build("llama"), [])
    ids, _ = windows()
    with pytest.raises(BadInput, match="no tokens"):
        Judge(build("llama"), [Batch(ids, torch.arange(ids.numel()).view_as(ids))]).dense("weight")


# -------------------------------------------------------------------------------------------- density and cost


class Positive(InputSparseLinear):
    """Keeps inputs above 0: how many depends on the row."""

    name = "neurons/positive"

    def select(self, x: Tensor) -> Selection:
        return Selection(self.d_in, x, mask_=x > 0)


def positive(model: Any, path: str) -> Positive:
    return Positive.for_module(model.get_submodule(path), budget=0.5)


@torch.no_grad()
def inputs(model: Any, path: str, held: list[Batch]) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, i, o: seen.append(i[0].flatten(0, -2)))
    for batch in held:
        model(input_ids=batch.input_ids)
    handle.remove()
    return torch.cat(seen)


def test_density_is_that_of_all_the_text() -> None:
    model, held = build("llama"), batches(2)
    x_ND = inputs(model, PATH, held)
    point = Judge(model, held).measure({SITE: positive(model, PATH)}, method="p", unit="neuron")
    assert point.density == pytest.approx(float((x_ND > 0).double().mean()), abs=1e-6)
    assert abs(point.density - float((inputs(model, PATH, held[:1]) > 0).double().mean())) > 1e-4      # what the first batch alone would say
    assert point.budget == 0.5


def test_choosing_is_done_once_and_a_method_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = build("llama"), []
    method, select = positive(model, PATH), Positive.select
    monkeypatch.setattr(Positive, "select", lambda self, x: calls.append(len(x)) or select(self, x))
    judge = Judge(model, batches())
    point = judge.measure({SITE: method}, method="p", unit="neuron")
    assert len(calls) == len(batches()) and "select" not in vars(method)
    with pytest.raises(ZeroDivisionError):
        judge.measure({SITE: method, "layers.1.resid_post": lambda x: 1 / 0}, method="p", unit="neuron")
    assert "select" not in vars(method) and not method._forward_hooks
    assert 0 < point.density < 1


def test_density_weighs_sites_by_what_they_choose_from() -> None:
    model, held = build("llama"), batches(3)
    paths = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"]
    plan: dict[str, Any] = {f"layers.0.{p.rsplit('.', 1)[1]}": positive(model, p) for p in paths}
    weights = {"layers.1.down_proj": 0.25, "layers.1.k_proj": 0.5}
    for name, budget in weights.items():
        module = model.get_submodule(rarefy.sites(model, name)[name].module_path)
        plan[name] = catalogue.entry("weights/magnitude").load().for_module(module, budget=budget)
    x_ND = inputs(model, paths[0], held)
    rows, units = len(x_ND), 32
    kept = 2 * float((x_ND > 0).sum()) + 0.25 * 48 * 32 + 0.5 * 32 * 16
    there = 2 * rows * units + 48 * 32 + 32 * 16
    assert Judge(model, held).measure(plan, method="mixed", unit="neuron").density == pytest.approx(kept / there, abs=1e-6)


def test_one_method_at_every_site_counts_at_every_site() -> None:
    model, held = build("llama"), batches(3)
    quest = catalogue.entry("attention/quest").load()
    for method in (one := quest(budget=0.5, block=4).eval(),):
        method(*(torch.randn(1, 4, 40, 8) for _ in range(3)))            # used before: not to be counted here
    shared = Judge(model, held).measure({"layers.*.attn": one}, method="q", unit="key block")
    apart = Judge(model, held).measure({f"layers.{n}.attn": quest(budget=0.5, block=4).eval() for n in (0, 1)}, method="q", unit="key block")
    assert shared == apart and shared.cost["dense_flops"] == 2 * one.dense_cost().flops
    again = Judge(model, held).measure({"layers.0.attn": one, "layers.1.attn": one}, method="q", unit="key block")
    assert again == apart


def test_density_of_attention_is_the_share_of_visible_pairs() -> None:
    model, held = build("llama"), batches(3, T=16)
    method = catalogue.entry("attention/window").load()(budget=0.5, block=4, sinks=2, window=3).eval()
    point = Judge(model, held).measure({"layers.*.attn": method}, method="w", unit="key")
    kept = sum(1 for t in range(16) for s in range(t + 1) if s < 2 or s > t - 3)
    assert point.density == pytest.approx(kept / (16 * 17 / 2))


def test_costs_are_sums_over_the_methods() -> None:
    model = build("llama")
    method = positive(model, PATH)
    cost = Judge(model, batches()).measure({SITE: method}, method="p", unit="neuron").cost
    assert cost == {"flops": 32 * 48, "bytes": 4 * 32 * 24, "dense_flops": 2 * 32 * 48, "dense_bytes": 4 * 32 * 48}


def test_measure_is_judge_for_one_plan() -> None:
    model, held = build("llama"), batches()
    method = positive(model, PATH)
    assert rarefy.measure(model, {SITE: method}, held) == Judge(model, held).measure({SITE: method}, method="neurons/positive", unit="neuron")


# -------------------------------------------------------------------------------------------------------- pareto


def point(x: float, y: float, name: str = "m") -> Point:
    return Point(name, "weight", "method", 0.5, x, {"ce_increase": Interval(y, y, y)}, {"flops": x * 10})


def beats(a: Point, b: Point, sign: int) -> bool:
    (ax, ay), (bx, by) = ((p.density, sign * p.metrics["ce_increase"].mean) for p in (a, b))
    return ax <= bx and ay <= by and (ax < bx or ay < by)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=12), st.booleans())
def test_pareto_is_brute_force(places: list[tuple[int, int]], low: bool) -> None:
    points, sign = [point(x / 4, y, f"m{i}") for i, (x, y) in enumerate(places)], 1 if low else -1
    wanted = [p for p in points if not any(beats(q, p, sign) for q in points)]
    got = pareto(points, "density", "ce_increase", low_is_better=low)
    assert sorted(p.method for p in got) == sorted(p.method for p in wanted)
    assert [p.density for p in got] == sorted(p.density for p in got)
    assert pareto(points, "flops", "ce_increase", low_is_better=low) == got == Frontier(points).pareto(low_is_better=low)


def test_points_without_a_value_are_left_out_and_unknown_axes_named() -> None:
    good = point(0.5, 1)
    assert pareto([point(0.1, math.nan), good, point(0.2, math.inf)], "density", "ce_increase") == [good]
    with pytest.raises(BadInput, match="no 'speed'; it has density, budget, flops, ce_increase"):
        pareto([good], "speed", "ce_increase")


# ------------------------------------------------------------------------------------------------------- on disk


def test_points_come_back_from_disk_as_they_were(tmp_path: Path) -> None:
    points = [
        point(0.1, 0.1 + 0.2), Point("dense", "key", "dense", 1.0, 1.0, {"ce": Interval(3.0, -math.inf, math.inf)}, {}, "a note"),
        Point("dense", "weight", "dense", 1.0, 1.0, {}),
    ]
    Frontier(points[:1]).save(tmp_path / "p.jsonl")
    Frontier(points).save(tmp_path / "p.jsonl")             # what is there is not written twice
    assert Frontier.load(tmp_path / "p.jsonl").points == points
    for line in (tmp_path / "p.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert json.dumps([p.as_json() for p in points], allow_nan=False)
    nan = Point("m", "weight", "method", 0.5, 0.5, {"ce": Interval(math.nan, math.nan, math.nan)})
    assert math.isnan(Point.from_json(nan.as_json()).metrics["ce"].mean)
    assert Frontier.load(tmp_path / "absent.jsonl").points == []


@pytest.mark.parametrize("record", [
    {}, {"method": "m"}, {**point(1, 1).as_json(), "colour": 1}, {**point(1, 1).as_json(), "metrics": {"ce": {"mean": 1}}},
    {**point(1, 1).as_json(), "metrics": [1]},
])
def test_lines_that_are_no_points(record: dict[str, Any]) -> None:
    with pytest.raises(Damaged, match="no point"):
        Point.from_json(record)


class Board:
    """A Judge that only counts."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, float]] = []

    def measure(self, plan: Any, *, method: str, unit: str, role: str, budget: float) -> Point:
        assert plan == {"plan": (method, budget)}
        self.asked.append((method, budget))
        if len(self.asked) == 4:
            raise KeyboardInterrupt
        return Point(method, unit, role, budget, budget, {"ce_increase": Interval(1, 1, 1)})


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path, names, budgets = tmp_path / "points.jsonl", ["weights/wanda", "weights/random"], [0.3, 0.5, 1 / 3]
    board: Any = Board()
    make = lambda name, budget: {"plan": (name, budget)}  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        sweep(board, names, budgets, make, path=path)
    assert len(Frontier.load(path).points) == 3
    with open(path, "ab") as file:
        file.write(b'{"method": "weights/ra')               # a line that a crash cut off
    board.asked, seen = [("", 0.0)] * 10, []
    got = sweep(board, names, budgets, make, path=path, on_point=seen.append)
    assert board.asked[10:] == [("weights/random", b) for b in budgets] and [p.budget for p in seen] == budgets
    assert [(p.method, p.budget, p.role) for p in got.points] == [(n, b, "baseline" if "random" in n else "method") for n in names for b in budgets]
    assert Frontier.load(path).points == got.points
    again: Any = Board()
    assert sweep(again, names, budgets, make, path=path).points == got.points and again.asked == []
    path.write_bytes(path.read_bytes().replace(b"wanda", b"wamda", 1))
    with pytest.raises(Damaged):
        sweep(again, names, budgets, make, path=path)
