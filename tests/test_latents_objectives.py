"""Objectives and selections of dictionaries against the papers' formulas, written out densely."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy import Recipe, TensorStream, train
from rarefy.errors import BadInput
from rarefy.latents.archetypal import Archetypal, centroids
from rarefy.latents.feature_choice import FeatureChoice, column_top_k
from rarefy.latents.gated import Gated
from rarefy.latents.gated_p_annealed import GatedPAnnealed
from rarefy.latents.jumprelu import JumpReLU
from rarefy.latents.matching_pursuit import MatchingPursuit, _Pursuit
from rarefy.latents.matryoshka import Matryoshka
from rarefy.latents.mutual_choice import MutualChoice
from rarefy.latents.mutual_feature import MutualFeature, agreement
from rarefy.latents.nested import sizes
from rarefy.latents.nested_topk import NestedTopK
from rarefy.latents.p_annealed import PAnnealed
from rarefy.latents.relu import ReLU
from rarefy.latents.topk import TopK
from rarefy.latents.zipf import in_whole_numbers, zipf_rates

D, F = 11, 29


def rows(n: int = 37, seed: int = 3) -> Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 4 + 1


def built(cls: type, **kw: Any) -> Any:
    """A method in float64 with every parameter off its start."""
    method = cls(D, F, **kw).double()
    method.initialise(rows())
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in method.parameters():
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype, generator=generator))
    return method.train()


def pre_activations(m: Any, x: Tensor) -> Tensor:
    return (x * m.scale - m.b_dec_D) @ m.W_enc_FD.T + m.b_enc_F


def same_gradients(m: Any, got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want)
    names = [n for n, _ in m.named_parameters()]
    have, should = (torch.autograd.grad(v, list(m.parameters()), allow_unused=True, retain_graph=True) for v in (got, want))
    for name, a, b in zip(names, have, should, strict=True):
        assert (a is None or not a.any()) if b is None else (a is not None), name
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, msg=name)


def largest_of_batch(pre: Tensor, keep: int) -> Tensor:
    flat = pre.flatten()
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.argsort(descending=True)[:keep]] = True
    return mask.view_as(pre) & (pre > 0)


# ------------------------------------------------------------------------------------------------ nested reconstructions


@pytest.mark.parametrize(("text", "want"), [
    ("16, 20", (16, 20)), ("1/8,0.5", (4, 14)), ("0.01, 0.02, 3", (1, 3)), ("1/29, 2/29, 1.0", (1, 2, 29)), ("29", (29,)),
])
def test_sizes_are_counts_or_fractions(text: str, want: tuple[int, ...]) -> None:
    assert sizes("levels", text, F) == want


def test_sizes_of_one_number() -> None:
    """As the command line gives it: --set levels=16."""
    assert sizes("levels", 16, F) == (16,) and sizes("levels", 0.5, F) == (14,)


@pytest.mark.parametrize("text", ["", "0", "30", "5, 5", "1.5", "-1", "1/0", "x", "4,", "nan", "20, 0.5"])
def test_sizes_names_what_is_wrong(text: str) -> None:
    with pytest.raises(BadInput, match="levels="):
        sizes("levels", text, F)


@pytest.mark.parametrize("prefixes", ["3, 8, 20", "1/2", "29"])
def test_matryoshka_is_the_mean_over_prefixes(prefixes: str) -> None:
    m, x = built(Matryoshka, k=4, prefixes=prefixes, aux_alpha=0.0), rows()
    f = pre_activations(m, x)
    f = f * largest_of_batch(f, 4 * len(x))
    widths = [*sizes("prefixes", prefixes, F), F] if prefixes != "29" else [29]
    errors = [(f[:, :w] @ m.W_dec_FD[:w] + m.b_dec_D - x * m.scale).square().mean() for w in widths]
    same_gradients(m, m.loss(x, x).parts["mse"], torch.stack(errors).mean())


def test_matryoshka_of_the_whole_width_is_batch_topk_in_use() -> None:
    m, x = built(Matryoshka, k=4), rows()
    m.loss(x, x)
    m.eval()
    f = pre_activations(m, x).relu()
    torch.testing.assert_close(m(x), ((f * (f > m.tau)) @ m.W_dec_FD + m.b_dec_D) / m.scale)


@pytest.mark.parametrize(("weights", "shares"), [("uniform", (1, 1, 1)), ("reverse", (3, 2, 1))])
def test_nested_topk_adds_up_the_losses_of_its_levels(weights: str, shares: tuple[int, ...]) -> None:
    m, x = built(NestedTopK, k=2, levels="2, 5, 12", weights=weights, aux_alpha=0.0), rows()
    pre = pre_activations(m, x)
    errors = []
    for k in (2, 5, 12):
        kept = pre >= pre.sort(1, descending=True).values[:, k - 1 : k]
        errors.append(((pre.relu() * kept) @ m.W_dec_FD + m.b_dec_D - x * m.scale).square().mean())
    loss = m.loss(x, x)
    same_gradients(m, loss.parts["mse"], sum((s / sum(shares) * e for s, e in zip(shares, errors, strict=True)), torch.tensor(0.0)))
    assert loss.parts["l0"] <= 2
    assert NestedTopK(D, F, 4).levels == (4, 8, 16)


def test_nested_topk_is_read_at_any_k() -> None:
    m, x = built(NestedTopK, k=2, levels="2, 5").eval(), rows()
    other = NestedTopK(D, F, 7, levels="2, 5").double().eval()
    other.load_state_dict(m.state_dict())
    pre = pre_activations(m, x)
    kept = pre >= pre.sort(1, descending=True).values[:, 6:7]
    torch.testing.assert_close(other(x), ((pre.relu() * kept) @ m.W_dec_FD + m.b_dec_D) / m.scale)


# ------------------------------------------------------------------------------------------------ Zipf, mutual and feature choice


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("k", [1, 9, 28, 29])
def test_zipf_rates_fall_as_the_rank_and_add_up(k: int, exponent: float) -> None:
    rate = zipf_rates(F, k, exponent)
    assert rate.sum().item() == pytest.approx(k)
    assert (rate <= 1 + 1e-12).all() and (rate > 0).all() and (rate.diff() <= 1e-12).all()
    below = (rate < 1 - 1e-9).nonzero()[:, 0]
    ranks = (below + 1).double()
    torch.testing.assert_close(rate[below] * ranks.pow(exponent), (rate[below] * ranks.pow(exponent)).mean().expand(len(below)))


def test_whole_numbers_keep_the_total_every_time_and_each_share_on_average() -> None:
    share = 12 * zipf_rates(F, 3, 1.0)
    counts = torch.stack([in_whole_numbers(share, step * 0.6180339887498949 % 1) for step in range(2000)])
    assert (counts.sum(1) == 36).all()
    assert (counts >= share.floor()).all() and (counts <= share.ceil()).all()
    torch.testing.assert_close(counts.double().mean(0), share, atol=2e-3, rtol=0)


def test_columns_keep_exactly_their_counts() -> None:
    """Against sorting each column; the edge of a whole share lies half-way between what is kept and what is not."""
    score = rows(50, seed=8)[:, :10].relu()
    share = torch.tensor([50.0, 31, 16, 15, 7, 3, 2, 1, 0.25, 0], dtype=torch.float64)
    count = torch.tensor([50, 31, 16, 15, 7, 3, 2, 1, 1, 0])
    mask, edge = column_top_k(score, share, count)
    for f, keep in enumerate(count.tolist()):
        order = score[:, f].argsort(descending=True, stable=True)
        assert mask[:, f].sum() == keep
        assert set(score[mask[:, f], f].tolist()) == set(score[order[:keep], f].tolist())
    down = torch.cat((score.sort(0, descending=True).values, torch.zeros(2, 10, dtype=torch.float64)))
    for f in range(8):
        n = int(share[f])
        assert edge[f].item() == pytest.approx(float(down[n - 1, f] + down[n, f]) / 2)
    assert edge[8].item() == pytest.approx(0.75 * float(down[0, 8]) + 0.25 * float(down[:2, 8].mean()))
    assert edge[9].item() == float(down[0, 9])


def test_mutual_choice_keeps_the_largest_of_the_batch() -> None:
    m, x = built(MutualChoice, k=6), rows()
    pre = pre_activations(m, x)
    mask = m.select(x).mask
    assert torch.equal(mask, largest_of_batch(pre, 6 * len(x)))
    m.loss(x, x)
    m.eval()
    assert float(m.tau) == pytest.approx(float(pre[mask].detach().min()))
    m.tau += 1e-6                                   # past the rounding of the one that the threshold is
    assert torch.equal(m.select(x).mask, pre > m.tau)


def test_mutual_choice_asks_those_that_fire_less_than_zipf_has_it() -> None:
    m, x = built(MutualChoice, k=3, aux_k=40, momentum=0.0, slack=0.6), rows()
    m.loss(x, x)
    fires = largest_of_batch(pre_activations(m, x), 3 * len(x)).double().mean(0)
    torch.testing.assert_close(m.rate_F, fires)
    total = sum(1 / r for r in range(1, F + 1))
    want = {f for rank, f in enumerate(fires.argsort(descending=True, stable=True).tolist(), 1) if fires[f] < 0.6 * 3 / (rank * total)}
    assert 0 < len(want) < F and set(m.needy().tolist()) == want
    with torch.no_grad():
        m.rate_F.copy_(torch.where(torch.isin(torch.arange(F), torch.tensor(sorted(want))), 0.0, 1.0))
    pre = pre_activations(m, x)
    y_hat = (pre * largest_of_batch(pre, 3 * len(x))) @ m.W_dec_FD + m.b_dec_D
    picked = torch.zeros(F, dtype=torch.float64).index_fill(0, torch.tensor(sorted(want)), 1.0)
    e_hat = (pre.relu() * picked) @ m.W_dec_FD
    same_gradients(m, m.loss(x, x).parts["aux"], ((x * m.scale - y_hat).detach() - e_hat).square().mean() / 32)


def test_feature_choice_gives_each_latent_its_rows() -> None:
    m, x = built(FeatureChoice, k=6, aux_alpha=0.0), rows()
    pre = pre_activations(m, x)
    for _ in range(3):
        _, count = m.shares(len(x))
        assert int(count.sum()) == 6 * len(x)
        mask = torch.zeros_like(pre, dtype=torch.bool)
        for f, keep in enumerate(count.tolist()):
            mask[pre[:, f].argsort(descending=True)[:keep], f] = True
        mask &= pre > 0
        assert torch.equal(m.select(x).mask, mask)
        same_gradients(m, m.loss(x, x).parts["mse"], ((pre * mask) @ m.W_dec_FD + m.b_dec_D - x * m.scale).square().mean())


def test_feature_choice_in_use_fires_as_often_as_in_training() -> None:
    """On the very batch seen, a latent's threshold admits its share, to the row that a share lies between."""
    m, x = built(FeatureChoice, k=3, momentum=0.0, exponent=0.5), rows(200)
    m.loss(x, x)
    share, _ = m.shares(200)
    positive = (pre_activations(m, x) > 0).sum(0)
    got = m.eval().select(x).mask.sum(0)
    assert ((got - torch.minimum(share, positive)).abs() <= 1).all()


