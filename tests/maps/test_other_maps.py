"""The maps beside entmax, each against its definition written plainly."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck

import rarefy
from rarefy import maps
from rarefy.maps.arm import CrossFeatures
from rarefy.maps.channel import channel_attention
from rarefy.tasks.ngram import NGram


def rows(*shape, seed=0, scale=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@pytest.mark.parametrize("k", [1, 2.5, 7, 12])
def test_soft_top_k_is_the_clipped_projection(k):
    z = rows(20, 12)
    low, high = z.amin(-1, keepdim=True) - 1, z.amax(-1, keepdim=True)
    for _ in range(200):
        tau = (low + high) / 2
        over = (z - tau).clamp(0, 1).sum(-1, keepdim=True) >= k
        low, high = torch.where(over, tau, low), torch.where(over, high, tau)
    torch.testing.assert_close(maps.soft_top_k(z, k), (z - low).clamp(0, 1), rtol=0, atol=1e-12)
    assert gradcheck(lambda z: maps.soft_top_k(z, k), (z[:3, :8].clone().requires_grad_(),)) if k < 8 else True


def test_soft_top_k_of_ties_and_masked_scores():
    z = torch.zeros(2, 6, dtype=torch.float64)
    z[1, 2:] = -torch.inf
    torch.testing.assert_close(maps.soft_top_k(z, 3), torch.tensor([[0.5] * 6, [1.0, 1, 0, 0, 0, 0]], dtype=torch.float64))
    torch.testing.assert_close(maps.soft_top_k(z, 1)[1], torch.tensor([0.5, 0.5, 0, 0, 0, 0], dtype=torch.float64))
    with pytest.raises(rarefy.BadInput, match="k=7"):
        maps.soft_top_k(z, 7)


def test_top_k_softmax_keeps_the_earlier_of_equals():
    z = torch.tensor([1.0, 3, 2, 2, 0])
    kept = torch.tensor([3.0, 2]).softmax(0)
    torch.testing.assert_close(maps.top_k_softmax(z, 2), torch.tensor([0, kept[0], kept[1], 0, 0]))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_statistical_top_k_keeps_about_k_of_normal_scores(share):
    z = rows(200, 2000, scale=4.0) + 7
    kept = (maps.statistical_top_k(z, share * 2000) > 0).double().sum(-1)
    spread = (share * (1 - share) * 2000) ** 0.5
    assert abs(kept.mean() - share * 2000) < 3 * spread / 200**0.5 + 1
    row = z[0]
    least = row.mean() + row.std(correction=0) * torch.special.ndtri(torch.tensor(1 - share, dtype=torch.float64))
    torch.testing.assert_close(maps.statistical_top_k(row, share * 2000), row.masked_fill(row <= least, -torch.inf).softmax(-1))


def test_statistical_top_k_looks_at_seen_scores_only():
    z = rows(1, 50)
    wide = torch.cat([z, torch.full((1, 30), -torch.inf)], 1)
    torch.testing.assert_close(maps.statistical_top_k(wide, 5)[:, :50], maps.statistical_top_k(z, 5))


def test_pladis_between_and_beyond():
    z = rows(4, 9)
    torch.testing.assert_close(maps.pladis(z, 0), z.softmax(-1))
    torch.testing.assert_close(maps.pladis(z, 1), maps.entmax15(z))
    beyond = maps.pladis(z, 2)
    torch.testing.assert_close(beyond.sum(-1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(beyond, 2 * maps.entmax15(z) - z.softmax(-1))
    assert (beyond < 0).any()


def test_pladis_retrieves_better_from_noisy_keys():
    """Row 140's check: a planted key among noise; the error of what is read falls for a moderate strength."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 400, 64, generator=generator, dtype=torch.float64).unbind()
    picked = torch.arange(100)
    queries = keys[picked] + 0.7 * torch.randn(100, 64, generator=generator, dtype=torch.float64)
    score = queries @ keys.mT / 64**0.5
    error = {s: (maps.pladis(score, s) @ values - values[picked]).square().mean().item() for s in (0.0, 1.0, 2.0)}
    assert error[1.0] < error[0.0] and error[2.0] < error[0.0]


def test_expected_alignment_is_the_average_over_every_way_of_halting():
    halt = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = torch.zeros(3, 4, dtype=torch.float64)
    for coins in itertools.product((0, 1), repeat=12):
        coin = torch.tensor(coins).view(3, 4)
        chance = torch.where(coin == 1, halt, 1 - halt).prod()
        at = 0
        for t in range(3):
            while at < 4 and not coin[t, at]:
                at += 1
            if at == 4:
                break
            want[t, at] += chance
    torch.testing.assert_close(maps.expected_alignment(halt), want)
    assert gradcheck(maps.expected_alignment, (halt.clone().requires_grad_(),))
    exact = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(maps.expected_alignment(exact), exact)                # p of 0 and 1, where the paper's division fails
    with pytest.raises(rarefy.BadInput, match=r"\[0, 1\]"):
        maps.expected_alignment(halt + 1)


