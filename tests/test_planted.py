import itertools

import numpy as np
import pytest
import torch

from rarefy.errors import BadInput
from rarefy.tasks.induction import induction_score, prefix_matching
from rarefy.tasks.planted import assign, make, recovery


def test_rows_are_codes_times_dictionary():
    p = make(500, 16, 40, 4.0, seed=3)
    naive = torch.stack([sum(c * f for c, f in zip(row, p.dictionary, strict=True)) for row in p.codes[:20]])
    torch.testing.assert_close(p.x[:20], naive, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(p.dictionary.norm(dim=1), torch.ones(40))
    strength = p.codes[p.codes > 0]
    assert strength.min() >= 0.5 and strength.max() <= 1.5


@pytest.mark.parametrize(("correlation", "skew", "l0"), [(0.0, 0.0, 4.0), (0.8, 0.0, 4.0), (0.0, 1.0, 4.0), (0.5, 2.0, 9.5), (0.0, 0.0, 40.0)])
def test_mean_l0_is_the_one_asked(correlation, skew, l0):
    p = make(20_000, 8, 40, l0, correlation=correlation, skew=skew)
    assert float((p.codes > 0).sum(1).float().mean()) == pytest.approx(l0, rel=0.03)


def test_skew_orders_rates_and_none_leaves_them_equal():
    on = (make(20_000, 8, 40, 4.0, skew=1.0).codes > 0).float().mean(0)
    assert on[0] / on[9] == pytest.approx(10, rel=0.2)
    flat = (make(20_000, 8, 40, 4.0).codes > 0).float().mean(0)
    assert flat.min() > 0.09 and flat.max() < 0.11


def test_correlation_is_within_groups_only():
    on = (make(20_000, 8, 16, 4.0, correlation=0.8, group=8).codes > 0).double()
    c = torch.corrcoef(on.T)
    inside = c[:8, :8][~torch.eye(8, dtype=bool)]
    assert inside.min() > 0.4 and c[:8, 8:].abs().max() < 0.04


def test_noise_has_the_asked_size():
    clean, noisy = make(20_000, 16, 40, 4.0), make(20_000, 16, 40, 4.0, noise=0.25)
    assert torch.equal(clean.codes, noisy.codes)
    ratio = (noisy.x - clean.x).square().mean().sqrt() / clean.x.square().mean().sqrt()
    assert float(ratio) == pytest.approx(0.25, rel=0.01)


def test_seed_decides():
    a, b, c = (make(50, 8, 16, 2.0, noise=0.1, seed=s) for s in (1, 1, 2))
    assert torch.equal(a.x, b.x) and not torch.equal(a.x, c.x)


def test_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    make(50, 8, 16, 2.0, noise=0.1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("bad", [
    {"n": 0}, {"d": 0}, {"features": 0}, {"l0": 0.0}, {"l0": 17.0}, {"l0": float("nan")}, {"noise": -0.1}, {"noise": float("inf")},
    {"correlation": 1.0}, {"correlation": -0.1}, {"skew": -1.0}, {"group": 0},
])
def test_arguments_out_of_range_are_named(bad):
    with pytest.raises(BadInput, match=next(iter(bad))):
        make(**{"n": 10, "d": 8, "features": 16, "l0": 2.0, **bad})


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (3, 6), (6, 3), (1, 5), (5, 1)])
def test_assignment_against_all_permutations(shape):
    for seed in range(20):
        score = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        match = assign(score)
        rows, columns = shape
        there = (match >= 0).nonzero().flatten()
        assert len(there) == min(shape) == len(set(match[there].tolist()))
        wide = score if rows <= columns else score.T
        best = max(sum(float(wide[i, j]) for i, j in enumerate(p)) for p in itertools.permutations(range(wide.shape[1]), wide.shape[0]))
        assert float(score[there, match[there]].sum()) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("shape", [(63, 63), (63, 111), (111, 63)])
@pytest.mark.parametrize("ties", [False, True])
def test_assignment_against_scipy(shape, ties):
    optimize = pytest.importorskip("scipy.optimize")
    score = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    score = score.round() if ties else score
    match = assign(score)
    there = (match >= 0).nonzero().flatten()
    rows, columns = optimize.linear_sum_assignment(score.numpy(), maximize=True)
    assert float(score[there, match[there]].sum()) == pytest.approx(float(score.numpy()[rows, columns].sum()), abs=1e-9)


def test_a_shuffled_rescaled_dictionary_is_recovered_exactly():
    p = make(10, 16, 40, 4.0)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    r = recovery(p.dictionary[order] * torch.linspace(0.1, 7, 40)[:, None], p.dictionary)
    assert r.mmcs == pytest.approx(1) and r.mcc == pytest.approx(1)
    assert torch.equal(order[r.match], torch.arange(40))


