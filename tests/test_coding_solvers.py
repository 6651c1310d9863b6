"""Solvers of sparse coding against scikit-learn, optimality conditions and brute force over supports.

Shape letters: B = rows, D = width, F = atoms, K = atoms taken.
"""

import itertools

import pytest
import torch

from rarefy.errors import BadInput, Unsupported
from rarefy.latents.coding.coordinate import coordinate_descent
from rarefy.latents.coding.ista import fista, lipschitz, relative_gap
from rarefy.latents.coding.omp import OMP
from rarefy.latents.coding.penalty import PENALTIES, proximal
from rarefy.latents.coding.pursuit import pursuit
from rarefy.latents.coding.resolve import resolved
from rarefy.latents.coding.sparse_coding import SparseCoding
from rarefy.latents.coding.support import positive_solve, settle
from rarefy.latents.topk import TopK


def problem(b=7, d=12, f=20, seed=0):
    """Rows and atoms, in float64; atoms of unequal length."""
    g = torch.Generator().manual_seed(seed)
    atoms = torch.nn.functional.normalize(torch.randn(f, d, generator=g, dtype=torch.float64), dim=-1)
    return 2 * torch.randn(b, d, generator=g, dtype=torch.float64), atoms * (0.6 + torch.rand(f, 1, generator=g, dtype=torch.float64))


def ista(*args, **kw):
    return fista(*args, accelerate=False, **kw)


SOLVERS = [fista, ista, coordinate_descent]


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("solver", SOLVERS, ids=["fista", "ista", "coordinate"])
def test_the_lasso_is_scikit_learns(solver, positive):
    """Its objective is (1 / 2D) ||x - z D||^2 + alpha ||z||_1."""
    model = pytest.importorskip("sklearn.linear_model")
    x, atoms = problem()
    got = solver(x, atoms, 0.7, positive=positive, tolerance=1e-12, most=50_000)
    assert got.left.max() <= 1e-12 and got.steps.max() < 50_000
    for row, codes in zip(x, got.codes, strict=True):
        oracle = model.Lasso(alpha=0.7 / x.shape[1], fit_intercept=False, positive=positive, tol=1e-13, max_iter=100_000)
        want = torch.from_numpy(oracle.fit(atoms.T.numpy(), row.numpy()).coef_)
        torch.testing.assert_close(codes, want, atol=2e-5, rtol=0)
        assert torch.equal(codes.abs() > 1e-4, want.abs() > 1e-4)


@pytest.mark.parametrize("positive", [False, True])
def test_settled_codes_meet_the_optimality_conditions_to_rounding(positive):
    x, atoms = problem(200)
    near = fista(x, atoms, 0.7, positive=positive, tolerance=1e-3)
    codes, exact = settle(x, atoms, near.codes, 0.7, positive)
    assert exact.all() and (codes != near.codes).any()
    pull = (x - codes @ atoms) @ atoms.T
    on = codes != 0
    assert (pull[on] - 0.7 * codes[on].sign()).abs().max() < 1e-12
    assert ((pull if positive else pull.abs())[~on] <= 0.7 + 1e-10).all()
    assert not positive or (codes >= 0).all()
    assert relative_gap(x, atoms, codes, 0.7, positive).abs().max() < 1e-14


def test_settling_mends_a_wrong_support():
    x, atoms = problem(50)
    right = settle(x, atoms, fista(x, atoms, 0.7, tolerance=1e-9).codes, 0.7, False)[0]
    wrong = right.clone()
    wrong[:, 0] += 0.1                                      # one atom too many (or of the wrong strength)
    wrong.scatter_(1, right.abs().argmax(1, keepdim=True), 0.0)     # and one too few
    codes, exact = settle(x, atoms, wrong, 0.7, False)
    assert exact.all()
    torch.testing.assert_close(codes, right, atol=1e-10, rtol=0)


def test_the_duality_gap_bounds_how_far_the_objective_is_from_its_least():
    x, atoms = problem(20)
    best = settle(x, atoms, fista(x, atoms, 0.7).codes, 0.7, False)[0]
    value = lambda z: (x - z @ atoms).square().sum(-1) / 2 + 0.7 * z.abs().sum(-1)
    for most in (1, 5, 20):
        got = fista(x, atoms, 0.7, most=most, tolerance=0.0)
        over = (value(got.codes) - value(best)) / (x.square().sum(-1) / 2)
        assert (over >= -1e-12).all() and (over <= got.left + 1e-12).all() and (got.left > 0).all()


