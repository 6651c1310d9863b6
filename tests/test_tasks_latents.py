"""Planted kinds, and the measures of recovery, stability, dark matter, absorption and geometry on them."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import normalize

from rarefy.errors import BadInput
from rarefy.latents.batch_topk import BatchTopK
from rarefy.latents.relu import ReLU
from rarefy.latents.topk import TopK
from rarefy.tasks.codes import Codes
from rarefy.tasks.dark_matter import dark_matter
from rarefy.tasks.geometry import fvu_by, geometry, nearest_other, norm_groups
from rarefy.tasks.learned import Learned, perfect, read
from rarefy.tasks.planted import assign, recovery
from rarefy.tasks.planted_absorption import absorption
from rarefy.tasks.planted_kinds import KINDS, plant
from rarefy.tasks.recovered import cosines, feature_f1, match_blocks, subspaces, uniqueness
from rarefy.tasks.stability import stability


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def truth(kind, n=4000, d=16, features=32, l0=3.0, **more):
    return plant(kind, n, d, features, l0, **more)


def perfect_of(t):
    return perfect(t.codes, t.dictionary)


# ------------------------------------------------------------------------------------------------------ planted kinds


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_codes_times_unit_directions_plus_noise_of_the_size_said(kind):
    t = truth(kind)
    torch.testing.assert_close(t.dictionary.norm(dim=1), torch.ones(32))
    naive = torch.stack([sum(c * f for c, f in zip(row, t.dictionary, strict=True)) for row in t.codes[:20]])
    torch.testing.assert_close(t.signal[:20], naive, atol=1e-5, rtol=1e-5)
    ratio = (t.x - t.signal).square().mean().sqrt() / t.signal.square().mean().sqrt()
    assert float(ratio) == pytest.approx(KINDS[kind].noise, rel=0.02)
    assert (t.codes < 0).any() == (kind in ("antipodal", "circles"))


@pytest.mark.parametrize("kind", KINDS)
def test_mean_l0_is_the_one_asked(kind):
    t = truth(kind, n=20_000)
    assert float((t.codes != 0).sum(1).float().mean()) == pytest.approx(3.0, rel=0.03)
    assert torch.equal(truth(kind, n=50).x, truth(kind, n=50).x) and not torch.equal(truth(kind, n=50).x, truth(kind, n=50, seed=1).x)


def test_l0_varies_by_row_only_where_it_is_said_to():
    spread = {kind: (truth(kind, n=20_000).codes != 0).sum(1).double().var() for kind in ("independent", "varying")}
    assert spread["independent"] == pytest.approx(3 * (1 - 3 / 32), rel=0.05)            # binomial
    assert spread["varying"] == pytest.approx(3 + 9, rel=0.15)                            # Poisson of an exponential mean


@pytest.mark.parametrize("kind", ["hierarchical", "contained"])
def test_a_child_is_on_only_with_its_parent_and_alone_among_its_siblings(kind):
    t = truth(kind, n=20_000)
    on = t.codes != 0
    children = (t.parent >= 0).nonzero()[:, 0]
    assert len(children) == 24
    assert bool((on[:, t.parent[children]] | ~on[:, children]).all())
    together = torch.stack([on[:, t.parent == p].sum(1) for p in range(8)], 1)
    assert together.max() == 1
    assert float((together[on[:, :8]] == 0).float().mean()) == pytest.approx(0.25, abs=0.02)


def test_children_are_orthogonal_to_every_parent_and_overlap_among_themselves():
    t = truth("hierarchical")
    parents, children = t.dictionary[:8], t.dictionary[8:]
    assert float((parents @ children.T).abs().max()) < 1e-5
    gram = children @ children.T
    assert float(gram[~torch.eye(24, dtype=torch.bool)].mean()) == pytest.approx(0.5, abs=0.1)
    other = truth("contained")
    assert float((other.dictionary[:8] @ other.dictionary[8:].T).abs().max()) > 0.3


def test_circles_lie_evenly_on_rings_of_orthonormal_planes():
    t = truth("circles", n=20_000)
    pairs = t.dictionary.view(16, 2, 16)
    torch.testing.assert_close(pairs @ pairs.transpose(1, 2), torch.eye(2).expand(16, 2, 2), atol=1e-5, rtol=0)
    c = t.codes.view(-1, 2)
    c = c[c.abs().sum(1) > 0]
    assert 0.49 < c.norm(dim=1).min() and c.norm(dim=1).max() < 1.51
    assert normalize(c, dim=1).mean(0).norm() < 0.02
    assert t.on.shape == (20_000, 16) and float(t.on.float().sum(1).mean()) == pytest.approx(1.5, rel=0.03)


@pytest.mark.parametrize(("more", "named"), [
    ({"kind": "squares"}, "squares"), ({"n": 0}, "n="), ({"l0": 40.0}, "l0"), ({"noise": -1.0}, "noise"),
    ({"kind": "contained", "features": 30}, "features"), ({"kind": "circles", "features": 31}, "features"),
    ({"kind": "contained", "l0": 20.0}, "l0"), ({"kind": "hierarchical", "d": 1}, "d="),
])
def test_arguments_out_of_range_are_named(more, named):
    with pytest.raises(BadInput, match=named):
        truth(**{"kind": "independent", **more})


# ----------------------------------------------------------------------------------------------------------- recovery


def test_both_ways_of_assigning_agree():
    from rarefy.tasks import planted

    for seed, shape in itertools.product(range(4), [(40, 40), (30, 70), (1, 9)]):
        score = torch.randn(shape, generator=seeded(seed), dtype=torch.float64)
        score = score.round() if seed % 2 else score                                      # with ties the total is what must agree
        slow = planted._shortest_paths(-score.numpy())
        by_column = torch.from_numpy(slow)
        best = float(score[by_column[by_column >= 0], (by_column >= 0).nonzero()[:, 0]].sum())
        match = assign(score)
        assert float(score[torch.arange(shape[0]), match].sum()) == pytest.approx(best, abs=1e-9)


@pytest.mark.slow
def test_thousands_are_matched_in_seconds():
    import time

    optimize = pytest.importorskip("scipy.optimize")
    a, b = (normalize(torch.randn(4096, 256, generator=seeded(s)), dim=1) for s in (0, 1))
    score = (a @ b.T).double()
    assign(score[:5, :5])                                                                 # compiled
    began = time.process_time()
    match = assign(score)
    spent = time.process_time() - began
    rows, columns = optimize.linear_sum_assignment(score.numpy(), maximize=True)
    assert float(score[torch.arange(4096), match].sum()) == pytest.approx(float(score.numpy()[rows, columns].sum()), abs=1e-6)
    assert spent < 30, spent


def naive_f1(value, on):
    """The best threshold on even rows by trying every one; F1 on odd rows."""
    def score(v, o, tau):
        said = v > tau
        return 2 * float((said & o).sum()) / max(1, int(said.sum()) + int(o.sum()))

    even, odd = (value[::2], on[::2]), (value[1::2], on[1::2])
    levels = sorted({0.0, *even[0].tolist()})
    tau = max(((score(*even, (a + b) / 2), -i, (a + b) / 2) for i, (a, b) in enumerate(itertools.pairwise([*levels]))), default=(0, 0, 0))[2]
    return score(*odd, tau)


def test_f1_is_that_of_the_best_threshold_on_the_other_half():
    g = seeded(3)
    dense = torch.randn(60, 5, generator=g).relu() * torch.tensor([1, 1, -1, 1, 1.0])     # the third signs its values
    dense = dense.mul(4).round() / 4                                                      # ties
    on = torch.rand(60, 3, generator=g) < 0.4
    on[:, 1] = dense[:, 2].abs() > 0.6                                                    # found exactly, above a threshold
    match = torch.tensor([0, 2, -1])
    got = feature_f1(Codes.of(dense), on, match)
    assert got[1] == 1 and got[2] == 0
    assert float(got[0]) == pytest.approx(naive_f1(dense[:, 0], on[:, 0]), abs=0.02)
    with pytest.raises(BadInput, match=r"\[60, 3\]"):
        feature_f1(Codes.of(dense), on[:50], match)


@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_is_recovered_in_full(kind):
    t = truth(kind)
    learned = perfect_of(t)
    cosine = cosines(learned.decoder, t.dictionary, signed=KINDS[kind].signed)
    assert recovery(learned.decoder, t.dictionary).mcc == pytest.approx(1)
    assert float(feature_f1(learned.codes, t.on, match_blocks(cosine, t.block)).min()) > (0.5 if kind == "circles" else 0.999)
    assert uniqueness(cosine, torch.ones(32, dtype=torch.bool)) == 1
    assert float(subspaces(learned.decoder, t.dictionary, t.block).min()) == pytest.approx(1)


def test_uniqueness_counts_features_hit_once():
    eye = torch.eye(4)
    cosine = cosines(eye[[0, 0, 1, 3]], eye)
    assert uniqueness(cosine, torch.tensor([True, True, True, True])) == 3 / 4
    assert uniqueness(cosine, torch.tensor([True, False, True, True])) == 1
    assert uniqueness(cosine, torch.zeros(4, dtype=torch.bool)) == 0


def test_a_subspace_is_spanned_by_other_directions_of_it_but_not_by_copies():
    plane = torch.eye(6)[:2]
    turned = torch.tensor([[1.0, 0.2], [-0.3, 1.0]]) @ plane
    block = torch.tensor([0, 0])
    assert float(subspaces(turned, plane, block)) == pytest.approx(1)
    assert float(subspaces(plane[:1].repeat(3, 1), plane, block)) == pytest.approx(0.5)
    tilted = torch.stack([plane[0], (plane[1] + torch.eye(6)[3]) / 2**0.5])               # 45 degrees out in one dimension
    assert float(subspaces(tilted, plane, block)) == pytest.approx((1 + 0.5) / 2)
    single = subspaces(torch.eye(6)[2:], torch.stack([torch.eye(6)[2], normalize(torch.ones(6), dim=0)]), torch.tensor([0, 1]))
    assert single.tolist() == pytest.approx([1.0, 1 / 6])                                 # of one dimension: the best squared cosine


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("make", [lambda: TopK(16, 40, k=3), lambda: BatchTopK(16, 40, k=3), lambda: ReLU(16, 40)])
def test_what_is_read_is_what_the_method_does(make):
    x = truth("independent", n=300).x + 2
    method = make()
    method.initialise(x)
    with torch.no_grad():
        for p in method.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=seeded(1)))
    method.eval()
    learned = read(method, x, at_once=128)
    torch.testing.assert_close(learned.x_hat, method(x).detach())
    torch.testing.assert_close(learned.codes.matrix, method.select(x).dense.detach() * (method.select(x).dense != 0))
    offset = learned.x_hat - learned.codes.times(learned.decoder)
    torch.testing.assert_close(offset, offset[:1].expand_as(offset), atol=1e-4, rtol=0)
    assert learned.codes.l0 == pytest.approx(float((method.select(x).dense != 0).sum() / 300))


def test_reading_refuses_what_it_cannot_read():
    with pytest.raises(BadInput, match="rows"):
        read(TopK(16, 40), torch.zeros(0, 16))
    with pytest.raises(BadInput, match="W_dec_FD"):
        read(TopK(16, 40, d_out=8), torch.zeros(5, 16))
    with pytest.raises(BadInput, match="NaN"):
        read(TopK(16, 40), torch.full((5, 16), math.nan))


# ---------------------------------------------------------------------------------------------------------- stability


def dictionary_of(decoder, encoder=None):
    empty = torch.zeros(2, len(decoder))
    return Learned(Codes.of(empty), decoder, decoder if encoder is None else encoder, torch.zeros(2, decoder.shape[1]))


def test_a_permuted_copy_is_shared_in_full_and_a_random_one_hardly():
    rows = torch.randn(200, 64, generator=seeded(0))
    enc = rows + 0.3 * torch.randn(200, 64, generator=seeded(1))
    order = torch.randperm(200, generator=seeded(2))
    same = stability(dictionary_of(rows, enc), dictionary_of(rows[order] * 3, enc[order]))
    assert same.shared == 1 and same.decoder == pytest.approx(1)
    assert torch.equal(order[same.partner], torch.arange(200))
    other = stability(dictionary_of(rows, enc), dictionary_of(torch.randn(200, 64, generator=seeded(3)), torch.randn(200, 64, generator=seeded(4))))
    assert other.shared == 0 and (other.partner == -1).all()


def test_a_latent_turned_round_is_the_same_where_activations_have_signs():
    rows = torch.randn(20, 16, generator=seeded(0))
    flip = torch.where(torch.arange(20) < 5, -1.0, 1.0)
    assert stability(dictionary_of(rows), dictionary_of(rows * flip[:, None])).shared == pytest.approx(15 / 20)
    a, b = (perfect(torch.full((2, 20), -1.0), r) for r in (rows, rows * flip[:, None]))
    assert stability(a, b).shared == 1


def test_both_matches_must_agree_and_both_cosines_be_high():
    eye = torch.eye(6)
    swapped = eye[[1, 0, 2, 3, 4, 5]]
    assert stability(dictionary_of(eye, eye), dictionary_of(eye, swapped)).shared == pytest.approx(4 / 6)
    near, turned = eye.clone(), eye.clone()                                               # encoders nearer to each other's partner than to their own
    near[1], turned[0], turned[1] = torch.tensor([0.8, 0.6, 0, 0, 0, 0]), torch.tensor([0.8, 0.6, 0, 0, 0, 0]), eye[0]
    assert stability(dictionary_of(eye, near), dictionary_of(eye, turned)).shared == pytest.approx(4 / 6)
    weak = eye.clone()
    weak[2] = torch.tensor([0, 0, 0.69, 0, 0, (1 - 0.69**2) ** 0.5])
    assert stability(dictionary_of(eye, eye), dictionary_of(eye, weak)).shared == pytest.approx(5 / 6)
    assert stability(dictionary_of(eye, eye), dictionary_of(eye, weak), cutoff=0.6).shared == 1
    assert stability(dictionary_of(eye), dictionary_of(eye[:3])).shared == 1              # of the smaller one's
    with pytest.raises(BadInput, match="wide"):
        stability(dictionary_of(eye), dictionary_of(torch.eye(5)))
    with pytest.raises(BadInput, match="cutoff"):
        stability(dictionary_of(eye), dictionary_of(eye), cutoff=1.5)


# -------------------------------------------------------------------------------------------------------- dark matter


def test_linear_and_nonlinear_error_have_their_analytic_shares():
    """x = A c + B u + noise, x_hat = A c: the share is that of the best linear map between Gaussians of these covariances."""
    g = seeded(0)
    n, d = 40_000, 12
    a, b = (normalize(torch.randn(count, d, generator=g), dim=1) for count in (20, 3))
    c = torch.rand(n, 20, generator=g) * (torch.rand(n, 20, generator=g) < 0.2)
    u, noise = torch.randn(n, 3, generator=g), 0.3 * torch.randn(n, d, generator=g)
    x, x_hat = c @ a + u @ b + noise, c @ a
    var_c = 0.2 / 3 - 0.1**2
    error_cov = (b.T @ b + 0.09 * torch.eye(d)).double()                                   # of the error, and of it with x
    x_cov = error_cov + var_c * (a.T @ a).double()
    share = float(torch.trace(error_cov @ torch.linalg.solve(x_cov, error_cov)) / torch.trace(error_cov))
    got = dark_matter(x, x_hat)
    assert got.linear == pytest.approx(share, abs=0.01) and 0.3 < share < 0.95
    assert got.nonlinear == pytest.approx(1 - share, abs=0.01)
    assert got.fvu == pytest.approx(float(torch.trace(error_cov) / torch.trace(x_cov)), abs=0.01)


def test_error_that_no_linear_map_sees_is_nonlinear_and_one_it_sees_is_linear():
    g = seeded(1)
    x = torch.randn(4000, 8, generator=g)
    assert dark_matter(x, x - x @ torch.randn(8, 8, generator=g)).linear == pytest.approx(1, abs=1e-4)
    independent = dark_matter(x, x - torch.randn(4000, 8, generator=g))
    assert abs(independent.linear) < 0.02 and abs(independent.norm) < 0.02                 # held out: no gain from overfitting
    ramp = torch.rand(4000, 1, generator=g)
    rows = torch.cat([ramp, torch.randn(4000, 3, generator=g)], 1)
    error = torch.cat([ramp.sqrt(), torch.zeros(4000, 3)], 1) * (torch.randint(2, (4000, 1), generator=g) * 2 - 1)
    scaled = dark_matter(rows, rows - error)
    assert scaled.norm == pytest.approx(1, abs=0.01) and abs(scaled.linear) < 0.02         # squared norm = ramp, its sign random


def test_taking_the_linear_error_out_leaves_the_nonlinear_one():
    g = seeded(2)
    x = torch.randn(4000, 6, generator=g)
    rest = 0.2 * torch.randn(4000, 6, generator=g)
    x_hat = x - (x @ (0.3 * torch.eye(6))) - rest
    dark = dark_matter(x, x_hat)
    repaired = x_hat + dark.to_error(x)
    assert float((x - repaired).pow(2).sum() / rest.pow(2).sum()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("x", "x_hat", "named"), [
    (torch.randn(50, 4), torch.randn(50, 5), "one shape"), (torch.randn(8, 8), torch.randn(8, 8), "more rows"),
    (torch.full((50, 4), math.nan), torch.zeros(50, 4), "NaN"),
])
def test_dark_matter_refuses(x, x_hat, named):
    with pytest.raises(BadInput, match=named):
        dark_matter(x, x_hat)


# --------------------------------------------------------------------------------------------------------- absorption


def test_the_truth_absorbs_nothing():
    for kind in ("hierarchical", "contained"):
        t = truth(kind)
        got = absorption(perfect_of(t), t)
        assert got.absorbed == got.missed == 0 and torch.equal(got.main, torch.arange(8))


def test_a_parent_folded_into_its_children_is_absorbed():
    t = truth("contained")
    folded, codes = t.dictionary.clone(), t.codes.clone()
    some = [c for c in range(8, 32) if c % 3 == 0]                                         # one child of each parent
    for child in some:
        parent = int(t.parent[child])
        folded[child] += t.dictionary[parent]
        codes[:, parent] = torch.where(codes[:, child] != 0, 0.0, codes[:, parent])
    got = absorption(perfect(codes, folded), t)
    assert got.absorbed == pytest.approx(1 / 3, abs=0.05) and got.absorbed <= got.missed == pytest.approx(1 / 3, abs=0.05)
    forgotten = absorption(perfect(codes, t.dictionary), t)                                # silent, and nobody writes it: missed only
    assert forgotten.absorbed < 0.05 < forgotten.missed


def test_absorption_needs_parents_and_the_rows_read():
    with pytest.raises(BadInput, match="hierarchical or contained"):
        absorption(perfect_of(truth("independent")), truth("independent"))
    with pytest.raises(BadInput, match="rows"):
        absorption(perfect_of(truth("contained")), truth("contained", n=50))


# ----------------------------------------------------------------------------------------------------------- geometry


def test_dead_dense_and_duplicate_latents_are_counted():
    decoder = torch.eye(8)[[0, 1, 2, 3, 4]]
    decoder[3] = torch.tensor([0, 0.3, 0.954, 0, 0, 0, 0, 0])                              # cosine 0.954 with the third
    decoder = torch.cat([decoder, decoder[:1]])                                            # a copy of the first, but dead
    codes = torch.zeros(100, 6)
    codes[0, 1], codes[:10, 2], codes[:11, 3], codes[50:60, 4], codes[7, 0] = 1, 1, 1, 1, 1
    got = geometry(Learned(Codes.of(codes), decoder, decoder, torch.zeros(100, 8)))
    assert (got.dead, got.dense, got.duplicate) == (1 / 6, 1 / 6, 2 / 6)
    cosine = normalize(decoder[:5], dim=1) @ normalize(decoder[:5], dim=1).T - 2 * torch.eye(5)
    assert got.nearest == pytest.approx(float(cosine.amax(1).mean()), abs=1e-6)


def test_nearest_other_in_pieces_is_nearest_other_at_once():
    rows = torch.randn(1500, 8, generator=seeded(0))
    unit = normalize(rows, dim=1)
    torch.testing.assert_close(nearest_other(rows), (unit @ unit.T - 3 * torch.eye(1500)).amax(1))
    assert nearest_other(rows[:1]).tolist() == [-1.0] and nearest_other(rows[:0]).tolist() == []


def test_fvu_by_group_adds_up_to_fvu():
    x = torch.randn(1000, 5, generator=seeded(0)) * torch.linspace(0.1, 3, 1000)[:, None]
    x_hat = x * 0.7
    group = norm_groups(x)
    assert torch.bincount(group).tolist() == [100] * 10
    assert x[group == 0].norm(dim=1).max() <= x[group == 1].norm(dim=1).min()
    got = fvu_by(x, x_hat, group)
    spread = torch.stack([(x[group == i] - x.mean(0)).pow(2).sum() for i in range(10)]).double()
    whole = float((x - x_hat).pow(2).sum() / (x - x.mean(0)).pow(2).sum())
    assert float((got * spread).sum() / spread.sum()) == pytest.approx(whole, rel=1e-5)
    assert torch.isnan(fvu_by(x, x_hat, torch.full((1000,), 2))[:2]).all()
    with pytest.raises(BadInput, match="share"):
        fvu_by(x, x_hat, group[:5])