# ------------------------------------------------------------------------------------------------ matching pursuit


def naive_pursuit(m: MatchingPursuit, x: Tensor, k: int) -> tuple[Tensor, list[Tensor]]:
    """Row by row, step by step: codes [B, F] and the residuals after each step."""
    codes, left = torch.zeros(len(x), F, dtype=x.dtype), x * m.scale - m.b_dec_D
    trail = [left]
    for _ in range(k):
        after = []
        for i, r in enumerate(left):
            inner = torch.stack([(r * w).sum() for w in m.W_dec_FD])
            j = int(inner.argmax())
            codes = codes.index_put((torch.tensor(i), torch.tensor(j)), inner[j], accumulate=True)
            after.append(r - inner[j] * m.W_dec_FD[j])
        left = torch.stack(after)
        trail.append(left)
    return codes, trail


@pytest.mark.parametrize("k", [1, 4, 25])
def test_pursuit_equals_the_naive_one(k: int) -> None:
    m, x = built(MatchingPursuit, k=5), rows(9)
    m.after_step(0)
    codes, trail = naive_pursuit(m, x, k)
    got = m.eval().select(x, k)
    torch.testing.assert_close(got.dense, codes)
    other = MatchingPursuit(D, F, k).double().eval()
    other.load_state_dict(m.state_dict())
    torch.testing.assert_close(other(x), (x * m.scale - trail[-1]) / m.scale)
    norms = torch.stack([r.norm(dim=-1) for r in trail])
    assert (norms.diff(dim=0) <= 1e-12).all()
    values, left, units = m.pursue(x * m.scale, k)
    torch.testing.assert_close((m.W_dec_FD[units[:, -1]] * left).sum(-1), torch.zeros(9, dtype=x.dtype), atol=1e-12, rtol=0)
    if k == 25:
        assert (got.count < k).any(), "no row takes a latent twice: the test would not see values added up"


