"""LASSO source selection and sparse primal-dual CCA on planted tasks and views.

Shape letters: M = sources, N = samples, D = width, K = width of a representation.
"""

import pytest
import torch

from rarefy.errors import BadInput
from rarefy.latents.coding.cca import solve, sparse_cca
from rarefy.latents.coding.source_selection import relevance, representation, select_sources, shares


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def world(seed, d=20, k=4, sources=12, support=2, noise=0.5):
    """(B, heads, the target's head, the sources it is made of, draw)."""
    g = seeded(seed)
    basis = torch.linalg.qr(torch.randn(d, k, generator=g, dtype=torch.float64))[0]
    heads = torch.nn.functional.normalize(torch.randn(sources, k, generator=g, dtype=torch.float64), dim=-1)
    at = torch.randperm(sources, generator=g)[:support]
    target = heads[at].sum(0)

    def draw(head, n):
        x = torch.randn(n, d, generator=g, dtype=torch.float64)
        return x, x @ basis @ head + noise * torch.randn(n, generator=g, dtype=torch.float64)

    return basis, heads, target, at, draw


# ---------------------------------------------------------------------------------------------------- source selection


def test_relevance_is_scikit_learns_lasso_and_finds_the_planted_sources():
    model = pytest.importorskip("sklearn.linear_model")
    g = seeded(0)
    heads = torch.nn.functional.normalize(torch.randn(30, 16, generator=g, dtype=torch.float64), dim=-1)
    target = 1.0 * heads[3] - 0.7 * heads[11] + 0.8 * heads[20]
    got = relevance(heads, target, 0.05)
    oracle = model.Lasso(alpha=0.05 / 16, fit_intercept=False, tol=1e-13, max_iter=100_000).fit(heads.T.numpy(), target.numpy())
    torch.testing.assert_close(got, torch.from_numpy(oracle.coef_), atol=1e-5, rtol=0)
    assert got.abs().topk(3).indices.sort().values.tolist() == [3, 11, 20] and (got != 0).sum() < 10
    dense = relevance(heads, target)                        # the L2 rule: exact, of least norm, and spread over all
    torch.testing.assert_close(dense @ heads, target)
    assert (dense.abs() > 1e-6).sum() == 30 and dense.norm() < got.norm() + 1


def test_shares_add_up_and_follow_the_scores():
    assert shares(torch.tensor([3.0, 1.0, 0.0]), 8) == [6, 2, 0]
    assert shares(torch.tensor([3.0, 1.0, 0.0]), 11, least=1) == [7, 3, 1]
    assert shares(torch.zeros(3), 7) == [3, 2, 2]
    for seed in range(10):
        score = torch.rand(7, generator=seeded(seed))
        got = shares(score, 100)
        assert sum(got) == 100 and max(abs(a - 100 * b) for a, b in zip(got, (score / score.sum()).tolist(), strict=True)) < 1


def test_the_representation_is_found_and_is_a_stationary_point():
    basis, heads, _, _, draw = world(1, noise=0.3)
    tasks = [draw(head, 60) for head in heads]
    got, weights = representation(tasks, 4, steps=200)
    torch.testing.assert_close(got.T @ got, torch.eye(4, dtype=torch.float64))
    assert float(torch.linalg.svdvals(basis.T @ got).min()) > 0.98
    b = got.clone().requires_grad_()
    loss = sum((x @ b @ w - y).square().sum() for (x, y), w in zip(tasks, weights, strict=True))
    slope = torch.autograd.grad(loss, b)[0]
    assert slope.abs().max() < 1e-2 * sum((y @ y) for _, y in tasks) / len(tasks)


def test_rounds_draw_the_whole_budget_and_turn_to_the_relevant_sources():
    _, heads, target, at, draw = world(2)
    got = select_sources(lambda m, n: draw(heads[m], n), 12, draw(target, 60), 4, [360, 360, 361], weight=0.1, least=3)
    assert sum(got.samples) == 1081 and min(got.samples) >= 30 + 6
    assert sum(got.samples[i] for i in at) / 1081 > 0.3 > 1.5 * 2 / 12


@pytest.mark.slow
def test_the_lasso_leaves_less_error_in_the_target_than_the_l2_rule_and_even_shares():
    """At equal budgets, means over 20 worlds."""
    error = {"lasso": 0.0, "l2": 0.0, "even": 0.0}
    for seed in range(20):
        for name, budgets, weight in (("lasso", [600] * 3, 0.1), ("l2", [600] * 3, None), ("even", [1800], None)):
            basis, heads, target, _, draw = world(seed, d=30, k=5, sources=20)
            few = draw(target, 40)
            got = select_sources(lambda m, n: draw(heads[m], n), 20, few, 5, budgets, weight=weight, least=2)  # noqa: B023
            error[name] += float((basis @ target - got.basis @ got.target).square().sum())
    assert error["lasso"] < 0.95 * error["l2"] < 0.95 * error["even"], error