def test_ista_never_rises_and_fista_is_faster():
    x, atoms = problem(40, 10, 40)
    value = lambda z: (x - z @ atoms).square().sum(-1) / 2 + 0.2 * z.abs().sum(-1)
    z, before = torch.zeros(40, 40, dtype=torch.float64), torch.full((40,), torch.inf, dtype=torch.float64)
    for _ in range(30):
        z = ista(x, atoms, 0.2, start=z, most=1, tolerance=0.0).codes
        assert (value(z) <= before + 1e-12).all()
        before = value(z)
    kw = {"tolerance": 1e-8, "most": 20_000}
    assert fista(x, atoms, 0.2, **kw).steps.double().mean() < 0.5 * ista(x, atoms, 0.2, **kw).steps.double().mean()


@pytest.mark.parametrize("solver", SOLVERS, ids=["fista", "ista", "coordinate"])
def test_a_warm_start_at_the_solution_takes_no_step_and_a_row_does_not_see_its_neighbours(solver):
    x, atoms = problem(30)
    cold = solver(x, atoms, 0.7, tolerance=1e-9, most=20_000)
    warm = solver(x, atoms, 0.7, start=cold.codes, tolerance=1e-9, most=20_000)
    assert cold.steps.min() > 0 and warm.steps.max() == 0 and torch.equal(warm.codes, cold.codes)
    alone = solver(x[3:4], atoms, 0.7, tolerance=1e-9, most=20_000)
    torch.testing.assert_close(alone.codes[0], cold.codes[3], atol=1e-13, rtol=0)
    assert alone.steps[0] == cold.steps[3]


def test_the_step_is_that_of_the_spectral_norm():
    for shape in ((5, 9), (9, 5)):
        atoms = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        assert lipschitz(atoms) == pytest.approx(float(torch.linalg.svdvals(atoms)[0] ** 2), rel=1e-12)


def test_nonnegative_least_squares_by_every_subset():
    g = torch.Generator().manual_seed(2)
    a, y = torch.randn(40, 6, 9, generator=g, dtype=torch.float64), torch.randn(40, 9, generator=g, dtype=torch.float64)
    gram, b = a @ a.mT, (a @ y[:, :, None])[:, :, 0]
    allowed = torch.rand(40, 6, generator=g) > 0.2
    got, found = positive_solve(gram, b, torch.rand(40, 6, generator=g, dtype=torch.float64), allowed)
    assert found.all() and (got >= 0).all() and not got[~allowed].any()
    for row in range(40):
        best = 0.0
        for size in range(1, 7):
            for subset in itertools.combinations(range(6), size):
                s = list(subset)
                z = torch.linalg.solve(gram[row][s][:, s], b[row][s])
                if (z >= 0).all() and allowed[row][s].all():
                    best = min(best, float(z @ gram[row][s][:, s] @ z / 2 - b[row][s] @ z))
        assert float(got[row] @ gram[row] @ got[row] / 2 - b[row] @ got[row]) == pytest.approx(best, abs=1e-12)


# ---------------------------------------------------------------------------------------------------- pursuits


def test_orthogonal_pursuit_is_scikit_learns():
    model = pytest.importorskip("sklearn.linear_model")
    x, atoms = problem(30)
    unit = torch.nn.functional.normalize(atoms, dim=-1)
    value, index = pursuit(x, unit, 5)
    want = torch.from_numpy(model.orthogonal_mp(unit.T.numpy(), x.T.numpy(), n_nonzero_coefs=5)).T
    torch.testing.assert_close(torch.zeros_like(want).scatter(1, index, value), want)
    longer, same = pursuit(x, atoms, 5)                     # lengths do not change the choice, only the codes
    assert torch.equal(index, same)
    torch.testing.assert_close(longer * atoms.norm(dim=-1)[same], value)


def test_nonnegative_pursuit_is_a_loop_over_scipys_nnls():
    optimize = pytest.importorskip("scipy.optimize")
    x, atoms = problem(25)
    value, index = pursuit(x, atoms, 6, positive=True)
    unit = torch.nn.functional.normalize(atoms, dim=-1)
    for row, codes, order in zip(x, value, index, strict=True):
        taken, left = [], row
        for _ in range(6):
            pull = unit @ left
            pull[taken] = -torch.inf
            if pull.max() <= 1e-10:
                break
            taken.append(int(pull.argmax()))
            z = torch.from_numpy(optimize.nnls(atoms[taken].T.numpy(), row.numpy())[0])
            left = row - z @ atoms[taken]
        assert order[: len(taken)].tolist() == taken
        torch.testing.assert_close(codes[: len(taken)], z, atol=1e-10, rtol=0)
        assert not codes[len(taken) :].any()


def test_gradient_pursuit_is_a_loop():
    x, atoms = problem(9)
    for positive in (False, True):
        value, index = pursuit(x, atoms, 4, by="gradient", positive=positive)
        for row, codes, order in zip(x, value, index, strict=True):
            z, on = torch.zeros(len(atoms), dtype=torch.float64), []
            for _ in range(4):
                pull = atoms @ (row - z @ atoms)
                score = pull / atoms.norm(dim=-1)
                score = score if positive else score.abs()
                score[on] = -torch.inf
                on.append(int(score.argmax()))
                way = torch.zeros_like(z)
                way[on] = pull[on]
                if positive:
                    way[(z <= 0) & (way < 0)] = 0
                far = (row - z @ atoms) @ (way @ atoms) / (way @ atoms).square().sum()
                z = z + far * way
                z = z.clamp_min(0) if positive else z
            assert order.tolist() == on
            torch.testing.assert_close(codes, z[on])


