"""Selection rules against brute force, bisection, optimality conditions and peers."""

import itertools

import numpy as np
import pytest
import torch
from entmax import entmax15 as peer_entmax15
from entmax import sparsemax as peer_sparsemax
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from rarefy.errors import BadInput
from rarefy.selection import (
    Selection,
    batch_top_k,
    check_finite,
    check_scores,
    entmax15,
    kept,
    n_of_m,
    random_k,
    sparsemax,
    statistical_top_k,
    threshold,
    top_k,
    top_p,
)

SHAPES = [(1,), (63,), (111,), (1, 1), (4, 63), (2, 3, 111), (0, 8)]
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_top_k_counts_and_weights(shape, share):
    scores, k = torch.randn(shape), kept(share, shape[-1])
    selection = top_k(scores, k)
    assert selection.n == shape[-1]
    assert selection.index.shape == (*shape[:-1], k)
    assert torch.equal(selection.weight, scores.gather(-1, selection.index))
    assert (selection.count == k).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_top_k_is_the_best_subset(data):
    n = data.draw(st.integers(1, 8))
    k = data.draw(st.integers(1, n))
    scores = torch.tensor(data.draw(st.lists(st.integers(-5, 5), min_size=n, max_size=n)), dtype=torch.float32)
    best = max(sum(float(scores[i]) for i in subset) for subset in itertools.combinations(range(n), k))
    assert float(top_k(scores, k).weight.sum()) == best


def test_infinite_scores_are_always_and_never_chosen():
    scores = torch.tensor([1.0, -INF, INF, 2.0])
    assert top_k(scores, 1).index.tolist() == [2]
    assert top_k(scores, 3).mask.tolist() == [True, False, True, True]


def test_forms_of_a_selection_agree():
    scores = torch.randn(5, 63)
    by_index = top_k(scores, 7)
    by_mask = Selection(63, scores, mask_=by_index.mask)
    assert torch.equal(by_index.dense, by_mask.dense)
    assert torch.equal(by_index.count, by_mask.count)
    assert by_index.density == pytest.approx(by_mask.density) == pytest.approx(7 / 63)


def test_dense_is_differentiable_in_both_forms():
    for form in ("index", "mask"):
        weight = torch.randn(3, 8, requires_grad=True)
        selection = top_k(weight, 3)
        if form == "mask":
            selection = Selection(8, weight, mask_=selection.mask)
        (selection.dense * torch.arange(8.0)).sum().backward()
        assert torch.equal(weight.grad, selection.mask * torch.arange(8.0))


def test_mask_form_hides_nan_outside_the_mask():
    weight = torch.tensor([1.0, NAN])
    assert Selection(2, weight, mask_=torch.tensor([True, False])).dense.tolist() == [1.0, 0.0]


def test_selection_needs_exactly_one_form():
    mask, index = torch.ones(3, dtype=torch.bool), torch.arange(3)
    for given_ in ({}, {"index": index, "mask_": mask}):
        with pytest.raises(BadInput, match="either an index or a mask"):
            Selection(3, torch.ones(3), **given_)


def test_density_of_an_empty_batch():
    assert threshold(torch.zeros(0, 5), 0.0).density == 0.0
    assert top_k(torch.zeros(0, 5), 2).density == 0.4


@pytest.mark.parametrize("k", [1, 7, 63])
def test_random_k(k):
    scores = torch.randn(200, 63)
    one = random_k(scores, k, torch.Generator().manual_seed(3))
    two = random_k(-scores * 100, k, torch.Generator().manual_seed(3))
    assert torch.equal(one.mask, two.mask)                             # the values have no say
    assert (one.count == k).all()
    assert torch.equal(one.weight, scores.gather(-1, one.index))
    expected, spread = 200 * k / 63, (200 * k / 63 * (1 - k / 63)) ** 0.5
    assert ((one.mask.sum(0) - expected).abs() <= 5 * spread + 1e-9).all()