def test_hard_alignment_only_moves_forward():
    halt = torch.tensor([[0.1, 0.9, 0.2, 0.8], [0.9, 0.4, 0.3, 0.7], [0.9, 0.9, 0.9, 0.1]])
    assert maps.hard_alignment(halt).int().tolist() == [[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]


def test_channel_attention_by_loops():
    q, k, v = rows(3, 2, 2, 3, 10).unbind()
    got = channel_attention(q, k, v, torch.tensor([1.5, 0.5], dtype=torch.float64).view(2, 1, 1))
    for b, h, c in itertools.product(range(2), range(2), range(3)):
        want = torch.zeros(10, dtype=torch.float64)
        for other in range(3):
            cosine = q[b, h, c] @ k[b, h, other] / (q[b, h, c].norm() * k[b, h, other].norm())
            want += max(0.0, (1.5, 0.5)[h] * cosine.item()) * v[b, h, other]
        torch.testing.assert_close(got[b, h, c], want)


def test_cross_features_by_loops_and_gates_are_sparse():
    torch.manual_seed(0)
    layer = CrossFeatures(6, 4, heads=2, crosses=3, alpha=2.0).double()
    x = rows(5, 6, 4)
    got, gates = layer(x), layer.gates(x)
    for b, k, o in itertools.product(range(5), range(2), range(3)):
        score = torch.stack([layer.query_KOE[k, o] @ layer.bilinear_KEE[k] @ x[b, f] for f in range(6)])
        weight = maps.sparsemax(score) * layer.power_KOF[k, o]
        torch.testing.assert_close(got[b, 3 * k + o], (weight[:, None] * x[b]).sum(0).exp())
    assert (gates == 0).double().mean() > 0.3
    with pytest.raises(rarefy.BadInput, match="embeddings"):
        layer(x[:, :5])


@pytest.mark.slow
def test_cross_features_find_a_planted_product():
    """y = a * c of five fields: the gates of what is learned rest on those two."""
    torch.manual_seed(0)
    raw = torch.rand(2000, 5) + 0.5
    y = raw[:, 0] * raw[:, 2]
    layer, head = CrossFeatures(5, 1, heads=1, crosses=4, alpha=1.7), torch.nn.Linear(4, 1)
    place = torch.nn.Parameter(torch.randn(5, 1))
    optimiser = torch.optim.Adam([*layer.parameters(), *head.parameters(), place], 1e-2)
    for _ in range(1500):
        loss = (head(layer(raw.log()[..., None]).squeeze(-1))[:, 0] - y).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    share = (layer.gates(raw.log()[..., None]) * layer.power_KOF).abs().mean((0, 1, 2))
    assert loss < 1e-3 * y.var() * 10 and set(share.topk(2).indices.tolist()) == {0, 2}


@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_sparsemax_layer_is_an_n_gram_model_exactly(n):
    generator = torch.Generator().manual_seed(0)
    table = torch.rand([3] * n, generator=generator, dtype=torch.float64)
    table /= table.sum(-1, keepdim=True)
    model, ids = NGram(table, 40), torch.randint(3, (4, 40), generator=generator)
    weights = model.weights(40)
    assert set(weights[:, n:].unique().tolist()) == {0.0, 1.0}
    got = model(ids)
    for b, t in itertools.product(range(4), range(n - 2, 40)):
        assert torch.equal(got[b, t], table[tuple(ids[b, t - n + 2 : t + 1])])
    if n > 2:
        assert (model(ids, maps.softmax) - got)[:, n:].abs().max() > 1e-3, "softmax with the same weights is not exact"


def test_n_gram_tables_are_checked():
    with pytest.raises(rarefy.BadInput, match="sum to one"):
        NGram(torch.ones(3, 3), 8)
    with pytest.raises(rarefy.BadInput, match="one size"):
        NGram(torch.ones(3, 4), 8)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e15])
def test_statistical_top_k_does_not_depend_on_the_size_of_scores(scale):
    z = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    vanishes = z * scale < (z * scale).amax(-1, keepdim=True) - 80                     # kept, but a weight of exp(-80)
    assert torch.equal((maps.statistical_top_k(z * scale, 10) > 0) | vanishes, (maps.statistical_top_k(z * 4, 10) > 0) | vanishes)
