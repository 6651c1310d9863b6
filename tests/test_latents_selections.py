"""Selections of the TopK family against formulas written out densely, brute force, and codes that were planted.

Shape letters: B = rows, D = width, F = latents, K = kept.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rarefy.errors import BadInput, Unsupported
from rarefy.fit import Recipe, train
from rarefy.gradient_stream import GradientStream
from rarefy.jobs.dictionaries import TopContexts, active
from rarefy.latents.abs_topk import AbsTopK
from rarefy.latents.annealed_topk import AnnealedTopK
from rarefy.latents.annealing import annealed
from rarefy.latents.batch_topk import BatchTopK
from rarefy.latents.convert import to_jumprelu
from rarefy.latents.gradient_topk import GradientTopK
from rarefy.latents.group_max import GroupMax
from rarefy.latents.k_sparse import KSparse
from rarefy.latents.top_afa import TopAFA, nearest_norm
from rarefy.latents.topk import TopK
from rarefy.selection import Selection
from rarefy.site import capture, replaced
from rarefy.store.methods import load, save
from rarefy.streams import TensorStream
from site_models import build

D, F = 11, 30


def rows(n: int = 63, seed: int = 3) -> Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 4 + 1


def built(cls: type, **arguments: object):  # type: ignore[no-untyped-def]
    method = cls(D, F, **arguments).double()
    method.initialise(rows(), rows()[:, : method.d_out])
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in method.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.2)
    return method


def dense_pre(m: TopK, x: Tensor) -> Tensor:
    x = x * m.scale
    return (x if m.centre_D is None else x - m.b_dec_D) @ m.W_enc_FD.T + m.b_enc_F


def same_loss_and_gradients(m: TopK, part: str, want: Tensor, x: Tensor, names: tuple[str, ...] = ()) -> None:
    got = m.loss(x, x).parts[part]
    torch.testing.assert_close(got, want)
    parameters = dict(m.named_parameters())
    at = [parameters[name] for name in names or parameters]
    pairs = zip(torch.autograd.grad(got, at), torch.autograd.grad(want, at, allow_unused=True, retain_graph=True), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def kept_by(rank: Tensor, k: int) -> Tensor:
    """[B, F] bool: the k that Python's sort puts first."""
    keep = torch.zeros_like(rank, dtype=torch.bool)
    for b, row in enumerate(rank.tolist()):
        keep[b, sorted(range(len(row)), key=lambda i: -row[i])[:k]] = True
    return keep


# ------------------------------------------------------------------------------------------------------- AbsTopK


def test_abs_topk_is_the_nearest_vector_with_k_entries() -> None:
    """Over every support of k latents, the squared distance to the pre-activations is least for the one chosen."""
    m, x = AbsTopK(D, 8, k=3).double().eval(), rows(20)
    pre = dense_pre(m, x)
    f = m.select(x).dense
    supports = list(itertools.combinations(range(8), 3))
    distances = torch.stack([(pre ** 2).sum(1) - (pre[:, s] ** 2).sum(1) for s in map(list, supports)])
    torch.testing.assert_close(((pre - f) ** 2).sum(1), distances.amin(0))
    assert ((f != 0).sum(1) == 3).all() and (f < 0).any() and torch.equal(f[f != 0], pre[f != 0])


def test_abs_topk_loss_and_gradients_equal_dense() -> None:
    m, x = built(AbsTopK, k=5), rows()
    pre = dense_pre(m, x)
    want = ((pre * kept_by(pre.abs(), 5)) @ m.W_dec_FD + m.b_dec_D - x * m.scale).pow(2).mean()
    same_loss_and_gradients(m, "mse", want, x)
    assert float(m.loss(x, x).parts["l0"]) == 5


@pytest.mark.parametrize("aux_k", [3, 20])
def test_abs_topk_dead_latents_explain_with_either_sign(aux_k: int) -> None:
    m, x = built(AbsTopK, k=5, aux_k=aux_k, dead_after=10), rows()
    m.idle_F[:8] = 100
    pre = dense_pre(m, x)
    error = (x * m.scale - (pre * kept_by(pre.abs(), 5)) @ m.W_dec_FD - m.b_dec_D).detach()
    z = (pre * kept_by(torch.where(m.idle_F > 10, pre.abs(), -1.0), min(aux_k, 8)))
    same_loss_and_gradients(m, "aux", (error - z @ m.W_dec_FD).pow(2).mean() / 32, x)