@pytest.mark.parametrize("k", [0.6, 3, 2.25, 63])
def test_batch_top_k_is_one_ranking_of_the_batch(k):
    scores = torch.randn(16, 63)
    mask = batch_top_k(scores, k).mask
    total = round(k * 16)
    assert int(mask.sum()) == total
    assert total == 16 * 63 or scores[mask].min() > scores[~mask].max()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.data())
def test_n_of_m_is_the_best_of_every_group(m, data):
    n = data.draw(st.integers(1, m))
    scores = torch.tensor(data.draw(st.lists(st.floats(-9, 9, width=32), min_size=3 * m, max_size=3 * m)))
    mask = n_of_m(scores, n, m).mask.view(3, m)
    for group, chosen in zip(scores.view(3, m), mask, strict=True):
        assert int(chosen.sum()) == n
        best = max(sum(float(group[i]) for i in subset) for subset in itertools.combinations(range(m), n))
        assert float(group[chosen].double().sum()) == pytest.approx(best, abs=1e-5)


def test_threshold_is_strict_and_broadcasts():
    scores = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    assert threshold(scores, 1.0).mask.tolist() == [[False, False, True]] * 2
    assert threshold(scores, torch.tensor([[-1.0], [1.0]])).count.tolist() == [3, 1]


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999, 1.0])
def test_top_p_is_minimal(p):
    probabilities = torch.randn(50, 63, dtype=torch.float64).mul(2).softmax(-1)
    mask = top_p(probabilities, p).mask
    reached = (probabilities * mask).sum(-1)
    assert (reached >= p - 1e-12).all()
    if p < 1:
        least = probabilities.masked_fill(~mask, 2).amin(-1)
        assert (reached - least < p).all()                             # one fewer would not reach p
        assert (least >= probabilities.masked_fill(mask, -1).amax(-1)).all()


def test_top_p_of_a_row_of_zeros_keeps_one():
    assert top_p(torch.zeros(2, 5), 0.5).mask.tolist() == [[True, False, False, False, False]] * 2


@pytest.mark.parametrize("k", [1, 100, 2000, 3999])
def test_statistical_top_k_cuts_at_the_normal_quantile(k):
    scores = torch.randn(3, 4000, dtype=torch.float64) * 3 + 5
    mean, std = scores.mean(-1, keepdim=True), scores.std(-1, keepdim=True)
    assert torch.equal(statistical_top_k(scores, k).mask, scores > mean + norm.ppf(1 - k / 4000) * std)
    assert abs(float(statistical_top_k(scores, k).count.double().mean()) - k) < 60


@pytest.mark.parametrize(("ours", "peer", "alpha"), [(sparsemax, peer_sparsemax, 2.0), (entmax15, peer_entmax15, 1.5)])
@pytest.mark.parametrize("n", [1, 2, 63, 111])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_simplex_maps(ours, peer, alpha, n, scale):
    scores = torch.randn(20, n, dtype=torch.float64) * scale
    selection = ours(scores)
    weight = selection.weight
    assert torch.allclose(weight.sum(-1), torch.ones(20, dtype=torch.float64), atol=1e-9)
    assert torch.equal(selection.mask, weight > 0)
    # optimality: weight = [(alpha - 1) z - tau]_+ ^ (1 / (alpha - 1)) for one tau a row, found here by bisection
    z = (alpha - 1) * scores
    low, high = z.amax(-1, keepdim=True) - 1, z.amax(-1, keepdim=True)
    for _ in range(80):
        tau = (low + high) / 2
        over = (z - tau).clamp_min(0).pow(1 / (alpha - 1)).sum(-1, keepdim=True) > 1
        low, high = torch.where(over, tau, low), torch.where(over, high, tau)
    assert torch.allclose(weight, (z - low).clamp_min(0).pow(1 / (alpha - 1)), atol=1e-8)
    assert torch.allclose(weight, peer(scores, dim=-1), atol=1e-6)