def test_mcc_but_not_mmcs_punishes_copies_and_both_punish_signs():
    eye = torch.eye(4)
    assert recovery(-eye, eye).mcc == pytest.approx(0) and recovery(-eye, eye).mmcs == pytest.approx(0)
    twice = torch.stack([(eye[0] + eye[1]) / 2**0.5, (eye[0] + eye[1]) / 2**0.5, eye[2], eye[3]])
    r = recovery(twice[[0, 2, 3]], eye)             # one learned row serves two true ones
    assert r.mmcs == pytest.approx((2 * 0.5**0.5 + 2) / 4)
    assert r.mcc == pytest.approx((0.5**0.5 + 2) / 4) and (r.match == -1).sum() == 1


def test_recovery_refuses_what_it_cannot_compare():
    with pytest.raises(BadInput, match=r"\[4, 3\]"):
        recovery(torch.ones(4, 3), torch.ones(4, 2))
    with pytest.raises(BadInput, match="at least one"):
        recovery(torch.ones(0, 3), torch.ones(4, 3))
    with pytest.raises(BadInput, match="learned"):
        recovery(torch.full((4, 3), float("nan")), torch.ones(4, 3))


def test_random_dictionaries_are_not_recovered():
    p = make(10, 32, 64, 4.0)
    assert recovery(torch.randn(64, 32, generator=torch.Generator().manual_seed(9)), p.dictionary).mcc < 0.6


class Copier(torch.nn.Module):
    """Gives the token that followed the last earlier appearance of the present one probability `p`, the rest evenly."""

    def __init__(self, vocab: int, p: float) -> None:
        super().__init__()
        self.vocab, self.p, self.unused = vocab, p, torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, use_cache):
        prob = torch.full((*input_ids.shape, self.vocab), 1 / self.vocab, dtype=torch.float64)
        for b, row in enumerate(input_ids.tolist()):
            for t, token in enumerate(row):
                seen = [s for s in range(t) if row[s] == token]
                if seen:
                    prob[b, t] = (1 - self.p) / (self.vocab - 1)
                    prob[b, t, row[seen[-1] + 1]] = self.p
        return type("Out", (), {"logits": prob.log()})()


@pytest.mark.parametrize("start", [None, 50])
def test_induction_of_a_perfect_copier(start):
    score = induction_score(Copier(51, 0.9), range(50), period=7, batch=5, start=start, at_once=2)
    assert score.first.mean == pytest.approx(np.log(51))
    assert score.second.mean == pytest.approx(-np.log(0.9))
    assert score.drop.mean == pytest.approx(np.log(51) + np.log(0.9))


@pytest.mark.parametrize("period", [0, 1, 51])
def test_induction_period_out_of_range(period):
    with pytest.raises(BadInput, match="period"):
        induction_score(Copier(51, 0.9), range(50), period=period)


def test_prefix_matching_reads_the_right_diagonal():
    period, start = 5, 1
    attention = torch.zeros(2, 3, 11, 11)
    for t in range(11):
        attention[:, 0, t, max(0, t - period + 1)] = 1      # the token after the first appearance
        attention[:, 1, t, max(0, t - period)] = 1          # the first appearance itself
        attention[:, 2, t, : t + 1] = 1 / (t + 1)
    score = prefix_matching(attention, period)
    assert score[:2].tolist() == [1.0, 0.0]
    assert float(score[2]) == pytest.approx(np.mean([1 / (t + 1) for t in range(start + period, 11)]))
    with pytest.raises(BadInput, match="period = 12"):
        prefix_matching(attention, 6)


@pytest.mark.slow
def test_a_sparse_autoencoder_recovers_the_planted_dictionary():
    """From noisy rows alone, with twice as many latents as features (promise M12); with as many, 1500 steps end at MCC 0.94."""
    from rarefy.latents.topk import TopK

    p = make(40_000, 32, 64, 3.0, noise=0.05)
    method = TopK(32, 128, k=3, dead_after=20_000)
    method.initialise(p.x[:2000], p.x[:2000])
    before = recovery(method.W_dec_FD.detach(), p.dictionary).mcc
    optimiser, generator = torch.optim.Adam(method.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
    for step in range(1500):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1.0, 3 * (1 - step / 1500))
        x = p.x[torch.randint(len(p.x), (512,), generator=generator)]
        method.loss(x, x).total.backward()
        method.before_step()
        optimiser.step()
        optimiser.zero_grad()
        method.after_step(step)
    after = recovery(method.W_dec_FD.detach(), p.dictionary)
    assert before < 0.6 and after.mcc > 0.95, (before, after.mcc, after.mmcs)