def test_latents_that_only_fire_negative_are_alive() -> None:
    m, x = built(AbsTopK, k=5), rows()
    m.loss(x, x)
    negative = (m.select(x).dense < 0).any(0) & ~(m.select(x).dense > 0).any(0)
    assert negative.any() and (m.idle_F[negative] == 0).all()


def test_negative_weights_are_active_in_both_forms() -> None:
    weight = torch.tensor([[0.0, -2.0, 3.0, 1.0], [0.0, 0.0, -1.0, 4.0]])
    mask = torch.tensor([[True, True, True, False], [True, False, True, False]])
    assert torch.equal(Selection(4, weight, mask_=mask).on, torch.tensor([[False, True, True, False], [False, False, True, False]]))
    m, x = built(AbsTopK, k=5).eval(), rows()
    latent, value, row = active(m, x)
    assert torch.equal(torch.zeros(63, F, dtype=torch.float64).index_put((row, latent), value), m.select(x).dense) and (value < 0).any()


def test_strongest_contexts_are_those_of_either_sign() -> None:
    top = TopContexts(2, keep=2)
    top.add(torch.tensor([0, 0, 0]), torch.tensor([1.0, -3.0, 2.0]), torch.tensor([10, 11, 12]), 5)
    top.add(torch.tensor([1]), torch.tensor([-0.5]), torch.tensor([13]), 5)
    assert top.at_FK.tolist() == [[11, 12], [13, -1]] and top.value_FK[0].tolist() == [-3.0, 2.0] and float(top.value_FK[1, 0]) == -0.5


# ------------------------------------------------------------------------------------------------------ GroupMax


def test_group_max_loss_and_gradients_equal_dense() -> None:
    m, x = built(GroupMax, k=6), rows()
    pre = dense_pre(m, x)
    keep = torch.zeros_like(pre, dtype=torch.bool)
    for b, group in itertools.product(range(len(x)), range(6)):
        keep[b, max(range(5 * group, 5 * group + 5), key=pre[b].tolist().__getitem__)] = True
    want = ((pre.relu() * keep) @ m.W_dec_FD + m.b_dec_D - x * m.scale).pow(2).mean()
    same_loss_and_gradients(m, "mse", want, x)


def test_group_max_follows_a_permutation_within_groups_and_of_groups() -> None:
    m, x = built(GroupMax, k=6).eval(), rows()
    order = torch.cat([torch.randperm(5) + 5 * g for g in torch.randperm(6).tolist()])
    before = m.select(x).mask
    with torch.no_grad():
        m.W_enc_FD.copy_(m.W_enc_FD[order])
        m.b_enc_F.copy_(m.b_enc_F[order])
    assert torch.equal(m.select(x).mask, before[:, order]) and (before.view(63, 6, 5).sum(-1) == 1).all()


def test_group_max_needs_equal_groups() -> None:
    with pytest.raises(BadInput, match=r"width=30 does not divide into k=7 equal groups.*k to 6, 5"):
        GroupMax(D, F, k=7)


# -------------------------------------------------------------------------------------------------- AnnealedTopK


def rescaled(m: TopK, factor_F: Tensor) -> TopK:
    """The same function: encoder rows and biases over the factors, decoder rows times them."""
    with torch.no_grad():
        m.W_enc_FD.div_(factor_F[:, None])
        m.b_enc_F.div_(factor_F)
        m.W_dec_FD.mul_(factor_F[:, None])
    return m


def test_rescaling_latents_changes_nothing() -> None:
    x, factor_F = rows(), torch.logspace(-2, 2, F, dtype=torch.float64)
    one, other = (built(AnnealedTopK, k=5).eval() for _ in range(2))
    rescaled(other, factor_F)
    torch.testing.assert_close(other(x), one(x))
    assert torch.equal(other.select(x).mask, one.select(x).mask)
    plain, scaled = built(TopK, k=5).eval(), rescaled(built(TopK, k=5).eval(), factor_F)
    assert not torch.equal(scaled.select(x).mask, plain.select(x).mask)


