"""CRATE's parts against the formulas written out, autograd, scikit-learn and the proximal solver.

Shape letters: B = sequences, T = tokens, D = width, K = heads, P = width of a head.
"""

import pytest
import torch

from rarefy.errors import BadInput
from rarefy.latents.coding.crate import ISTA, MSSA, Crate, coding_rate, subspace_rate
from rarefy.latents.coding.ista import fista, lipschitz
from rarefy.latents.coding.penalty import proximal


def tokens(b=2, t=5, d=8, seed=0):
    return torch.randn(b, t, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5, 8), (9, 4), (1, 3), (4, 1)])
def test_the_coding_rate_is_its_definition_whichever_gram_matrix_is_smaller(shape):
    z = tokens(3, *shape)
    for one, got in zip(z, coding_rate(z, 0.3), strict=True):
        t, d = shape
        want = torch.logdet(torch.eye(d, dtype=torch.float64) + d / (t * 0.3**2) * one.T @ one) / 2
        torch.testing.assert_close(got, want)


def test_the_subspace_rate_has_the_papers_gradient():
    """grad R^c = p / (N eps^2) sum_k U_k U_k' Z (I + p / (N eps^2) (U_k' Z)' (U_k' Z))^-1, tokens as columns (eq. 5)."""
    z = tokens(1)[0].T                                      # [D, N]
    basis = torch.randn(3, 8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows = z.T.clone().requires_grad_()
    got = torch.autograd.grad(subspace_rate(rows, basis, 0.4), rows)[0].T
    n, p = z.shape[1], 2
    factor = p / (n * 0.4**2)
    want = torch.zeros_like(z)
    for u in basis:
        v = u.T @ z
        want += factor * u @ v @ torch.linalg.inv(torch.eye(n, dtype=torch.float64) + factor * v.T @ v)
    torch.testing.assert_close(got, want)


def test_tokens_in_one_subspace_cost_less_than_spread_ones():
    z = torch.nn.functional.normalize(tokens(1, 40, 8)[0], dim=-1)
    flat = torch.nn.functional.normalize(z * torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0]), dim=-1)
    assert coding_rate(flat) < 0.7 * coding_rate(z)


def test_mssa_is_its_loop():
    block = MSSA(8, 2).double()
    z = tokens()
    for one, got in zip(z, block(z), strict=True):
        want = torch.zeros(8, 5, dtype=torch.float64)
        for u in block.basis_KDP.detach():
            v = u.T @ one.T                                 # [P, N]
            want += u @ v @ (v.T @ v / 2).softmax(0)        # sqrt(p) = 2; each column is a token's distribution
        torch.testing.assert_close(got, want.T)


def test_the_ista_block_is_one_reference_proximal_step():
    block, x = ISTA(8, step=0.05, weight=0.2).double(), tokens()
    z = x.clone().requires_grad_()
    fit = (x - z @ block.atoms_DD.detach()).square().sum() / 2
    want = proximal("soft", z.detach() - 0.05 * torch.autograd.grad(fit, z)[0], 0.05, 0.2, positive=True)
    torch.testing.assert_close(block(x), want)
    assert (block(x) == 0).any() and (block(x) > 0).any()


def test_iterating_the_ista_block_lowers_the_lasso_and_ends_at_its_solution():
    model = pytest.importorskip("sklearn.linear_model")
    x = tokens()[0]
    block = ISTA(8, weight=0.2).double()
    atoms = block.atoms_DD.detach()
    block.step = 1 / lipschitz(atoms)
    value = lambda z: float((x - z @ atoms).square().sum() / 2 + 0.2 * z.sum())
    with torch.no_grad():
        z = block(x)
        before = value(z)
        for _ in range(3000):
            z = block(x, z)
        assert value(z) < before
        torch.testing.assert_close(z, fista(x, atoms, 0.2, positive=True, tolerance=1e-12, most=20_000).codes, atol=1e-5, rtol=0)
    for row, codes in zip(x, z, strict=True):
        oracle = model.Lasso(alpha=0.2 / 8, fit_intercept=False, positive=True, tol=1e-13, max_iter=200_000)
        want = torch.from_numpy(oracle.fit(atoms.T.numpy(), row.numpy()).coef_)
        torch.testing.assert_close(codes, want, atol=1e-4, rtol=0)


def test_a_classifier_learns_and_reports_every_layer():
    g = torch.Generator().manual_seed(2)
    y = torch.randint(2, (64,), generator=g)
    x = torch.randn(64, 4, 3, generator=g) + 2 * (y[:, None, None] - 0.5)
    model = Crate(3, 4, 2, d=8, layers=2, heads=2)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert (model(x).argmax(-1) == y).float().mean() > 0.95
    got = model.measured(x)
    assert len(got) == 2
    half, z = model.layers(x)[1]
    unit = torch.nn.functional.normalize(half, dim=-1)
    assert got[1]["subspace_rate"] == pytest.approx(float(subspace_rate(unit, model.attend[1].basis_KDP).mean().detach()))
    assert got[1]["nonzero"] == pytest.approx(float((z > 0).float().mean())) and (z >= 0).all()
    assert torch.equal(Crate(3, 4, 2, seed=5).place_TD, Crate(3, 4, 2, seed=5).place_TD)


def test_refusals():
    for call, word in [
        (lambda: MSSA(8, 3), "heads=3"), (lambda: coding_rate(torch.ones(3)), "tokens"), (lambda: coding_rate(torch.ones(3, 2), 0.0), "epsilon"),
        (lambda: Crate(3, 4, 2)(torch.ones(1, 4, 2)), r"\[1, 4, 2\]"), (lambda: Crate(3, 4, 2)(torch.full((1, 4, 3), torch.nan)), "NaN"),
        (lambda: ISTA(4, step=-1.0), "step"), (lambda: Crate(3, 0, 2), "tokens"),
    ]:
        with pytest.raises(BadInput, match=word):
            call()
