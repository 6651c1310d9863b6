"""DIFF and SPARSEK against their formulas."""

import math

import pytest
import torch
from trained_inputs import SIZES, gradients, qkv

import rarefy.attention.trained.sparsek as sparsek_module
from rarefy.attention.trained.diff import Diff
from rarefy.attention.trained.projection import sparsek
from rarefy.attention.trained.sparsek import SparseK
from rarefy.errors import BadInput


def causal_map(q, k):
    T, S = len(q), len(k)
    return (q @ k.T / q.shape[-1] ** 0.5).masked_fill(~torch.ones(T, S, dtype=torch.bool).tril(S - T), -torch.inf).softmax(-1)


@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize(("T", "S"), [(9, 9), (4, 9)])
def test_diff_and_its_gradients_are_the_formula(key_heads, T, S):
    q, k, v = leaves = qkv(T, S, key_heads=key_heads, grad=True)
    method = Diff(4, key_heads, 6, layer=2, seed=3).double()
    lq1, lk1, lq2, lk2 = method.lambda_4D
    init = 0.8 - 0.6 * math.exp(-0.6)
    weight = torch.exp(lq1 @ lk1) - torch.exp(lq2 @ lk2) + init
    rows = []
    for b in range(2):
        for i in range(2):                                        # differential head i: layer heads 2i and 2i + 1
            of = [(2 * i + j) * key_heads // 4 for j in (0, 1)]
            pair = i * key_heads // 4
            value = torch.cat([v[b, 2 * pair], v[b, 2 * pair + 1]], -1)
            out = (causal_map(q[b, 2 * i], k[b, of[0]]) - weight * causal_map(q[b, 2 * i + 1], k[b, of[1]])) @ value
            out = out / (out.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * method.norm_D * (1 - init)
            rows += [out[:, :6], out[:, 6:]]
    wanted = torch.stack(rows).view(q.shape)
    got = method(*leaves)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    every = [*leaves, *method.parameters()]
    for a, b in zip(gradients(got, every), gradients(wanted, every), strict=True):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_diff_with_weight_zero_is_attention_of_the_first_halves():
    q, k, v = qkv(7)
    method = Diff(**SIZES).double()
    with torch.no_grad():                                         # exp(0) - exp(x) + 0.2 = 0
        method.lambda_4D.zero_()
        method.lambda_4D[2:, 0] = math.log(1 + method.lambda_init) ** 0.5
    assert method.weight().item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(method.maps(q, k, 6**-0.5)[:, 0], torch.stack([causal_map(q[b, 0], k[b, 0]) for b in range(2)]))


def test_diff_refuses_odd_heads():
    with pytest.raises(BadInput, match="key_heads=1"):
        Diff(2, 1, 6)


def by_bisection(u, k):
    low, high = u.min() - 2, u.max() + 1
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (u - middle).clamp(0, 1).sum() >= k else (low, middle)
    return (u - low).clamp(0, 1)


@pytest.mark.parametrize("spread", [0.01, 0.5, 5.0])
def test_sparsek_is_the_projection(spread):
    u = torch.randn(40, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * spread
    k = torch.arange(40)[:, None] % 20
    p = sparsek(u, k)
    torch.testing.assert_close(p.sum(-1), k[:, 0].clamp_max(17).double())
    for row in range(40):
        torch.testing.assert_close(p[row], torch.ones(17, dtype=torch.float64) if k[row] >= 17 else by_bisection(u[row], float(k[row])))
    ties = sparsek(torch.tensor([2.0, 2.0, 2.0, -1.0, -torch.inf]), torch.tensor([2]))
    torch.testing.assert_close(ties, torch.tensor([2 / 3, 2 / 3, 2 / 3, 0.0, 0.0]))


def test_sparsek_jacobian_is_that_of_differences_and_its_shape_the_papers():
    u = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    k = torch.full((6, 1), 3)
    assert torch.autograd.gradcheck(lambda x: sparsek(x, k), [u])
    p = sparsek(u, k)
    jacobian = torch.autograd.functional.jacobian(lambda x: sparsek(x[None], k[:1])[0], u[0].detach())
    part = ((p[0] > 0) & (p[0] < 1)).double()
    torch.testing.assert_close(jacobian, torch.diag(part) - torch.outer(part, part) / part.sum())


@pytest.mark.parametrize("k", [0, 3])
def test_sparsek_attention_and_its_gradients_are_the_formula(k):
    leaves = qkv(15, grad=True)
    method = SparseK(**SIZES, budget=0.5, k=k, window=3).double()
    with torch.no_grad():
        method.slope_G.copy_(torch.tensor([0.05, -0.05]))
    q, keys, v = leaves
    rows = []
    for b in range(2):
        for h in range(4):
            g, out = h // 2, []
            u = v[b, g] @ method.score_GD[g] + method.slope_G[g] * torch.arange(15)
            for t in range(15):
                old = max(0, t - 2)                               # keys that have left the window
                count = k or max(0, round(0.5 * (t + 1)) - (t + 1 - old))
                gate = torch.cat([sparsek(u[:old], torch.tensor([count])) if old else u[:0], u.new_ones(t + 1 - old)])
                on = (gate > 0).nonzero()[:, 0]
                out.append(((keys[b, g, on] @ q[b, h, t] / 6**0.5).softmax(0) * gate[on]) @ v[b, g, on])
            rows.append(torch.stack(out))
    wanted, got = torch.stack(rows).view(q.shape), method(*leaves)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    every = [*leaves, *method.parameters()]
    for a, b in zip(gradients(got, every), gradients(wanted, every), strict=True):
        assert b.abs().sum() > 0                                  # the scorer among them
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("k", [0, 4])
@pytest.mark.parametrize(("T", "causal"), [(40, True), (17, True), (40, False)])
def test_sparsek_is_the_same_however_many_queries_are_worked_on_at_a_time(monkeypatch, k, T, causal):
    """And with a fixed k, keys that were dropped are forgotten without effect."""
    leaves = q, keys, v = qkv(T, 40, batch=1, seed=4, grad=True)
    method = SparseK(**SIZES, budget=0.4, k=k, window=3).double()
    mask = method.choice(q, keys, v, None, 0.4, causal)
    wanted = method.naive(mask, q, keys, v, None, 0.4, causal)
    every = [*leaves, *method.parameters()]
    slopes = gradients(wanted, every)
    for rows, whole in ((64, 4), (5, 4), (5, 0)):                       # lists, and matrices over the whole context
        monkeypatch.setattr(sparsek_module, "ROWS", rows)
        monkeypatch.setattr(sparsek_module, "WHOLE", whole)
        got = method.attend(q, keys, v, scale=0.4, causal=causal)
        torch.testing.assert_close(got, wanted)
        assert method._kept == mask.sum()
        method.measured_density()
        for a, b in zip(gradients(got, every), slopes, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_a_key_that_sparsek_drops_never_returns():
    q, k, v = qkv(40, batch=1, seed=4)
    kept = SparseK(**SIZES, k=4, window=3).double().select(q, k, v).mask[0]
    for h in range(4):
        for s in range(40):
            seen = kept[h, s:, s].int()
            assert (seen.diff() <= 0).all() and seen[0] == 1


@pytest.mark.parametrize("method", [Diff(**SIZES).double(), SparseK(**SIZES, k=4, window=3).double()])
def test_one_query_at_a_time_gives_what_the_whole_gives(method):
    q, k, v = qkv(14)
    with torch.no_grad():
        whole = method.attend(q, k, v, scale=0.4)
        for t in range(14):
            step = method.attend(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], scale=0.4)
            torch.testing.assert_close(step[:, :, 0], whole[:, :, t], rtol=1e-10, atol=1e-12)