def test_pursuit_loss_and_gradients_go_through_the_unroll() -> None:
    m, x = built(MatchingPursuit, k=6), rows(9)
    same_gradients(m, m.loss(x, x).parts["mse"], naive_pursuit(m, x, 6)[1][-1].square().mean())


def test_pursuit_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    r, w = (torch.randn(n, 5, dtype=torch.float64, generator=generator).requires_grad_() for n in (4, 7))
    w = (w.detach() / w.detach().norm(dim=-1, keepdim=True)).requires_grad_()
    assert torch.autograd.gradcheck(lambda r, w: _Pursuit.apply(r, w, 4)[:2], (r, w))


def test_pursuit_on_an_orthonormal_dictionary_takes_the_largest_and_ends_at_zero() -> None:
    m = MatchingPursuit(6, 6, 6).double().eval()
    with torch.no_grad():
        m.W_dec_FD.copy_(torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q)
    code = torch.tensor([[0.0, 3, 0, 1, 2, 0]], dtype=torch.float64)
    picked = m.select(code @ m.W_dec_FD, 2)
    torch.testing.assert_close(picked.dense, torch.tensor([[0.0, 3, 0, 0, 2, 0]], dtype=torch.float64))
    torch.testing.assert_close(m(code @ m.W_dec_FD), code @ m.W_dec_FD)


