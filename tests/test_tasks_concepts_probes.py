"""Judges of dictionaries on labelled rows: probing, absorption, removal. Planted truth on top, random and dense bases below.

Shape letters: N = rows, D = width, F = latents, C = concepts, K = latents read.
"""

import math

import pytest
import torch
from torch.nn.functional import normalize

from rarefy.errors import BadInput
from rarefy.tasks.absorption import absorption, main_latents
from rarefy.tasks.codes import Codes, Lens, neurons, principal
from rarefy.tasks.logistic import accuracy, balanced, f1, fit_probes
from rarefy.tasks.probing import by_document, mean_difference, probe_codes, probe_rows
from rarefy.tasks.removal import attribution, confound, confounded_pairs, perturb, remove, without


def as_codes(z_NF):
    row, latent = z_NF.nonzero(as_tuple=True)
    mixed = torch.randperm(len(row), generator=torch.Generator().manual_seed(5))
    return Codes.sparse(latent[mixed], z_NF[row, latent][mixed], row[mixed], *z_NF.shape)


def world(n=2400, d=48, concepts=6, rate=0.3, noise=0.1, seed=0):
    """Rows made of independent concepts; their dictionary, and who is on which side of which document."""
    g = torch.Generator().manual_seed(seed)
    y_NC = torch.rand(n, concepts, generator=g) < rate
    rows_CD = normalize(torch.randn(concepts, d, generator=g), dim=-1)
    z_NC = y_NC * (1 + torch.rand(n, concepts, generator=g))
    x_ND = z_NC @ rows_CD + noise * torch.randn(n, d, generator=g)
    doc_N = torch.arange(n) // 40
    return x_ND, y_NC, Lens(as_codes(z_NC), rows_CD), doc_N % 2, doc_N


def random_lens(x_ND, width=48, k=8, seed=9):
    """Random directions, the k greatest inner products."""
    rows_FD = normalize(torch.randn(width, x_ND.shape[1], generator=torch.Generator().manual_seed(seed)), dim=-1)
    value, index = (x_ND @ rows_FD.T).relu().topk(k, dim=1)
    return Lens(as_codes(torch.zeros(len(x_ND), width).scatter(1, index, value)), rows_FD)


# ------------------------------------------------------------------------------------------------------------- codes


def test_sparse_and_dense_codes_are_the_same_thing():
    z = torch.rand(50, 9).masked_fill(torch.rand(50, 9) < 0.6, 0) - torch.tensor([0.0] * 8 + [0.5])
    z[:, 3] = 0
    w, pick, rows = torch.randn(50, 4), torch.tensor([8, 3, 0, 8]), torch.tensor([40, 2, 7])
    for codes in (as_codes(z), Codes.dense(z)):
        torch.testing.assert_close(codes.columns(pick), z[:, pick])
        torch.testing.assert_close(codes.sums(w), z.T @ w)
        torch.testing.assert_close(codes.take(rows).columns(pick), z[rows][:, pick])
        torch.testing.assert_close(codes.rows(rows), z[rows])
        torch.testing.assert_close(codes.fires.rows(torch.arange(50)), (z > 0).float())
        assert codes.l0 == pytest.approx(float((z != 0).sum() / 50))


def test_codes_that_point_nowhere_are_refused():
    with pytest.raises(BadInput, match=r"latent numbers 0\.\.5 must be in 0\.\.4"):
        Codes.sparse(torch.tensor([0, 5]), torch.ones(2), torch.tensor([0, 1]), 2, 5)
    with pytest.raises(BadInput, match="one each"):
        Lens(Codes.dense(torch.ones(2, 3)), torch.ones(4, 5))


def test_no_code_at_all():
    empty = torch.empty(0, dtype=torch.long)
    codes = Codes.sparse(empty, torch.empty(0), empty, 4, 3)
    assert codes.sums(torch.ones(4, 2)).tolist() == [[0, 0]] * 3 and codes.l0 == 0


def test_dense_bases_give_the_rows_back():
    x = torch.randn(200, 6) @ torch.randn(6, 6) + 3
    for lens in (neurons(x, x.mean(0)), principal(x, x)):
        torch.testing.assert_close(lens.codes.rows(torch.arange(200)) @ lens.decoder_FD + x.mean(0), x, atol=1e-4, rtol=1e-4)
    z = principal(x, x).codes.rows(torch.arange(200))
    covariance = z.T @ z
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-2 * covariance.diag().max()
    assert (z.pow(3).sum(0) >= -1e-3).all()