@pytest.mark.parametrize("rule", [sparsemax, entmax15])
def test_gradients_of_simplex_maps(rule):
    scores = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: rule(z).weight, scores)


@pytest.mark.parametrize("rule", [sparsemax, entmax15])
@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_simplex_maps_do_not_see_a_shift(rule, shift):
    scores = torch.randn(4, 9, dtype=torch.float64)
    assert torch.allclose(rule(scores + shift).weight, rule(scores).weight, atol=1e-9)


RULES = {
    "top_k": lambda s: top_k(s, 1), "random_k": lambda s: random_k(s, 1), "batch_top_k": lambda s: batch_top_k(s, 1),
    "n_of_m": lambda s: n_of_m(s, 1, 1), "threshold": lambda s: threshold(s, 0), "top_p": lambda s: top_p(s, 0.5),
    "statistical_top_k": lambda s: statistical_top_k(s, 1), "sparsemax": sparsemax, "entmax15": entmax15,
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_every_rule_refuses_nan_and_no_units(rule):
    with pytest.raises(BadInput, match=r"1 of 6 are NaN, the first at \[1, 2\]"):
        rule(torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, NAN]]))
    for shape in ((), (3, 0)):
        with pytest.raises(BadInput, match="no units"):
            rule(torch.zeros(shape))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_rules_do_not_change_scores_or_the_order_of_units(rule):
    scores = torch.rand(4, 12)
    before, order = scores.clone(), torch.randperm(12)
    mask = rule(scores).mask
    assert torch.equal(scores, before)
    if rule not in (RULES["random_k"], RULES["n_of_m"]):
        assert torch.equal(rule(scores[:, order]).mask, mask[:, order])


@pytest.mark.parametrize(("call", "words"), [
    (lambda: top_k(torch.ones(3), 0), r"k=0 must be in 1\.\.3"), (lambda: top_k(torch.ones(3), 4), r"k=4 must be in 1\.\.3"),
    (lambda: random_k(torch.ones(3), 4), "k=4"), (lambda: batch_top_k(torch.ones(2, 3), 3.5), "k=3.5"),
    (lambda: n_of_m(torch.ones(8), 5, 4), "5:4"), (lambda: n_of_m(torch.ones(7), 2, 4), "7 units do not divide"),
    (lambda: n_of_m(torch.ones(8), 1, 0), "1:0"), (lambda: top_p(torch.ones(3), 0.0), "p=0.0"), (lambda: top_p(torch.ones(3), 1.1), "p=1.1"),
    (lambda: top_p(-torch.ones(3), 0.5), "softmax or relu"), (lambda: statistical_top_k(torch.ones(3), 3), "use top_k"),
    (lambda: kept(0.0, 5), "budget=0.0"), (lambda: kept(1.01, 5), "budget=1.01"), (lambda: kept(NAN, 5), "budget=nan"),
])
def test_arguments_out_of_range_are_named(call, words):
    with pytest.raises(BadInput, match=words):
        call()


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-6, 1), st.integers(1, 10_000))
def test_kept_is_nearest_and_at_least_one(budget, n):
    assert 1 <= kept(budget, n) <= n
    assert abs(kept(budget, n) - budget * n) <= max(0.5, 1 - budget * n) + 1e-9


@pytest.mark.parametrize(("value", "kind"), [(NAN, "a NaN"), (INF, "a inf"), (-INF, "a inf")])
def test_check_finite_says_what_and_where(value, kind):
    x = torch.zeros(2, 3, 4)
    x[1, 2, 3] = value
    with pytest.raises(BadInput, match=rf"query: 1 of 24 values are NaN or inf, the first {kind} at \[1, 2, 3\]"):
        check_finite(x, "query")
    check_finite(torch.zeros(0, 3), "nothing")
    check_finite(torch.arange(3), "whole numbers")


def test_check_scores_takes_infinities():
    check_scores(torch.tensor([INF, -INF, 0.0]))
    assert np.isinf(torch.tensor([INF]).numpy()).all()