def test_pursuit_refuses_other_targets_and_steps() -> None:
    m, x = built(MatchingPursuit, k=5), rows()
    with pytest.raises(BadInput, match="reproduces what it reads"):
        m.loss(x, x + 1)
    with pytest.raises(BadInput, match="k=0"):
        m.select(x, 0)


# ------------------------------------------------------------------------------------------------ archetypal


def test_archetypal_loss_is_that_of_the_composed_decoder() -> None:
    m, x = built(Archetypal, k=5, points=9, aux_alpha=0.0), rows()
    decoder = m.log_scale.exp() * (m.mix_FP @ m.point_PE + m.relax_FE)
    pre = pre_activations(m, x)
    kept = pre >= pre.sort(1, descending=True).values[:, 4:5]
    same_gradients(m, m.loss(x, x).parts["mse"], ((pre.relu() * kept) @ decoder + m.b_dec_D - x * m.scale).square().mean())
    assert not m.W_dec_FD.requires_grad


@pytest.mark.parametrize("delta", [0.0, 0.05])
def test_archetypal_stays_by_the_hull(delta: float) -> None:
    m, x = Archetypal(D, F, 5, points=9, delta=delta), rows(64).float()
    train({"m": m}, TensorStream(x, 32), Recipe(steps=20, lr=0.05))
    mix = m.mix_FP.detach()
    assert (mix >= 0).all() and (mix == 0).any()
    torch.testing.assert_close(mix.sum(-1), torch.ones(F))
    length = m.relax_FE.detach().norm(dim=-1)
    assert (length <= delta * 1.0001).all() and (delta == 0 or (length > delta * 0.99).any())
    torch.testing.assert_close(m.W_dec_FD, (m.log_scale.exp() * (mix @ m.point_PE + m.relax_FE)).detach())
    assert not torch.equal(m.log_scale.detach(), Archetypal(D, F, 5).log_scale.detach())


def test_archetypal_points_are_the_data_s_and_do_not_follow_the_seed() -> None:
    x = rows(64).float()
    first, second = Archetypal(D, F, 5, points=7, seed=0), Archetypal(D, F, 5, points=7, seed=1)
    for m in (first, second):
        m.initialise(x)
    assert torch.equal(first.point_PE, second.point_PE) and not torch.equal(first.mix_FP, second.mix_FP)
    before = {k: v.clone() for k, v in first.state_dict().items()}
    first.initialise(x * 3)
    assert all(torch.equal(v, before[k]) for k, v in first.state_dict().items())


def test_centroids_are_the_means_of_what_is_nearest() -> None:
    generator = torch.Generator().manual_seed(2)
    homes = 10 * torch.randn(5, D, generator=generator)
    x = homes[torch.randint(5, (200,), generator=generator)] + torch.randn(200, D, generator=generator)
    found = centroids(x, 8)
    nearest = torch.cdist(x, found).argmin(1)
    for i in nearest.unique().tolist():
        torch.testing.assert_close(found[i], x[nearest == i].mean(0))
    assert centroids(x[:3], 7).shape == (7, D)
    with pytest.raises(BadInput, match="no rows"):
        centroids(x[:0], 2)


# ------------------------------------------------------------------------------------------------ mutual feature regularisation


