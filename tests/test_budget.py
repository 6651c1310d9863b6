"""Sharing a budget: closed forms, and the laws of every rule on random sites."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.budget import RULES, share
from rarefy.errors import BadInput

shapes = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6)


def make_scores(sizes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {f"s{i}": torch.randn(*s, generator=g).abs() ** (1 + i) for i, s in enumerate(sizes)}


def settings_of(rule, sizes):
    if rule != "greedy":
        return {}
    return {"damage": lambda site, kept: (1 + int(site[1:])) * (1 - kept) ** 2, "step": 0.1}


def mean(fractions, scores):
    size = {k: v.numel() for k, v in scores.items()}
    return sum(fractions[k] * size[k] for k in scores) / sum(size.values())


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=60, deadline=None)
@given(sizes=shapes, budget=st.floats(0.01, 1), more=st.floats(0.01, 1))
def test_laws(rule, sizes, budget, more):
    scores, extra = make_scores(sizes), settings_of(rule, sizes)
    got = share(scores, budget, rule, **extra)
    assert list(got) == list(scores)
    assert mean(got, scores) == pytest.approx(budget, abs=1e-6)
    assert all(0 < f <= 1 for f in got.values())
    low, high = (share(scores, b, rule, **extra) for b in sorted((budget, more)))
    assert all(low[k] <= high[k] + 1e-9 for k in scores)


def test_uniform():
    assert share({"a": torch.ones(3, 4), "b": torch.ones(9, 9)}, 0.37) == {"a": 0.37, "b": 0.37}


def test_erk_closed_form():
    got = share({"a": torch.ones(100, 100), "b": torch.ones(400, 100)}, 0.1, "erk")
    epsilon = 0.1 * (10_000 + 40_000) / (200 + 500)
    assert got == pytest.approx({"a": epsilon * 200 / 10_000, "b": epsilon * 500 / 40_000})


def test_erk_fills_small_layers_first():
    got = share({"a": torch.ones(4, 4), "b": torch.ones(100, 100)}, 0.5, "erk")
    assert got["a"] == 1.0 and got["b"] == pytest.approx((0.5 * 10_016 - 16) / 10_000)


def test_owl_closed_form():
    plain, half, spiky = torch.ones(10, 10), torch.ones(10, 10), torch.ones(10, 10)
    half[0, :1], spiky[0, :2] = 1000.0, 1000.0
    got = share({"plain": plain, "half": half, "spiky": spiky}, 0.5, "owl", times=5, spread=0.08)
    assert got == pytest.approx({"plain": 0.42, "half": 0.5, "spiky": 0.58})
    assert share({"a": plain, "b": plain}, 0.5, "owl") == {"a": 0.5, "b": 0.5}


def test_greedy_equalises_marginal_damage():
    """Damage c (1 - f)^2 is least, at a fixed whole, where c (1 - f) / size is equal."""
    cost = {"a": 1.0, "b": 3.0}
    got = share({"a": torch.ones(10, 10), "b": torch.ones(10, 10)}, 0.6, "greedy", damage=lambda s, f: cost[s] * (1 - f) ** 2, step=0.01)
    assert got == pytest.approx({"a": 0.4, "b": 0.8}, abs=0.011)


def test_greedy_spares_what_breaks():
    calls = []

    def damage(site, kept):
        calls.append((site, kept))
        return 100.0 * (1 - kept) if site == "fragile" else 0.0

    got = share({"fragile": torch.ones(10, 10), "idle": torch.ones(10, 10)}, 0.6, "greedy", damage=damage)
    assert got["fragile"] == 1.0 and got["idle"] == pytest.approx(0.2)
    assert len(calls) == len(set(calls))


def test_greedy_damage_counts_a_unit_saved():
    got = share({"small": torch.ones(10, 10), "large": torch.ones(100, 100)}, 0.9, "greedy", damage=lambda s, f: 1 - f)
    assert got["small"] == 1.0 and got["large"] < 0.9


def test_greedy_reaches_tiny_budgets():
    got = share({"a": torch.ones(100, 100), "b": torch.ones(100, 100)}, 0.003, "greedy", damage=lambda s, f: 1 - f, step=0.3)
    assert sum(got.values()) / 2 == pytest.approx(0.003) and min(got.values()) > 0


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda: share({}, 0.5), "no sites"),
        (lambda: share({"a": torch.ones(3, 4)}, 0), r"budget=0 must be in \(0, 1\]"),
        (lambda: share({"a": torch.ones(3, 4)}, 1.1), "budget=1.1"),
        (lambda: share({"a": torch.ones(3, 4)}, 0.5, "unifrom"), "must be one of uniform"),
        (lambda: share({"a": torch.ones(3, 0)}, 0.5), r"a: shape \[3, 0\]"),
        (lambda: share({"a": torch.ones(3)}, 0.5, "erk"), "a: erk needs matrices"),
        (lambda: share({"a": torch.tensor([math.nan])}, 0.5), "scores of a"),
        (lambda: share({"a": torch.ones(3, 4)}, 0.5, "erk", lam=1), "no argument 'lam'; it takes none"),
        (lambda: share({"a": torch.ones(3)}, 0.5, "owl", times=0), "times=0"),
        (lambda: share({"a": torch.ones(3)}, 0.5, "owl", spread=-1), "spread=-1"),
        (lambda: share({"a": torch.ones(3, 4)}, 0.5, "greedy"), "needs damage"),
        (lambda: share({"a": torch.ones(3, 4)}, 0.5, "greedy", damage=lambda s, f: math.nan), "damage of a"),
        (lambda: share({"a": torch.ones(3, 4)}, 0.5, "greedy", damage=lambda s, f: 0, step=0), "step=0"),
    ],
)
def test_errors(call, words):
    with pytest.raises(BadInput, match=words):
        call()