# ---------------------------------------------------------------------------------------------------------- logistic


def test_probes_are_where_the_gradient_is_zero():
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(300, 5, generator=g) * torch.tensor([1.0, 10, 0.1, 1, 1]) + 2, torch.rand(300, 3, generator=g) < 0.3
    l2 = 0.01
    probes = fit_probes(x, y, l2=l2)
    z = (x - x.mean(0)) / x.std(0, unbiased=False)
    w = (probes.weight_PC * x.std(0, unbiased=False)[:, None]).double()
    p = torch.sigmoid(probes.logits(x).double())
    residual = balanced(y) * (p - y.double())
    assert (z.double().T @ residual + l2 * w).abs().max() < 1e-5
    assert residual.sum(0).abs().max() < 1e-5


def test_probes_equal_scikit_learn():
    linear = pytest.importorskip("sklearn.linear_model")
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(400, 4, generator=g), torch.rand(400, generator=g) < 0.2
    x[y] += 0.5
    z = (x - x.mean(0)) / x.std(0, unbiased=False)
    # Its objective is C * sum of weighted losses + |w|^2 / 2; ours is a mean, so C = 1 / l2 with weights that sum to 1.
    weight = balanced(y[:, None])[:, 0].numpy()
    theirs = linear.LogisticRegression(C=1 / 0.02, tol=1e-8, max_iter=1000).fit(z.numpy(), y.numpy(), sample_weight=weight)
    ours = fit_probes(z, y[:, None], l2=0.02)
    torch.testing.assert_close(ours.weight_PC[:, 0], torch.tensor(theirs.coef_[0]).float(), atol=2e-4, rtol=1e-3)
    assert float(ours.bias_C) == pytest.approx(float(theirs.intercept_[0]), abs=2e-4)