def test_annealed_loss_and_gradients_equal_dense() -> None:
    m, x = built(AnnealedTopK, k=5, k_begin=9, anneal=4), rows()
    m.steps.fill_(1)                                                # 9 - 4/4 = 8
    pre = dense_pre(m, x)
    want = ((pre * kept_by(pre * m.W_dec_FD.norm(dim=1), 8)).relu() @ m.W_dec_FD + m.b_dec_D - x * m.scale).pow(2).mean()
    same_loss_and_gradients(m, "mse", want, x)


def test_annealed_dead_latents_are_ranked_by_norm_too() -> None:
    m, x = built(AnnealedTopK, k=5, anneal=0, aux_alpha=1 / 32, aux_k=3, dead_after=10), rows()
    m.idle_F[:8] = 100
    pre, norm = dense_pre(m, x), m.W_dec_FD.norm(dim=1)
    error = (x * m.scale - (pre * kept_by(pre * norm, 5)).relu() @ m.W_dec_FD - m.b_dec_D).detach()
    z = (pre * kept_by(torch.where(m.idle_F > 10, pre * norm, -torch.inf), 3)).relu()
    same_loss_and_gradients(m, "aux", (error - z @ m.W_dec_FD).pow(2).mean() / 32, x)


def test_schedule_is_the_line() -> None:
    assert [annealed(20, 4, 8, t) for t in range(11)] == [20, 18, 16, 14, 12, 10, 8, 6, 4, 4, 4]
    assert [annealed(5, 2, 2, t) for t in range(4)] == [5, 4, 2, 2]          # 3.5 rounds to the even 4
    assert annealed(20, 4, 0, 0) == 4


@pytest.mark.parametrize("cls", [AnnealedTopK, KSparse])
def test_training_keeps_to_the_schedule_and_use_does_not(cls: type, tmp_path: Path) -> None:
    m, x = cls(D, F, k=4, k_begin=20, anneal=8), rows(40).float()
    train({"m": m}, TensorStream(x, 20), Recipe(steps=11, log_every=1, save_every=5), tmp_path)
    assert int(m.steps) == 11 and m.select(x).index.shape == (40, 4)
    m.steps.fill_(3)
    assert m.train().select(x).index.shape == (40, 14)
    with torch.no_grad():
        assert m.select(x).index.shape == (40, 4)
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0].split("\t")[0])["step"] == 1


def test_k_begin_below_k_is_refused() -> None:
    with pytest.raises(BadInput, match="k_begin=3 must be at least k=4"):
        AnnealedTopK(D, F, k=4, k_begin=3)
    assert AnnealedTopK(4, F, k=9).k_begin == 9 and AnnealedTopK(60, F, k=9).k_begin == F


# ------------------------------------------------------------------------------------------------------- KSparse


def test_k_sparse_loss_and_gradients_equal_dense() -> None:
    """One matrix gets the gradient of both its uses; latents that are kept though negative keep their sign."""
    m, x = built(KSparse, k=20, anneal=0), rows()
    w, s = m.W_enc_FD, m.scale
    z = (x * s) @ w.T + m.b_enc_F
    z = z * kept_by(z, 20)
    want = (z @ w + m.b_dec_D - x * s).pow(2).mean()
    assert (z < 0).any() and set(m.loss(x, x).parts) == {"mse", "fvu", "l0", "dead"}
    same_loss_and_gradients(m, "mse", want, x)


def test_k_sparse_holds_one_matrix(tmp_path: Path) -> None:
    m, x = built(KSparse, k=5, alpha=2.0), rows()
    assert set(m.state_dict()) == {"W_enc_FD", "b_enc_F", "b_dec_D", "scale", "scale_out", "idle_F", "steps"}
    save(m, tmp_path / "m")
    other = load(tmp_path / "m")
    assert isinstance(other, KSparse) and other.W_dec_FD is other.W_enc_FD
    assert torch.equal(other(x), m.eval()(x))