# ---------------------------------------------------------------------------------------------------- canonical correlation


def views(seed=0, n=80):
    """Two views of 24 and 30 features; two latents, each in 3 features of either view."""
    g = seeded(seed)
    x, y = (torch.randn(n, d, generator=g, dtype=torch.float64) for d in (24, 30))
    for place, strength in ((0, 2.0), (10, 1.3)):
        latent = torch.randn(n, 1, generator=g, dtype=torch.float64)
        x[:, place : place + 3] = strength * latent + 0.5 * x[:, place : place + 3]
        y[:, place : place + 3] = strength * latent + 0.5 * y[:, place : place + 3]
    x, y = x - x.mean(0), y - y.mean(0)
    return x, y, y @ y.T


@pytest.mark.parametrize(("n", "gamma", "at_the_bound"), [(30, 400.0, False), (12, 40.0, True)])
def test_the_optimality_conditions_hold_for_every_index(n, gamma, at_the_bound):
    x, _, kernel = views(n=n)
    mu = 60.0
    w, e = solve(x, kernel, mu, gamma, torch.arange(n), most=5000, tolerance=1e-12)
    r = w @ x.T - e @ kernel.T
    slope_w, slope_e = 2 * r @ x, -2 * r @ kernel
    on = w != 0
    assert on.any() and (~on).any()
    assert (slope_w + mu * w.sign())[on].abs().max() < 1e-5 and slope_w[~on].abs().max() <= mu + 1e-5
    free = ~torch.eye(n, dtype=torch.bool)
    inside = free & (e != 0) & (e.abs() < 1)
    assert inside.any() and (slope_e + gamma * e.sign())[inside].abs().max() < 1e-5
    assert slope_e[free & (e == 0)].abs().max() <= gamma + 1e-5
    bound = free & (e.abs() == 1)
    assert bool(bound.any()) == at_the_bound
    assert ((slope_e + gamma * e.sign()) * e)[bound].le(1e-5).all()
    assert (e.diagonal() == 1).all() and e.abs().max() == 1


def test_shared_directions_are_found_one_after_another():
    x, y, kernel = views()
    first, second = sparse_cca(x, kernel, mu=400.0, gamma=10_000.0, pairs=2, indices=20)
    for pair, place in ((first, 0), (second, 10)):
        on = set((pair.w.abs() > 0.1 * pair.w.abs().max()).nonzero().flatten().tolist())
        assert on and on <= {place, place + 1, place + 2}
        assert pair.correlation > 0.8 and pair.e[pair.index] == 1
    dense = torch.linalg.svdvals(torch.linalg.qr(x)[0].T @ torch.linalg.qr(y)[0])[0]
    assert first.correlation > float(dense) - 0.1
    assert first.correlation == pytest.approx(abs(float(torch.corrcoef(torch.stack((x @ first.w, kernel @ first.e)))[0, 1])))


def test_too_dear_a_penalty_finds_nothing():
    x, _, kernel = views(n=8)
    assert sparse_cca(x, kernel, mu=1e9, gamma=1.0) == []


def test_refusals():
    x, _, kernel = views(n=10)
    for call, word in [
        (lambda: relevance(x, x[0, :3]), "target"), (lambda: relevance(x, x[0], -1.0), "weight"), (lambda: shares(torch.ones(4), 3, 1), "budget=3"),
        (lambda: representation([(x, x[:, 0])], 4), "k=4"), (lambda: sparse_cca(x, kernel[:3], 1.0, 1.0), "kernel"),
        (lambda: sparse_cca(x, kernel, -1.0, 1.0), "mu"), (lambda: solve(x, kernel, 1.0, 1.0, torch.tensor([10])), "index"),
        (lambda: sparse_cca(x, kernel, 1.0, 1.0, pairs=0), "pairs"), (lambda: sparse_cca(x * torch.nan, kernel, 1.0, 1.0), "NaN"),
        (lambda: select_sources(lambda m, n: (x, x[:, 0]), 3, (x, x[:, 0]), 2, []), "budgets"),
        (lambda: select_sources(lambda m, n: (x, x[:, 0]), 3, (x, x[:, 0]), 2, [6]), "source 0"),
    ]:
        with pytest.raises(BadInput, match=word):
            call()