def test_problems_with_features_of_their_own_do_not_meet():
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, 200, 3, generator=g), torch.rand(200, 2, generator=g) < 0.4
    both = fit_probes(x, y)
    for c in (0, 1):
        alone = fit_probes(x[c], y[:, c : c + 1])
        torch.testing.assert_close(both.weight_PC[:, c], alone.weight_PC[:, 0], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(both.logits(x)[:, c], alone.logits(x[c])[:, 0], atol=2e-3, rtol=1e-3)


def test_a_feature_that_never_moves_is_harmless():
    x, y = torch.cat([torch.randn(100, 1), torch.full((100, 1), 7.0)], 1), torch.arange(100)[:, None] < 30
    assert fit_probes(x, y).weight_PC[1].abs() < 1e-6
    assert fit_probes(torch.zeros(1, 100, 2), y).logits(torch.zeros(1, 100, 2)).abs().max() < 1e-6


def test_accuracy_and_f1_weigh_classes_alike():
    y = torch.tensor([[True]] * 2 + [[False]] * 8)
    logit = torch.tensor([1.0, -1] + [1.0] * 2 + [-1.0] * 6)[:, None]              # TPR 1/2, FPR 1/4
    assert float(accuracy(logit, y)) == pytest.approx((0.5 + 0.75) / 2)
    assert float(f1(logit, y)) == pytest.approx(2 * 0.5 / (1 + 0.5 + 0.25))


@pytest.mark.parametrize(("x", "y", "more", "said"), [
    (torch.ones(4, 2), torch.ones(4, 1, dtype=torch.bool), {}, "problem 0 has 4 of 4 rows"),
    (torch.ones(4, 2), torch.ones(3, 1, dtype=torch.bool), {}, r"features of shape \[4, 2\]"),
    (torch.full((4, 2), math.nan), torch.arange(4)[:, None] < 2, {}, "features: 8 of 8 values are NaN"),
    (torch.ones(4, 2), torch.arange(4)[:, None] < 2, {"l2": 0.0}, "l2=0.0 must be above 0"),
])
def test_probes_refuse(x, y, more, said):
    with pytest.raises(BadInput, match=said):
        fit_probes(x, y, **more)


# ----------------------------------------------------------------------------------------------------------- probing


def test_mean_difference_is_one():
    x, y, lens, *_ = world(n=300)
    z = lens.codes.rows(torch.arange(300))
    want = torch.stack([z[y[:, c]].mean(0) - z[~y[:, c]].mean(0) for c in range(6)], 1)
    torch.testing.assert_close(mean_difference(lens.codes, y), want)


def test_one_latent_of_the_true_dictionary_is_enough_and_of_others_not():
    x, y, truth, side, doc = world()
    found = probe_codes(truth.codes, y, side, doc, k=(1, 2))
    assert found[1].accuracy.mean > 0.999 and found[1].f1 > 0.999
    assert found[1].latent_CK[:, 0].tolist() == list(range(6))
    assert probe_rows(x, y, side, doc).accuracy.mean > 0.98
    for other in (random_lens(x), neurons(x, x.mean(0)), principal(x, x)):
        few = probe_codes(other.codes, y, side, doc, k=(1, 2))
        assert few[1].accuracy.mean < 0.85 and few[1].accuracy.mean < few[2].accuracy.mean < 0.95


def test_probing_is_judged_on_the_other_side():
    """Labels that are noise can be fitted but not found again."""
    x, _, _, side, doc = world(n=400, d=200)
    noise = torch.rand(400, 3, generator=torch.Generator().manual_seed(8)) < 0.5
    assert accuracy(fit_probes(x[side == 0], noise[side == 0]).logits(x[side == 0]), noise[side == 0]).mean() > 0.95
    assert probe_rows(x, noise, side, doc).accuracy.mean < 0.6


def test_interval_is_that_of_a_ratio_over_documents():
    from rarefy.fidelity import ratio_interval

    g = torch.Generator().manual_seed(4)
    total, count, doc = torch.rand(90, generator=g), torch.rand(90, generator=g) + 0.1, torch.arange(90) % 7 * 3
    sums = [torch.stack([v[doc == d].sum() for d in range(0, 21, 3)]) for v in (total, count)]
    a, b = by_document(total, count, doc), ratio_interval(*sums)
    assert (a.mean, a.low, a.high) == pytest.approx((b.mean, b.low, b.high), rel=1e-5)
    assert by_document(total, count, doc * 0).high == math.inf


# -------------------------------------------------------------------------------------------------------- absorption


def absorbing(n=2400, share=0.3, seed=0):
    """A parent with a child below it: in the true codes both fire, in the absorbing ones the child's latent carries both."""
    g = torch.Generator().manual_seed(seed)
    parent = torch.rand(n, generator=g) < 0.5
    child = parent & (torch.rand(n, generator=g) < share)
    other = torch.rand(n, generator=g) < 0.5
    truth = torch.stack([parent, child, other], 1).float() * 3
    rows = normalize(torch.randn(3, 32, generator=g), dim=-1)
    x = truth @ rows + 0.05 * torch.randn(n, 32, generator=g)
    taken = truth.clone()
    taken[child, 0] = 0
    both = torch.stack([rows[0], rows[0] + rows[1], rows[2]])
    doc = torch.arange(n) // 40
    return x, parent[:, None], child, Lens(as_codes(truth), rows), Lens(as_codes(taken), both), doc % 2, doc


def test_absorption_is_the_share_of_the_child_and_none_in_the_true_dictionary():
    x, parent, child, truth, taken, side, doc = absorbing()
    probes = fit_probes(x[side == 0], parent[side == 0])
    none = absorption(truth, x, parent, probes, side, doc)
    assert none.rate.mean == 0 and none.main == [[0]] and none.splits == 1
    # With a jump that no second latent makes, only the parent's own is main; its silence on the child's rows is absorption.
    some = absorption(taken, x, parent, probes, side, doc, jump=0.5)
    judged = parent[:, 0] & (side == 1)
    assert some.main == [[0]] and some.rate.mean == pytest.approx(float(child[judged].float().mean()), abs=0.02)
    assert some.rate.low < some.rate.mean < some.rate.high and float(some.silent_C) > some.rate.mean - 1e-6


def test_what_a_second_main_latent_covers_is_splitting_not_absorption():
    x, parent, _, _, taken, side, doc = absorbing(share=0.4)
    found = absorption(taken, x, parent, fit_probes(x[side == 0], parent[side == 0]), side, doc, jump=0.03)
    assert found.main == [[0, 1]] and found.rate.mean == 0


def test_absorption_needs_direction_and_margin():
    x, parent, _, _, taken, side, doc = absorbing()
    probes = fit_probes(x[side == 0], parent[side == 0])
    assert absorption(taken, x, parent, probes, side, doc, jump=0.5, aligned=0.9999).rate.mean == 0
    assert absorption(taken, x, parent, probes, side, doc, jump=0.5, margin=1e6).rate.mean == 0


def test_main_latents_are_those_that_rise():
    _, y, truth, *_ = world(n=600)
    assert main_latents(truth.codes, y) == [[c] for c in range(6)]


# ----------------------------------------------------------------------------------------------------------- removal


def test_taking_latents_out_is_what_it_says():
    x, y, lens, *_ = world(n=200)
    probes, out = fit_probes(x, y), torch.tensor([4, 1])
    less = x - (lens.codes.columns(out) - torch.tensor([0.5, 0.1])) @ lens.decoder_FD[out]
    torch.testing.assert_close(without(lens, probes, probes.logits(x), out, torch.tensor([0.5, 0.1])), probes.logits(less), atol=1e-4, rtol=1e-4)


def test_attribution_finds_each_concepts_latent():
    x, y, lens, *_ = world(n=600)
    assert attribution(lens, fit_probes(x, y), y).argmax(0).tolist() == list(range(6))


def test_perturbation_of_the_true_dictionary_is_targeted():
    x, y, truth, side, doc = world()
    probes = fit_probes(x[side == 0], y[side == 0])
    best = perturb(truth, x, y, probes, side, doc, n=(1,))[1]
    assert best.score.mean > 0.4 and best.other_C.max() < 0.05
    for other in (random_lens(x), neurons(x, x.mean(0)), principal(x, x)):
        assert perturb(other, x, y, probes, side, doc, n=(1,))[1].score.mean < best.score.mean / 2
    with pytest.raises(BadInput, match="at least two concepts"):
        perturb(truth, x, y[:, :1], probes, side, doc)


def test_removal_of_the_true_latent_frees_the_probe():
    x, y, truth, side, doc = world(noise=0.25)
    x[:, :] += (y[:, :1] * 1.5) @ truth.decoder_FD[:1]                  # the spurious concept is the louder one
    lens = Lens(as_codes(truth.codes.rows(torch.arange(len(x))) + torch.nn.functional.pad(y[:, :1] * 1.5, (0, 5))), truth.decoder_FD)
    (pair,) = confound(x, y, [(1, 0)], "abcdef", side)
    same = (side == 0) & (y[:, 0] == y[:, 1])                            # rows of weight 0 take no part but in the features' scale
    alone = fit_probes(x[same], y[same, 1:2], l2=1e-6)
    (loose,) = confound(x, y, [(2, 3), (1, 0)], "abcdef", side, l2=1e-6)[1:]
    assert torch.corrcoef(torch.stack([loose.biased.logits(x)[:, 0], alone.logits(x)[:, 0]]))[0, 1] > 0.99
    best = remove(lens, x, [pair], side, doc, n=(1,))[1]
    assert float(best.oracle_P) - float(best.base_P) > 0.05
    assert best.score.mean > 0.6 and float(best.ablated_P) > float(best.base_P)
    for other in (random_lens(x), neurons(x, x.mean(0))):
        assert remove(other, x, [pair], side, doc, n=(1,))[1].score.mean < best.score.mean - 0.2


def test_pairs_of_concepts_occur_in_all_combinations():
    _, y, _, side, _ = world(n=800)
    y = torch.cat([y, y[:, :1]], 1)                                     # the last is the first again: never apart
    pairs = confounded_pairs(y, side, most=20, least=20)
    assert pairs and (0, 6) not in pairs and (6, 0) not in pairs
    assert max([a for p in pairs for a in p].count(c) for c in range(7)) <= 2
    with pytest.raises(BadInput, match="all four combinations"):
        confound(torch.randn(800, 3), y, [(0, 6)], "abcdefg", side)
