"""Structured NMF: the objective falls, its updates are the formulas written out, plain NMF is scikit-learn's, materials are found.

Shape letters: N = pixels, D = bands, F = materials.
"""

import pytest
import torch

from rarefy.errors import BadInput
from rarefy.latents.coding.nmf import Graph, neighbours, objective, structured_nmf
from rarefy.tasks.planted import assign


def scene(seed, side=20, bands=40, materials=4, noise=0.02):
    """(pixels [N, D], abundances, spectra): smooth spectra, and materials in blobs that mix at their borders."""
    g = torch.Generator().manual_seed(seed)
    band = torch.linspace(0, 1, bands, dtype=torch.float64)
    bumps = torch.rand(materials, 4, 1, generator=g, dtype=torch.float64)
    spectra = (torch.rand(materials, 4, 1, generator=g, dtype=torch.float64) * torch.exp(-((band - bumps) ** 2) / 0.02)).sum(1) + 0.1
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()
    middle = torch.rand(3 * materials, 2, generator=g, dtype=torch.float64) * side
    score = (-(torch.cdist(place, middle) ** 2) / 12).view(-1, materials, 3).logsumexp(-1)
    share = (4 * score).softmax(-1)
    share = torch.where(share > 0.05, share, 0.0)
    share = share / share.sum(-1, keepdim=True)
    x = share @ spectra
    return (x + noise * x.mean() * torch.randn(x.shape, generator=g, dtype=torch.float64)).clamp_min(0), share, spectra


def angle(found, spectra):
    """Mean spectral angle in radians under the best match."""
    cosine = torch.nn.functional.normalize(spectra, dim=-1) @ torch.nn.functional.normalize(found, dim=-1).T
    return float(cosine[torch.arange(len(spectra)), assign(cosine)].clamp(max=1).arccos().mean())


@pytest.mark.parametrize(("sparsity", "smoothness"), [(0.0, 0.0), (0.5, 0.0), (0.3, 5.0)])
def test_the_objective_never_rises_and_ends_stationary(sparsity, smoothness):
    x, _, _ = scene(0, side=6, bands=10)
    graph = neighbours(x, 4)
    got = structured_nmf(x, 3, sparsity=sparsity, smoothness=smoothness, graph=graph, steps=2500, tolerance=0.0)
    assert (got.objective.diff() <= 1e-12 * got.objective[0]).all() and got.objective[-1] < 0.5 * got.objective[0]
    torch.testing.assert_close(got.objective[-1], objective(x, got.codes, got.atoms, sparsity, smoothness, graph))
    torch.testing.assert_close(got.atoms.norm(dim=-1), torch.ones(3, dtype=torch.float64))
    assert (got.codes >= 0).all() and (got.atoms >= 0).all()
    codes = got.codes.clone().requires_grad_()
    slope = torch.autograd.grad(objective(x, codes, got.atoms, sparsity, smoothness, graph), codes)[0]
    assert (slope * got.codes).abs().max() < 2e-3 and (slope[got.codes < 1e-9] > -2e-2).all()


def test_the_graphs_part_is_the_laplacians_quadratic_form():
    x, _, _ = scene(1, side=6)
    for width in (0.0, 0.5):
        graph = neighbours(x, 3, width)
        w = torch.zeros(36, 36, dtype=torch.float64)
        w[graph.edges_2E[0], graph.edges_2E[1]] = graph.weight_E
        assert torch.equal(w, w.T) and not w.diagonal().any() and ((w > 0).sum(1) >= 3).all()
        z = torch.rand(36, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(graph.sums(z), w @ z)
        want = 1.7 / 2 * torch.trace(z.T @ (torch.diag(w.sum(1)) - w) @ z)
        empty = torch.zeros(2, 40, dtype=torch.float64)
        torch.testing.assert_close(objective(0 * x, z, empty, 0.0, 1.7, graph), want)
    near = (torch.cdist(x, x) + torch.eye(36) * 1e9).argmin(1)
    assert (w[torch.arange(36), near] > 0).all()
    torch.testing.assert_close(w[0, near[0]], torch.exp(-((x[0] - x[near[0]]).norm() / 0.5) ** 2))


def test_without_weights_it_is_scikit_learns_nmf():
    decomposition = pytest.importorskip("sklearn.decomposition")
    x, _, _ = scene(2, side=10, bands=15)
    got = structured_nmf(x, 4, steps=2000, tolerance=0.0)
    oracle = min(
        (decomposition.NMF(4, init="random", solver="mu", max_iter=2000, tol=0, random_state=i).fit(x.numpy()) for i in range(3)),
        key=lambda m: m.reconstruction_err_)
    assert float(got.objective[-1]) < 1.02 * oracle.reconstruction_err_**2 / 2


@pytest.mark.slow
def test_materials_are_found_better_than_by_plain_nmf():
    wins = []
    for seed in range(5):
        x, _, spectra = scene(seed)
        plain = structured_nmf(x, 4, steps=2000, seed=seed)
        full = structured_nmf(x, 4, sparsity=0.1, smoothness=0.1, graph=neighbours(x, 5), steps=2000, seed=seed)
        wins.append(angle(plain.atoms, spectra) - angle(full.atoms, spectra))
    assert sum(w > 0 for w in wins) >= 4 and sum(wins) / 5 > 0.02, wins


def test_refusals():
    x, _, _ = scene(3, side=4)
    for call, word in [
        (lambda: structured_nmf(-x, 3), ">= 0"), (lambda: structured_nmf(x, 0), "width"), (lambda: structured_nmf(x, 3, smoothness=1.0), "graph"),
        (lambda: structured_nmf(x, 3, sparsity=-1.0), "sparsity"), (lambda: neighbours(x, 16), "k=16"), (lambda: neighbours(x[:1], 1), "two rows"),
        (lambda: structured_nmf(x, 3, smoothness=1.0, graph=Graph(torch.tensor([[0, 99], [99, 0]]), torch.ones(2))), "row 99"),
        (lambda: structured_nmf(x / 0.0, 3), "NaN or inf"),
    ]:
        with pytest.raises(BadInput, match=word):
            call()