def test_k_sparse_keeps_alpha_k_in_use_and_k_in_training() -> None:
    m, x = built(KSparse, k=4, alpha=2.5, anneal=0), rows()
    assert m.train().select(x).index.shape[-1] == 4 and m.eval().select(x).index.shape[-1] == 10
    assert m.budget == 10 / F
    for alpha in (0.9, 8, True):
        with pytest.raises(BadInput, match="alpha"):
            KSparse(D, F, k=4, alpha=alpha)


def test_k_sparse_finds_the_support_in_an_incoherent_dictionary() -> None:
    """Of coherence mu, the k largest of W x are the support where k mu <= z_min / (2 z_max) (theorem 3.1)."""
    hadamard = torch.ones(1, 1)
    for _ in range(6):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    atoms = torch.cat([torch.eye(64), hadamard / 8])
    assert 3 * float((atoms @ atoms.T - torch.eye(128)).abs().max()) <= 0.9 / (2 * 1.1)
    m = KSparse(64, 128, k=3).eval()
    with torch.no_grad():
        m.W_enc_FD.copy_(atoms)
    generator = torch.Generator().manual_seed(0)
    on = torch.rand(200, 128, generator=generator).argsort(1) < 3
    codes = on * (0.9 + 0.2 * torch.rand(200, 128, generator=generator))
    assert torch.equal(m.select(codes @ atoms).mask, on)


# ------------------------------------------------------------------------------------------------------- TopAFA


@pytest.mark.parametrize("f", [1, 9, 700])
def test_top_afa_takes_the_k_nearest_to_the_norm(f: int) -> None:
    """By trying every k, for targets from far below the largest score to far above all of them."""
    generator = torch.Generator().manual_seed(f)
    score = torch.randn(40, f, dtype=torch.float64, generator=generator).relu() + (0.001 if f == 9 else 0)
    target = torch.logspace(-1, 2, 40, dtype=torch.float64) * score.norm(dim=1) / 10
    score[3], target[5] = 0, 0
    mask = nearest_norm(score, target)
    for row, want, got in zip(score, target, mask, strict=True):
        ordered = row.sort(descending=True).values
        gaps = [abs(float(ordered[:k].norm()) - float(want)) for k in range(1, f + 1)]
        best = next(k for k, gap in enumerate(gaps, 1) if gap <= min(gaps) + 1e-12)
        assert int(got.sum()) == best and (best == f or row[got].amin() >= row[~got].amax())


def test_top_afa_finds_the_support_size_of_orthonormal_atoms() -> None:
    m = TopAFA(64, 64).eval()
    atoms = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(2)))[0]
    generator = torch.Generator().manual_seed(3)
    codes = (torch.rand(300, 64, generator=generator) < torch.linspace(0.02, 0.9, 300)[:, None]) * (0.5 + torch.rand(300, 64, generator=generator))
    codes = codes[(codes > 0).any(1)]
    with torch.no_grad():
        m.W_enc_FD.copy_(atoms)
        m.W_dec_FD.copy_(atoms)
    x = codes @ atoms
    chosen = m.select(x)
    assert torch.equal(chosen.dense > 1e-4, codes > 0)              # one that weighs 1e-7 may come along: it moves no norm
    assert (chosen.count - (codes > 0).sum(1)).abs().max() <= 1
    torch.testing.assert_close(m(x), x, atol=1e-4, rtol=1e-4)


def test_top_afa_loss_and_gradients_equal_dense() -> None:
    m, x = built(TopAFA, aux_k=3, dead_after=10, afa=0.3), rows()
    m.idle_F[:8] = 100
    pre, norm_F, centred = dense_pre(m, x).relu(), m.W_dec_FD.norm(dim=1), x * m.scale - m.b_dec_D
    keep = torch.zeros_like(pre, dtype=torch.bool)
    for b in range(len(x)):
        tries = [kept_by((pre[b] * norm_F).detach()[None], k)[0] for k in range(1, F + 1)]
        keep[b] = min(tries, key=lambda on: abs((pre[b] * norm_F * on).norm().item() - centred[b].norm().item()))  # noqa: B023
    f = pre * keep
    assert len(keep.sum(1).unique()) > 3
    same_loss_and_gradients(m, "mse", (f @ m.W_dec_FD + m.b_dec_D - x * m.scale).pow(2).mean(), x)
    same_loss_and_gradients(m, "afa", 0.3 * ((f * norm_F).norm(dim=1) - centred.norm(dim=1)).pow(2).mean(), x)


