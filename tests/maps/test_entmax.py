"""alpha-entmax against the package of its authors, halving in float64, quadratic programming, and its own limits."""

import sys

import entmax as peer
import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.autograd import gradcheck, gradgradcheck

import rarefy
from rarefy import maps


def rows(*shape, seed=0, scale=3.0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


def halved(z, alpha):
    """p = [(a - 1) z - tau]_+ ^ (1 / (a - 1)), tau by halving."""
    z = (alpha - 1) * z
    low, high = z.amax(-1, keepdim=True) - 1, z.amax(-1, keepdim=True)
    for _ in range(200):
        tau = (low + high) / 2
        over = ((z - tau).clamp_min(0) ** (1 / (alpha - 1))).sum(-1, keepdim=True) >= 1
        low, high = torch.where(over, tau, low), torch.where(over, high, tau)
    return (z - low).clamp_min(0) ** (1 / (alpha - 1))


@pytest.mark.parametrize("alpha", [1.01, 1.1, 1.3, 1.5, 1.9, 2.0, 2.5, 4.0])
@pytest.mark.parametrize("n", [1, 2, 37, 300])
def test_entmax_by_halving(alpha, n):
    z = rows(3, 5, n)
    got = maps.entmax(z, alpha)
    torch.testing.assert_close(got, halved(z, alpha), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(got.sum(-1), torch.ones(3, 5, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("ours", "theirs"), [(maps.sparsemax, peer.sparsemax), (maps.entmax15, peer.entmax15)])
def test_exact_maps_equal_the_peer_with_gradients(ours, theirs):
    z, weight = rows(4, 6, 50), rows(4, 6, 50, seed=1)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    (ours(a) * weight).sum().backward()
    (theirs(b) * weight).sum().backward()
    torch.testing.assert_close(ours(z), theirs(z), rtol=0, atol=1e-13)
    torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)


def test_sparsemax_is_the_nearest_point_of_the_simplex():
    z = rows(6, seed=3, scale=1.0)
    found = minimize(
        lambda p: ((p - z.numpy()) ** 2).sum(), np.full(6, 1 / 6), jac=lambda p: 2 * (p - z.numpy()), bounds=[(0, 1)] * 6,
        constraints={"type": "eq", "fun": lambda p: p.sum() - 1}, method="SLSQP", options={"ftol": 1e-15})
    torch.testing.assert_close(maps.sparsemax(z), torch.from_numpy(found.x), rtol=0, atol=1e-7)


def test_alpha_one_is_softmax_and_its_neighbourhood_is_near():
    z = rows(20, 30)
    torch.testing.assert_close(maps.entmax(z, 1.0), z.softmax(-1), rtol=1e-13, atol=1e-16)
    for alpha, bound in ((1 + 1e-8, 1e-6), (1 + 1e-5, 1e-3)):
        assert (maps.entmax(z, alpha) - z.softmax(-1)).abs().max() < bound
    assert (maps.entmax(z, 1 + 1e-4) - maps.entmax(z, 1 + 2e-4)).abs().max() > 1e-6


@pytest.mark.parametrize("alpha", [1.0, 1.0005, 1.2, 1.5, 2.0, 3.0])
def test_gradient_in_scores(alpha):
    z = rows(2, 3, 9).requires_grad_()
    assert gradcheck(lambda z: maps.entmax(z, alpha), (z,))


def test_gradient_in_alpha_with_an_alpha_for_each_head():
    z = rows(2, 3, 4, 9).requires_grad_()
    alpha = torch.tensor([1.0005, 1.4, 1.9], dtype=torch.float64).view(3, 1, 1).requires_grad_()
    assert gradcheck(maps.entmax, (z, alpha))
    torch.testing.assert_close(maps.entmax(z, alpha)[:, 1], maps.entmax(z[:, 1], 1.4))


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_long_rows_look_at_few_scores_and_give_the_same(alpha):
    z = rows(4, 5000, scale=1.0)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    weight = rows(4, 5000, seed=2)
    (maps.entmax(a, alpha) * weight).sum().backward()
    (peer.entmax_bisect(b, alpha, n_iter=100) * weight).sum().backward()
    torch.testing.assert_close(maps.entmax(z, alpha), halved(z, alpha), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9)


def test_masked_rows_ties_and_dims():
    z = rows(3, 6)
    z[0, 2:] = -torch.inf
    z[1] = -torch.inf
    z[2] = 1.0
    for f in (maps.softmax, maps.sparsemax, maps.entmax15, lambda z: maps.entmax(z, 1.2)):
        p = f(z)
        assert p[0, 2:].eq(0).all() and p[0].sum() == pytest.approx(1)
        assert p[1].eq(0).all(), "a row without keys weighs nothing"
        torch.testing.assert_close(p[2], torch.full((6,), 1 / 6, dtype=torch.float64), rtol=0, atol=1e-14)
    y = rows(3, 4, 5)
    for dim in (0, 1, 2, -2, -3):
        torch.testing.assert_close(maps.entmax(y, 1.5, dim), maps.entmax(y.movedim(dim, -1)).movedim(-1, dim))


def test_gradient_of_masked_rows_is_finite():
    z = rows(3, 200)
    z[0, 5:] = -torch.inf
    z[1] = -torch.inf
    z.requires_grad_()
    (maps.entmax(z, 1.5) * rows(3, 200, seed=1)).sum().backward()
    assert z.grad.isfinite().all() and z.grad[1].eq(0).all() and z.grad[0, 5:].eq(0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("f", [maps.softmax, maps.sparsemax, maps.entmax15, maps.relu, maps.sigmoid, lambda z: maps.soft_top_k(z, 2),
                               lambda z: maps.statistical_top_k(z, 2)])
def test_nan_and_inf_are_refused_by_place(f, bad):
    z = rows(2, 3, 5)
    z[1, 2, 0] = bad
    with pytest.raises(rarefy.BadInput, match=r"1 of 6 rows .* \[1, 2\]"):
        f(z)


def test_bad_alphas_and_shapes_are_named():
    z = rows(2, 5)
    for alpha in (0.5, float("nan"), torch.tensor([1.5, 0.9]).view(2, 1)):
        with pytest.raises(rarefy.BadInput, match="alpha"):
            maps.entmax(z, alpha)
    with pytest.raises(rarefy.BadInput, match="size 1 along dim"):
        maps.entmax(z, torch.ones(5))
    with pytest.raises(rarefy.BadInput, match="nothing to give weight"):
        maps.entmax(z[:, :0])
    with pytest.raises(rarefy.BadInput, match="floating point"):
        maps.entmax(torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_worked_in_float32(dtype):
    """The peer's rows sum to 0.995 to 1.06 in bfloat16; ours are the float32 map, rounded once."""
    z = rows(8, 1000, dtype=torch.float32).to(dtype)
    for alpha in (1.3, 1.5, 2.0):
        got = maps.entmax(z, alpha)
        assert got.dtype == dtype
        torch.testing.assert_close(got, maps.entmax(z.float(), alpha).to(dtype), rtol=0, atol=0)


def test_losses():
    z, y = rows(5, 7).requires_grad_(), torch.tensor([0, 3, 6, 2, 2])
    assert gradcheck(lambda z: maps.sparsemax_loss(z, y), (z,)) and gradcheck(lambda z: maps.entmax_loss(z, y, 1.5), (z,))
    torch.testing.assert_close(maps.entmax_loss(z, y, 1.0), torch.nn.functional.cross_entropy(z, y, reduction="none"))
    torch.testing.assert_close(maps.sparsemax_loss(z, y), peer.sparsemax_loss(z, y))
    torch.testing.assert_close(maps.entmax_loss(z, y), peer.entmax15_loss(z, y))
    with pytest.raises(rarefy.BadInput, match="0..9|classes"):
        maps.entmax_loss(z, y + 5)


@pytest.mark.parametrize("alpha", [1.0, 1.0005, 1.3, 1.5, 2.0, 3.0])
def test_the_path_of_other_devices_gives_the_same(alpha, monkeypatch):
    """Compiled rows on the CPU, plain torch elsewhere."""
    module = sys.modules["rarefy.maps.entmax"]

    z, weight = rows(4, 600, scale=1.5), rows(4, 600, seed=1)
    z[1, 300:] = -torch.inf
    z[2] = -torch.inf
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    compiled = maps.entmax(a, alpha)
    (compiled * weight).sum().backward()
    monkeypatch.setattr(module, "available", lambda x: False)
    torch.testing.assert_close(maps.entmax(z, alpha), compiled, rtol=1e-9, atol=1e-12)
    (maps.entmax(b, alpha) * weight).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)
    single = z.float()
    here = maps.entmax(single, alpha)
    monkeypatch.undo()
    torch.testing.assert_close(maps.entmax(single, alpha), here, rtol=1e-4, atol=1e-6)


def test_near_alpha_one_float64_keeps_its_digits():
    """To first order in e = alpha - 1, log p is u - e u^2 / 2, u = log softmax, moved so that the sum stays one."""
    z = rows(4, 60)
    for e in (1e-7, 1e-9):
        u = torch.log_softmax(z, -1)
        first = u.exp() * (1 - e * (u.square() - (u.exp() * u.square()).sum(-1, keepdim=True)) / 2)
        torch.testing.assert_close(maps.entmax(z, 1 + e), first, rtol=0, atol=1e-3 * e + 1e-15)
        first_class = torch.zeros(4, dtype=torch.long)
        expected = torch.nn.functional.cross_entropy(z, first_class, reduction="none").float()
        torch.testing.assert_close(maps.entmax_loss(z.float(), first_class, 1 + 100 * e), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0, 3.0])
def test_second_derivatives(alpha):
    """Also where weights are zero and rows are masked, and of the loss, whose first derivative is p - y."""
    z = rows(3, 5, scale=1.0).requires_grad_()
    assert gradgradcheck(lambda x: maps.entmax(x, alpha), z)
    target = torch.tensor([0, 2, 4])
    assert gradgradcheck(lambda x: maps.entmax_loss(x, target, alpha), z)
    if alpha > 1:
        alphas = torch.tensor([[alpha], [1.2], [2.5]], dtype=torch.float64, requires_grad=True)
        assert gradgradcheck(maps.entmax, (z, alphas))
    masked = z.detach().masked_fill(torch.tensor([0, 0, 1, 0, 0], dtype=torch.bool), -torch.inf).requires_grad_()
    (first,) = torch.autograd.grad((maps.entmax(masked, alpha) * torch.arange(5.0)).sum(), masked, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), masked)[0].isfinite().all()


@pytest.mark.parametrize("compiled", [True, False])
def test_one_row_without_leading_dims_and_no_rows(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(sys.modules["rarefy.maps.entmax"], "available", lambda x: False)
    z = rows(300, scale=20.0)
    for alpha in (1.5, 2.0):
        torch.testing.assert_close(maps.entmax(z, alpha), halved(z, alpha), rtol=1e-9, atol=1e-10)
    assert maps.entmax(torch.zeros(0, 200), torch.full((0, 1), 1.5)).shape == (0, 200)
    assert maps.entmax(torch.zeros(3, 200, 0), torch.full((1, 1, 0), 1.5), dim=1).shape == (3, 200, 0)