def test_agreement_is_the_mean_greatest_cosine() -> None:
    generator = torch.Generator().manual_seed(6)
    a, b = (torch.randn(n, D, dtype=torch.float64, generator=generator, requires_grad=True) for n in (1500, 1300))
    cosine = (a / a.norm(dim=-1, keepdim=True)) @ (b / b.norm(dim=-1, keepdim=True)).T
    want = (cosine.amax(1).mean() + cosine.amax(0).mean()) / 2
    got = agreement(a, b)
    torch.testing.assert_close(got, want)
    for x, y in zip(torch.autograd.grad(got, (a, b)), torch.autograd.grad(want, (a, b)), strict=True):
        torch.testing.assert_close(x, y)


def test_mutual_feature_adds_the_losses_and_the_penalty() -> None:
    m, x = built(MutualFeature, k=5, parallel=3, alpha=0.5), rows()
    a, b, c = m.dictionaries
    alone = TopK(D, F, 5).double()
    total = torch.zeros((), dtype=torch.float64)
    for one in (a, b, c):
        alone.load_state_dict({k: v for k, v in one.state_dict().items() if not k.startswith("others")})
        total += alone.loss(x, x).total.detach()
    alike = (agreement(a.W_dec_FD, b.W_dec_FD) + agreement(a.W_dec_FD, c.W_dec_FD) + agreement(b.W_dec_FD, c.W_dec_FD)) / 3
    torch.testing.assert_close(m.loss(x, x).total, total + 0.5 * (1 - alike))


def test_mutual_feature_of_twins_pays_nothing_and_trains_all() -> None:
    m, x = MutualFeature(D, F, 5, seed=3), rows(64).float()
    twin = MutualFeature(D, F, 5, seed=3)
    twin.others[0].load_state_dict({k: v for k, v in twin.state_dict().items() if not k.startswith("others")})
    paid = [one.loss(x, x).parts["agreement"].item() for one in (twin, m)]
    assert abs(paid[0]) < 1e-6 < paid[1]
    before = [d.W_dec_FD.detach().clone() for d in m.dictionaries]
    train({"m": m}, TensorStream(x, 32), Recipe(steps=3, lr=0.01))
    for old, one in zip(before, m.dictionaries, strict=True):
        assert not torch.equal(old, one.W_dec_FD)
        torch.testing.assert_close(one.W_dec_FD.detach().norm(dim=-1), torch.ones(F))
        assert int(one.idle_F.max()) <= 3 * 32 + 64


# ------------------------------------------------------------------------------------------------ penalties


@pytest.mark.parametrize("cls", [ReLU, Gated, JumpReLU, PAnnealed, GatedPAnnealed])
def test_penalty_rises_over_the_warm_up(cls: type) -> None:
    m, x = built(cls, warmup=4), rows()
    part = "l0_penalty" if cls is JumpReLU else "l1"
    paid = []
    for step in range(6):
        paid.append(float(m.loss(x, x).parts[part].detach()))
        with torch.no_grad():
            m.steps += 1
        assert m.rise == min(1.0, (step + 1) / 4)
    assert paid == pytest.approx([paid[4] * r for r in (0, 0.25, 0.5, 0.75, 1, 1)])


def test_p_falls_in_a_line() -> None:
    m = PAnnealed(D, F, p_end=0.2, hold=10, anneal=40)
    assert [m.p(s) for s in (0, 10, 30, 50, 99)] == pytest.approx([1, 1, 0.6, 0.2, 0.2])


@pytest.mark.parametrize("cls", [PAnnealed, GatedPAnnealed])
def test_p_annealed_pays_for_the_power_and_keeps_the_price(cls: type) -> None:
    m, x = built(cls, p_end=0.2, hold=2, anneal=4, warmup=0, l1=0.3), rows()
    paid = pre_activations(m, x).relu() * (m.W_dec_FD.norm(dim=-1) if cls is PAnnealed else 1)      # W_enc and b_enc are the gate's
    first = m.loss(x, x).parts["l1"]
    same_gradients(m, first, 0.3 * paid.sum(-1).mean() / D)
    for step in range(1, 9):
        m.steps += 1
        weight, p = float(m.weight), 1 - 0.2 * min(4, max(0, step - 2))
        got = m.loss(x, x).parts["l1"]
        want = ((paid + 1e-3) ** p - math.pow(1e-3, p)).sum(-1).mean()
        same_gradients(m, got, 0.3 * weight * want / D)
        torch.testing.assert_close(got, first)                  # the batch is the same, so the weight makes up for p exactly
    assert float(m.weight) != 1.0