# -------------------------------------------------------------------------------------------------- GradientTopK


def test_without_gradient_it_is_topk() -> None:
    """With none, with zeros, and with beta = 0, the same latents, loss and gradients as TopK."""
    x, plain = rows(), built(TopK, k=5, aux_k=3, dead_after=10)
    plain.idle_F[:8] = 100
    idle, want = plain.idle_F.clone(), plain.loss(x, x)
    names = ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D")
    grads = torch.autograd.grad(want.total, [getattr(plain, n) for n in names])
    for beta, y in ((2.0, x), (2.0, torch.cat([x, 0 * x], 1)), (0.0, torch.cat([x, rows(seed=5)], 1))):
        m = built(GradientTopK, k=5, aux_k=3, dead_after=10, beta=beta)
        m.idle_F.copy_(idle)
        got = m.loss(x, y)
        assert torch.equal(m.idle_F, plain.idle_F) and got.parts.keys() == want.parts.keys()
        torch.testing.assert_close(got.total, want.total)
        for a, b in zip(torch.autograd.grad(got.total, [getattr(m, n) for n in names]), grads, strict=True):
            torch.testing.assert_close(a, b)


def test_gradient_loss_and_gradients_equal_dense() -> None:
    m, x, g = built(GradientTopK, k=5, beta=0.7), rows(300), rows(300, seed=5) * 1e-3
    m.initialise(x, torch.cat([x, g], 1))
    torch.testing.assert_close((g * m.scale_gradient).pow(2).mean(), torch.ones((), dtype=torch.float64))
    z = dense_pre(m, x)
    key = z + 0.7 * z * (m.W_dec_FD @ (g * m.scale_gradient).T).T.abs()
    keep = kept_by(key, 5)
    assert not torch.equal(keep, kept_by(z, 5))
    want = ((z.relu() * keep) @ m.W_dec_FD + m.b_dec_D - x * m.scale).pow(2).mean()
    got = m.loss(x, torch.cat([x, g], 1))
    torch.testing.assert_close(got.parts["mse"], want)
    at = [m.W_enc_FD, m.b_enc_F, m.W_dec_FD, m.b_dec_D]
    for a, b in zip(torch.autograd.grad(got.total, at), torch.autograd.grad(want, at), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_another_width_are_refused() -> None:
    m, x = built(GradientTopK, k=5), rows()
    with pytest.raises(BadInput, match="width 15; need 11, or 22"):
        m.loss(x, rows()[:, :4].repeat(1, 4)[:, :15])


def test_gradient_stream_gives_the_models_own_gradient() -> None:
    """Against a difference of the model's loss as its activations are moved; rows are those that flow at the site."""
    model, name = build("gpt2").double(), "layers.0.resid_post"
    ids = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(0))
    stream = GradientStream(model, name, ids, 8, buffer=4, at_once=3)
    x, y = stream.take(ids)
    assert x.shape == (32, model.config.hidden_size) and torch.equal(y[:, : x.shape[1]], x)
    assert torch.equal(x, capture(model, name, input_ids=ids)[name][:, 1:].flatten(0, 1))
    g_BTD = y[:, x.shape[1] :].view(4, 8, -1)
    along = torch.randn(g_BTD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(step: float) -> float:
        def moved(v: Tensor) -> Tensor:
            return torch.cat([v[:, :1], v[:, 1:] + step * along], 1)

        with torch.no_grad(), replaced(model, {name: moved}):
            chances = model(input_ids=ids).logits.log_softmax(-1)
        return -float(chances[:, :-1].gather(-1, ids[:, 1:, None]).sum())

    assert float((g_BTD * along).sum()) == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, rel=1e-5)
    batch_x, batch_y = next(stream.batches())
    at = torch.cdist(batch_x, x).argmin(1)
    torch.testing.assert_close(batch_y, y[at])
    assert torch.equal(batch_y[:, : x.shape[1]], batch_x) and len(at.unique()) == 8 and "gradient" in stream.made_from


