"""Attention by sparse maps, written out query by query with the peer's maps."""

import entmax as peer
import pytest
import torch

import rarefy
from rarefy.attention.mapped.entmax import Entmax
from rarefy.attention.mapped.pladis import Pladis
from rarefy.attention.mapped.rela import ReLA
from rarefy.attention.mapped.sigmoid import Sigmoid
from rarefy.attention.mapped.statistical_top_k import StatisticalTopK
from rarefy.attention.mapped.top_k import TopK

HEADS, KV_HEADS, D = 4, 2, 8


def qkv(T, S, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, HEADS, T, D, generator=generator, dtype=torch.float64) * 2
    k, v = torch.randn(2, 2, KV_HEADS, S, D, generator=generator, dtype=torch.float64).unbind()
    return q, k, v


def top_k(z, budget):
    keep = z.topk(max(1, round(budget * len(z)))).indices
    return torch.zeros_like(z).scatter(0, keep, z[keep].softmax(0))


def statistical(z, budget):
    least = z.mean() + z.std(correction=0) * torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - budget))
    keep = (z > least) | (z == z.max())
    return torch.where(keep, z.exp(), 0) / torch.where(keep, z.exp(), 0).sum()


MAPS = {
    "entmax": (lambda: Entmax(1.5), peer.entmax15), "sparsemax": (lambda: Entmax(2.0), peer.sparsemax),
    "by head": (lambda: Entmax(1.3, heads=HEADS).double(), lambda z: peer.entmax_bisect(z, 1.3, n_iter=100)),
    "pladis": (lambda: Pladis(1.7), lambda z: z.softmax(0) + 1.7 * (peer.entmax15(z, 0) - z.softmax(0))),
    "sigmoid": (Sigmoid, lambda z: 1 / (1 + len(z) * (-z).exp())),
    "top-k": (lambda: TopK(0.3), lambda z: top_k(z, 0.3)), "statistical": (lambda: StatisticalTopK(0.3), lambda z: statistical(z, 0.3)),
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(("T", "S", "causal"), [(11, 11, True), (3, 11, True), (5, 9, False), (1, 1, True)])
def test_query_by_query(name, T, S, causal):
    make, weights = MAPS[name]
    q, k, v = qkv(T, S)
    method = make()
    with torch.no_grad():
        got = method.attend(q, k, v, scale=0.7, causal=causal)
    kept = seen = 0
    for b in range(2):
        for h in range(HEADS):
            for t in range(T):
                n = S - T + t + 1 if causal else S
                w = weights(0.7 * k[b, h // 2, :n] @ q[b, h, t])
                torch.testing.assert_close(got[b, h, t], w @ v[b, h // 2, :n], rtol=1e-6, atol=1e-7)
                kept, seen = kept + int((w != 0).sum()), seen + n
    assert method.measured_density() == pytest.approx(kept / seen)


@pytest.mark.parametrize("name", MAPS)
def test_padding_of_either_side_changes_nothing(name):
    method = MAPS[name][0]()
    q, k, v = qkv(9, 9)
    with torch.no_grad():
        for real in (torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]] * 2).bool(), torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0, 0]] * 2).bool()):
            got = method.attend(q, k, v, scale=1.0, padding_BS=real)
            want = method.attend(q[:, :, real[0]], k[:, :, real[0]], v[:, :, real[0]], scale=1.0)
            torch.testing.assert_close(got[:, :, real[0]], want)
            assert got[:, :, ~real[0]].eq(0).all()


def test_rela_by_its_formula():
    q, k, v = qkv(7, 7)
    torch.manual_seed(0)
    method = ReLA(HEADS, D).double()
    with torch.no_grad():
        method.gain_N.normal_()
        method.gate_N.normal_()
        got = method(q, k, v)
        for b in range(2):
            for t in range(7):
                sums = []
                for h in range(HEADS):
                    w = (k[b, h // 2, : t + 1] @ q[b, h, t] / D**0.5).clamp_min(0)
                    sums.append(w @ v[b, h // 2, : t + 1])
                x = torch.cat(sums)
                want = method.gain_N * x / (x.square().mean() + 1e-8).sqrt() / (1 + (-method.gate_N * x).exp())
                torch.testing.assert_close(got[b, :, t].flatten(), want)


def test_a_rela_head_may_look_at_nothing():
    q, k, v = qkv(4, 4)
    got = ReLA()(-torch.ones_like(q), torch.ones_like(k), v)
    assert got.eq(0).all()


def test_rela_and_entmax_refuse_other_heads():
    q, k, v = qkv(4, 4)
    with pytest.raises(rarefy.BadInput, match="made for 2 heads of 8"):
        ReLA(2, 8)(q, k, v)
    with pytest.raises(rarefy.BadInput, match="each of 3 heads"):
        Entmax(1.5, heads=3)(q, k, v)


def test_heads_learn_their_own_alpha():
    """Heads whose target is softmax and sparsemax of the same scores: alpha goes down for one and up for the other."""
    q, k, v = qkv(12, 12)
    method = Entmax(1.5, heads=HEADS).double()
    with torch.no_grad():
        want = torch.cat([Entmax(1.1)(q, k, v)[:, :2], Entmax(1.9)(q, k, v)[:, 2:]], 1)
    optimiser = torch.optim.Adam(method.parameters(), 0.1)
    for _ in range(60):
        loss = (method(q, k, v) - want).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    alpha = 1 + method.logit_H.sigmoid()
    torch.testing.assert_close(alpha, torch.tensor([1.1, 1.1, 1.9, 1.9], dtype=torch.float64), rtol=0, atol=0.05)


@pytest.mark.parametrize("method", [Entmax(1.5), TopK(0.2), Sigmoid(), StatisticalTopK(0.2)], ids=lambda m: m.name)
def test_rows_in_pieces_and_gradients(method, monkeypatch):
    from rarefy.attention.mapped import base

    q, k, v = qkv(10, 10)
    whole = method(q, k, v)
    monkeypatch.setattr(base, "ROWS", 3)
    torch.testing.assert_close(method(q, k, v), whole)
    q.requires_grad_()
    v.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, v: method(q[:1, :, :5], k[:1, :, :5], v[:1, :, :5]), (q, v))