def test_pursuit_stops_at_what_it_has_explained():
    _, atoms = problem()
    value, index = pursuit(3 * atoms[4:6], atoms, 5)
    assert index[:, 0].tolist() == [4, 5] and not value[:, 1:].any()
    assert all(len(set(row)) == 5 for row in index.tolist())
    torch.testing.assert_close(value[:, 0], torch.full((2,), 3.0, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------- refusals


def test_refusals():
    x, atoms = problem()
    for call, word in [
        (lambda: fista(x, atoms[:, :3], 1.0), r"\[7, 12\]"), (lambda: fista(x, atoms, -1.0), "weight"),
        (lambda: fista(x * torch.nan, atoms, 1.0), "NaN"),
        (lambda: fista(x, atoms, 1.0, penalty="ridge"), "ridge"), (lambda: fista(x, atoms, 1.0, start=x), "start"),
        (lambda: pursuit(x, atoms, 13), "k=13"), (lambda: pursuit(x, atoms, 2, by="luck"), "luck"),
        (lambda: coordinate_descent(x, atoms, 1.0, most=0), "most"), (lambda: proximal("soft", x, -1.0, 1.0), "step"),
        (lambda: resolved(TopK(12, 20, k=3), "magic"), "magic"), (lambda: resolved(TopK(12, 20, k=3), "lasso"), "weight"),
    ]:
        with pytest.raises(BadInput, match=word):
            call()
    with pytest.raises(Unsupported, match="reproduce"):
        resolved(TopK(12, 20, k=3, d_out=12))


# ---------------------------------------------------------------------------------------------------- dictionaries


@pytest.mark.parametrize("name", PENALTIES)
def test_the_objective_of_training_is_least_in_the_codes(name):
    """The loss is the objective a channel, twice; small changes of a code on its support never lower it."""
    x, _ = problem(20, 12, 1)
    method = SparseCoding(12, 20, weight=0.5, penalty=name, tolerance=1e-9, most=4000).double()
    method.initialise(x)
    rows, atoms = (t.detach() for t in method.problem(x))
    z = method.select(x).dense.detach()
    value = lambda z: (rows - z @ atoms).square().sum(-1) / 2 + PENALTIES[name].value(z.abs(), 0.5).sum(-1)
    assert float(method.loss(x, x).total.detach()) == pytest.approx(float(2 / 12 * value(z).mean()), rel=1e-12)
    g = torch.Generator().manual_seed(4)
    for _ in range(20):
        other = z + 1e-3 * torch.randn(z.shape, generator=g, dtype=torch.float64) * (z != 0)
        assert (value(other) >= value(z) - 1e-12).all()


def test_settings_of_sparse_coding_matter():
    x, _ = problem(30, 12, 1)
    made = {}
    for key, kw in {"plain": {}, "signed": {"positive_codes": False}, "coordinate": {"solver": "coordinate"}, "ista": {"solver": "ista"}}.items():
        method = SparseCoding(12, 20, tolerance=1e-9, most=20_000, **kw).double()
        method.initialise(x)
        made[key] = method.select(x).dense
    for key in ("coordinate", "ista"):
        torch.testing.assert_close(made[key], made["plain"], atol=1e-10, rtol=0)
    assert (made["plain"] >= 0).all() and (made["signed"] < 0).any()


def test_resolving_keeps_directions_and_lowers_the_error():
    """On rows made of k atoms each, codes solved for beat one product and a sort."""
    g = torch.Generator().manual_seed(5)
    method = TopK(16, 32, k=4).double()
    atoms = method.W_dec_FD.detach().clone()
    x = torch.zeros(100, 32, dtype=torch.float64).scatter(1, torch.rand(100, 32, generator=g).topk(4).indices, 1.0) @ atoms
    with torch.no_grad():
        method.W_dec_FD.mul_(1.5)                           # a decoder of free length
        method.W_enc_FD.div_(1.5)
    before = (method(x) - x).square().sum()
    for by, kw in (("gradient", {}), ("orthogonal", {}), ("lasso", {"weight": 0.05})):
        other = resolved(method, by, **kw)
        assert (other(x) - x).square().sum() < 0.5 * before
        torch.testing.assert_close(other.W_dec_FD, atoms)
    assert isinstance(other, SparseCoding) and resolved(method).k == 4 and isinstance(resolved(method, k=7), OMP)
    assert resolved(method, k=7).k == 7