def test_small_latents_that_drive_the_loss_are_kept() -> None:
    """Eight features at 1 that the loss does not see, and eight at 0.2 that it does: with k = 8 TopK keeps the former."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200, 16, generator=generator) * 0.1 + torch.cat([torch.ones(8), torch.full((8,), 0.2)])
    g = torch.cat([torch.zeros(200, 8), torch.randn(200, 8, generator=generator).sign()], 1)
    m = GradientTopK(16, 16, k=8, beta=10.0)
    with torch.no_grad():
        m.W_enc_FD.copy_(torch.eye(16))
        m.W_dec_FD.copy_(torch.eye(16))
    assert m.choose_by(x, g).mask[:, 8:].all() and m.select(x).mask[:, :8].all()


# ------------------------------------------------------------------------------------------------------- convert


@pytest.mark.parametrize(("cls", "d_out"), [(TopK, 0), (TopK, 7), (AnnealedTopK, 0), (AnnealedTopK, 7), (BatchTopK, 0)])
def test_converted_fires_as_often(cls: type, d_out: int) -> None:
    m, x = built(cls, k=5, d_out=d_out), rows(200, 8)
    if cls is BatchTopK:
        m.train().loss(x, x)
    m.eval()
    before = {name: value.clone() for name, value in m.state_dict().items()}
    made = to_jumprelu(m, x)
    fire = int((m.select(x).dense > 0).sum())
    assert fire > 100 and int((made.select(x).dense > 0).sum()) == fire and made.budget == pytest.approx(fire / 200 / F)
    norm_F, theta = m.W_dec_FD.norm(dim=1), made.log_theta_F.exp()
    pre = ((x * m.scale) if d_out else (x * m.scale - m.b_dec_D)) @ m.W_enc_FD.T + m.b_enc_F
    assert int((pre * norm_F > theta).sum()) == fire and (theta == theta[0]).all()
    y = (pre * (pre * norm_F > theta)) @ m.W_dec_FD + m.b_dec_D
    torch.testing.assert_close(made(x), y / m.scale_out)
    torch.testing.assert_close(made.W_dec_FD.norm(dim=1), torch.ones(F, dtype=torch.float64))
    assert all(torch.equal(value, before[name]) for name, value in m.state_dict().items())


def test_converted_is_the_same_where_a_threshold_can_tell() -> None:
    """Orthonormal atoms and codes in [1, 2]: the k largest are those above any threshold below 1."""
    m = TopK(D, D, k=3)
    codes = torch.rand(50, D, generator=torch.Generator().manual_seed(1)).argsort(1).lt(3) * (1 + torch.rand(50, D))
    with torch.no_grad():
        m.W_enc_FD.copy_(torch.eye(D))
        m.W_dec_FD.copy_(torch.eye(D))
    made = to_jumprelu(m, codes)
    torch.testing.assert_close(made(codes), codes)
    assert 0.49 < made.log_theta_F.detach().exp()[0] < 1


@pytest.mark.parametrize("cls", [AbsTopK, GroupMax, KSparse])
def test_no_threshold_stands_for_these(cls: type) -> None:
    with pytest.raises(Unsupported, match="does not keep the largest positive latents"):
        to_jumprelu(built(cls, k=5), rows())


def test_convert_refuses_bad_rows() -> None:
    m = built(TopK, k=5)
    for bad, word in ((rows()[:, :4], r"\[63, 4\]"), (rows(0), r"\[0, 11\]"), (rows() * torch.nan, "NaN")):
        with pytest.raises(BadInput, match=word):
            to_jumprelu(m, bad)
    with torch.no_grad():
        m.b_enc_F.fill_(-1e6)
    with pytest.raises(BadInput, match="no latent"):
        to_jumprelu(m, rows())
