"""RTPurbo, the Routing Transformer, SEA and SMA against their formulas, one query at a time."""

import pytest
import torch
from torch.nn.functional import layer_norm
from trained_inputs import SIZES, gradients

from rarefy.attention.trained.purbo import Purbo
from rarefy.attention.trained.routing import Routing
from rarefy.attention.trained.sea import SEA
from rarefy.attention.trained.sma import SMA
from rarefy.errors import BadInput


def qkv(T, S=None, batch=2, seed=0, grad=False):
    draw = torch.Generator().manual_seed(seed)
    S = S or T
    shapes = ((batch, 4, T, 6), (batch, 2, S, 6), (batch, 2, S, 6))
    return [torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=grad) for shape in shapes]


def each_query(q, k, v, keys_of):
    """softmax(q k / sqrt(D)) v over the keys that keys_of(b, h, position) lists."""
    B, H, T, D = q.shape
    S, rows = k.shape[2], []
    for b in range(B):
        for h in range(H):
            for t in range(T):
                at = keys_of(b, h, S - T + t)
                rows.append((k[b, h // 2, at] @ q[b, h, t] / D**0.5).softmax(0) @ v[b, h // 2, at])
    return torch.stack(rows).view(q.shape)


def dense(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def fewest(weights, p):
    """Indices of the largest weights whose sum first reaches p."""
    kept, total = [], 0.0
    for i in weights.argsort(descending=True).tolist():
        kept.append(i)
        total += weights[i].item()
        if total >= p:
            break
    return sorted(kept)


@pytest.mark.parametrize(("T", "S"), [(17, 17), (3, 17)])
def test_purbo_and_its_gradients_are_the_definition(T, S):
    leaves = q, k, v = qkv(T, S, grad=True)
    method = Purbo(**SIZES, p=0.7, d_index=3, window=4, sinks=2, retrieval="0, 3").double()

    def keys_of(b, h, at):
        if h not in (0, 3):
            return [s for s in range(at + 1) if s < 2 or at - s < 4]
        query, key = q[b, h, at - S + T] @ method.query_HDC[h], k[b, h // 2, : at + 1] @ method.key_GDC[h // 2]
        return fewest((key @ query / 3**0.5).softmax(0).detach(), 0.7)

    wanted, got = each_query(*leaves, keys_of), method(*leaves)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(got, leaves), gradients(wanted, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    counted = sum(len(keys_of(b, h, at)) for b in range(2) for h in range(4) for at in range(S - T, S))
    assert method.measured_density() == counted / (8 * sum(at + 1 for at in range(S - T, S)))


def test_purbo_with_p_one_is_dense_and_its_loss_the_kl_from_the_top_p_part():
    q, k, v = qkv(12)
    torch.testing.assert_close(Purbo(**SIZES, p=1.0).double()(q, k, v), dense(q, k, v))
    method = Purbo(**SIZES, p=0.6, d_index=3, retrieval="1").double()
    total = 0.0
    for b in range(2):
        for t in range(12):
            p = (k[b, 0, : t + 1] @ q[b, 1, t] / 6**0.5).softmax(0)
            at = fewest(p, 0.6)
            truth = p[at] / p[at].sum()
            guess = ((k[b, 0, : t + 1] @ method.key_GDC[0]) @ (q[b, 1, t] @ method.query_HDC[1]) / 3**0.5).softmax(0)[at]
            total = total + (truth * (truth / guess).log()).sum() / 24
    torch.testing.assert_close(method.distil(q, k, v, scale=6**-0.5, causal=True).total, total)
    assert Purbo(**SIZES, retrieval="none").double().distil(q, k, v, scale=1.0, causal=True).total == 0


def test_purbo_refuses_heads_that_are_not_there():
    for text in ("4", "1,,2", "first", ""):
        with pytest.raises(BadInput, match="retrieval="):
            Purbo(**SIZES, retrieval=text)


@pytest.mark.parametrize(("w", "T"), [(0, 16), (0, 4), (5, 16)])
def test_routing_and_its_gradients_are_the_definition(w, T):
    leaves = q, k, v = qkv(T, 16, grad=True)
    method = Routing(**SIZES, clusters=3, w=w, local_heads=1, window=4).double().eval()

    def members(x, h):                                            # cluster -> its tokens
        near = layer_norm(x.detach(), (6,)) @ method.centroid_HCD[h].T
        if not w:
            return [{n for n in range(len(x)) if near[n].argmax() == c} for c in range(3)]
        return [set(near[:, c].argsort(descending=True)[:w].tolist()) for c in range(3)]

    def keys_of(b, h, at):
        if h == 0:
            return list(range(max(0, at - 3), at + 1))
        queries, keys = members(q[b, h], h), members(k[b, h // 2], h)
        return sorted({s for c in range(3) for s in keys[c] if at - 16 + T in queries[c] and s <= at} | {at})

    wanted, got = each_query(*leaves, keys_of), method(*leaves)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(got, leaves), gradients(wanted, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_routing_with_one_cluster_is_dense():
    q, k, v = qkv(11)
    for w in (0, 11):
        torch.testing.assert_close(Routing(**SIZES, clusters=1, w=w).double()(q, k, v), dense(q, k, v))


def test_centroids_follow_their_tokens_while_training_only():
    q, k, v = qkv(30, batch=1)
    method = Routing(**SIZES, clusters=2, decay=0.9).double().eval()
    before = method.centroid_HCD.clone()
    method(q, k, v)
    assert torch.equal(method.centroid_HCD, before)
    method.train()(q, k, v)
    assert torch.equal(method.centroid_HCD, before)                # nor before the step is done: the backward pass may compute the layer again
    method.after_step(0)
    h = 3
    moved = torch.zeros_like(before[h])
    for x in (q[0, h], k[0, 1]):
        unit = layer_norm(x, (6,))
        best = (unit @ before[h].T).argmax(1)
        for c in range(2):
            moved[c] += (unit[best == c].mean(0) if (best == c).any() else before[h, c]) / 2
    torch.testing.assert_close(method.centroid_HCD[h], 0.9 * before[h] + 0.1 * moved)
    moved = method.centroid_HCD.clone()
    method.after_step(1)                                           # without a batch there is nothing to follow
    assert torch.equal(method.centroid_HCD, moved)


def test_planted_clusters_are_found_and_keep_their_pairs():
    draw = torch.Generator().manual_seed(2)
    group = torch.randint(3, (60,), generator=draw)
    centre = torch.nn.functional.normalize(torch.randn(3, 6, generator=draw, dtype=torch.float64), dim=-1) * 4
    q, k = (centre[group] + 0.3 * torch.randn(1, heads, 60, 6, generator=draw, dtype=torch.float64) for heads in (4, 2))
    method = Routing(**SIZES, clusters=3, decay=0.5, seed=4).double().train()
    for step in range(20):
        method(q, k, k)
        method.after_step(step)
    kept, same = method.eval().select(q, k, k).mask, group[:, None] == group
    assert kept[:, :, torch.ones(60, 60).tril().bool() & same].float().mean() > 0.95
    assert kept[:, :, torch.ones(60, 60).tril().bool() & ~same].float().mean() < 0.6


@pytest.mark.parametrize(("T", "causal"), [(15, True), (6, True), (15, False)])
def test_sma_and_its_gradients_are_the_definition(T, causal):
    leaves = q, k, v = qkv(T, 15, grad=True)
    method = SMA(**SIZES, window=3, lean=0.2).double()
    with torch.no_grad():
        method.log_temperature.fill_(0.4)
    logit = v.transpose(1, 2).flatten(2) @ method.logit_E2 + method.bias_2
    sure, rows, pairs = (logit / torch.tensor(0.4, dtype=torch.float64).exp()).softmax(-1)[..., 1], [], 0
    for b in range(2):
        fired = [s for s in range(15) if logit[b, s, 1] > logit[b, s, 0]]
        assert 3 < len(fired) < 15
        for h in range(4):
            for t in range(T):
                at = 15 - T + t
                place = fired.index(at) if at in fired else -1
                keys = [s for i, s in enumerate(fired) if abs(place - i) < 3 and (s <= at or not causal)] if place >= 0 else []
                pairs += len(keys)
                p = (k[b, h // 2, keys] @ q[b, h, t] / 6**0.5).softmax(0)
                rows.append(sure[b, at] * (p @ v[b, h // 2, keys]) if keys else torch.zeros(6, dtype=torch.float64))
    wanted, got = torch.stack(rows).view(q.shape), method.attend(q, k, v, scale=6**-0.5, causal=causal)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    seen = sum(16 - T + t for t in range(T)) if causal else 15 * T
    assert method.measured_density() == pairs / (8 * seen)
    every, spare = [*leaves, method.logit_E2, method.bias_2], torch.autograd.grad(got.sum(), method.log_temperature, retain_graph=True)
    assert spare[0] != 0
    for a, b in zip(gradients(got, every), gradients(wanted, every), strict=True):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_sma_fires_everywhere_or_nowhere():
    q, k, v = qkv(9)
    always, never = SMA(**SIZES, lean=1e3).double(), SMA(**SIZES, lean=-1e3).double()
    torch.testing.assert_close(always(q, k, v), dense(q, k, v))
    assert not never(q, k, v).any() and never.measured_density() == 0


def cell_of(s, n, cells=4):
    """Cell of key s for a query that sees n keys: the one that holds the middle of its stretch, the earlier of two."""
    return next(c for c in range(cells) if c * n < (s + 0.5) * cells <= (c + 1) * n)


@pytest.mark.parametrize(("T", "S", "causal"), [(150, 150, True), (30, 150, True), (5, 150, True), (130, 150, True), (20, 20, False)])
def test_performer_is_the_product_of_its_features(T, S, causal):
    q, k, v = qkv(T, S)
    method = SEA(**SIZES, features=5).double()

    def features(x):
        x = x * 0.4**0.5
        return (x @ method.random_MD.T - x.pow(2).sum(-1, keepdim=True) / 2).exp()

    weight = features(q) @ features(k.repeat_interleave(2, 1)).mT
    weight = weight * torch.ones(T, S, dtype=torch.float64).tril(S - T) if causal else weight
    torch.testing.assert_close(method.rough(q, k, v, 0.4, causal), weight @ v.repeat_interleave(2, 1) / weight.sum(-1, keepdim=True))


def test_performer_comes_near_attention_with_many_features():
    q, k, v = (0.5 * x for x in qkv(12))
    few, many = ((SEA(**SIZES, features=n).double().rough(q, k, v, 6**-0.5, True) - dense(q, k, v)).norm() for n in (60, 6000))
    assert many < 0.15 * few


def test_sea_attends_to_the_keys_of_its_best_cells():
    q, k, v = leaves = qkv(13, grad=True)
    method = SEA(**SIZES, budget=0.4, cells=4, features=5).double()
    logit = method.estimate(q, k, v, 6**-0.5, True).detach()

    def keys_of(b, h, at):
        order = sorted(range(at + 1), key=lambda s: (-logit[b, h, at, cell_of(s, at + 1)].item(), s))
        return sorted(order[: max(1, round(0.4 * (at + 1)))])

    wanted, got = each_query(*leaves, keys_of), method(*leaves)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(got, leaves), gradients(wanted, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_sea_estimate_and_loss_are_their_formulas():
    q, k, v = qkv(9)
    method = SEA(**SIZES, cells=4, features=5).double()
    rough, kl, mse = method.rough(q, k, v, 6**-0.5, True), 0.0, 0.0
    for b in range(2):
        for h in range(4):
            for t in range(9):
                inside = torch.cat([q[b, h, t], rough[b, h, t]])
                flat = ((inside @ method.in_HDF[h]).clamp_min(0) @ method.out_HDF[h]).view(4, 4)
                padded = torch.nn.functional.pad(flat, (1, 1))
                logit = torch.stack([(padded[:, c : c + 3] * method.kernel_1F3[0]).sum() for c in range(4)])
                p = (k[b, h // 2, : t + 1] @ q[b, h, t] / 6**0.5).softmax(0)
                truth = {c: sum(p[s] for s in range(t + 1) if cell_of(s, t + 1) == c) for c in {cell_of(s, t + 1) for s in range(t + 1)}}
                guess = dict(zip(truth, logit[list(truth)].softmax(0), strict=True))
                kl += sum(truth[c] * (truth[c] / guess[c]).log() for c in truth) / 72
                mse += sum((truth[c] - guess[c]) ** 2 for c in truth) / (72 * 4)
    loss = method.distil(q, k, v, scale=6**-0.5, causal=True)
    torch.testing.assert_close(loss.parts["kl"], kl)
    torch.testing.assert_close(loss.parts["mse"], mse)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss.total, list(method.parameters())))


@pytest.mark.parametrize("method", [
    Purbo(**SIZES, p=0.6, window=3, retrieval="1").double(), Routing(**SIZES, clusters=3).double().eval(), SMA(**SIZES, lean=0.2).double(),
    SEA(**SIZES, cells=4).double(),
])
def test_one_query_at_a_time_gives_what_the_whole_gives(method):
    q, k, v = qkv(14)
    with torch.no_grad():
        whole = method.attend(q, k, v, scale=0.4)
        for t in range(14):
            step = method.attend(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], scale=0.4)
            torch.testing.assert_close(step[:, :, 0], whole[:, :, t], rtol=1e-10, atol=1e-12)
