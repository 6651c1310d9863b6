"""BLASST, SampleAttention, SpargeAttn, Twilight, TidalDecode and Squeezed Attention, each against loops over its paper's rule."""

import itertools
import math

import pytest
import torch

import rarefy
from rarefy.attention.cache import Cache
from rarefy.attention.dynamic.blasst import Blasst
from rarefy.attention.dynamic.sample import SampleAttention
from rarefy.attention.dynamic.sparge import SpargeAttention
from rarefy.attention.dynamic.squeezed import Squeezed, clustered
from rarefy.attention.dynamic.tidal import Tidal
from rarefy.attention.dynamic.twilight import Twilight, rounded

H, G, D = 4, 2, 8


def qkv(T, S, seed=0, sharp=1.5):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, H, T, D, generator=generator, dtype=torch.float64) * sharp
    k, v = torch.randn(2, 1, G, S, D, generator=generator, dtype=torch.float64).unbind()
    return q, k, v


def rows(q, k):
    """(h, t, position, logits of the keys seen) of causal attention."""
    T, S = q.shape[2], k.shape[2]
    for h, t in itertools.product(range(H), range(T)):
        at = S - T + t
        yield h, t, at, k[0, h // (H // G), : at + 1] @ q[0, h, t] / D**0.5


@pytest.mark.parametrize(("T", "S", "rows_"), [(37, 37, 1), (9, 37, 1), (37, 37, 8)])
def test_blasst_by_running_maxima(T, S, rows_):
    q, k, _ = qkv(T, S)
    dial, block = 6.0, 4
    got = Blasst(dial=dial, block=block, query_block=rows_).choose(q, k, True)
    want = torch.zeros_like(got)
    for h, _, at, z in rows(q, k):
        best = -math.inf
        for n in range(at // block + 1):
            top = z[n * block : (n + 1) * block].max().item()
            best = max(best, top)
            row = at // rows_ - (S - T) // rows_
            own = n >= at // rows_ * rows_ // block
            want[0, h, row, n] |= own or top - best >= math.log(dial / (at + 1))
    for row, n in itertools.product(*map(range, want.shape[2:])):             # a query block keeps what any of its queries sees as its own
        first = ((S - T) // rows_ + row) * rows_ // block
        last = min(((S - T) // rows_ + row + 1) * rows_, S) - 1
        if first <= n <= last // block:
            want[0, :, row, n] = True
    assert torch.equal(got, want)
    assert 0.2 < got.double().mean() < 0.9


def test_blasst_skips_mass_below_its_bound():
    """Row 85: what is skipped weighs less than threshold times keys, against the largest key."""
    q, k, _ = qkv(40, 40, seed=1)
    dial, block = 3.0, 4
    mask = Blasst(dial=dial, block=block).choose(q, k, True).repeat_interleave(block, -1)[..., :40]
    for h, t, at, z in rows(q, k):
        weight = z.softmax(0)
        skipped = weight[~mask[0, h, t, : at + 1]].sum()
        assert skipped <= dial * weight.max() + 1e-12


@pytest.mark.parametrize("causal", [True, False])
def test_sample_takes_the_fewest_columns_that_hold_p(causal):
    q, k, _ = qkv(40, 40)
    p, every = 0.7, 6
    method = SampleAttention(dial=p, every=every, window=0.1)
    got = method.choose(q, k, causal)
    for h in range(H):
        total, count = torch.zeros(40, dtype=torch.float64), torch.zeros(40)
        for t in range(39, -1, -every):
            n = t + 1 if causal else 40
            total[:n] += (k[0, h // 2, :n] @ q[0, h, t] / D**0.5).softmax(0)
            count[:n] += 1
        mass = total / count.clamp_min(1)
        order, kept, held = mass.sort(descending=True).indices, set(), 0.0
        for s in order.tolist():
            if held >= p * mass.sum():
                break
            kept.add(s)
            held += mass[s].item()
        for t in range(40):
            seen = range(t + 1) if causal else range(40)
            assert {s for s in seen if got[0, h, t, s]} == {s for s in seen if s in kept or t - s < 4}
    with pytest.raises(rarefy.BadInput, match="every"):
        SampleAttention(every=0)


def test_sample_finds_planted_stripes():
    q, k, _ = qkv(60, 60, sharp=0.1)
    k[:, :, [7, 23]] = 6.0
    q += 1.0
    got = SampleAttention(dial=0.9, every=10, window=0.02).choose(q, k, True)
    assert got[0, :, 30:, 7].all() and got[0, :, 30:, 23].all() and got[0, :, 30:].double().mean() < 0.2


def test_sparge_by_loops():
    q, k, _ = qkv(32, 32)
    block, theta, p = 4, 0.3, 0.6
    k[:, :, :16] = k[:, :, :16] * 0.2 + 1.0                                    # blocks of tokens that are alike
    got = SpargeAttention(dial=p, block=block, query_block=block, theta=theta).choose(q, k, True)

    def alike(x):
        unit = x / x.norm(dim=-1, keepdim=True)
        return (unit @ unit.mT).mean() >= theta

    unlike = 0
    for h, row in itertools.product(range(H), range(8)):
        queries = q[0, h, row * block : (row + 1) * block]
        fixed, pooled = set(), {}
        for n in range(row + 1):
            keys = k[0, h // 2, n * block : (n + 1) * block]
            if not alike(keys) or not alike(queries):
                fixed.add(n)
                unlike += n < row
            else:
                pooled[n] = (queries.mean(0) @ keys.mean(0) / D**0.5).item()
        kept, held = {*fixed, row}, 0.0
        total = sum(math.exp(z) for z in pooled.values())
        for rank, n in enumerate(sorted(pooled, key=lambda n: -pooled[n])):
            held += math.exp(pooled[n]) / total
            if rank and held > p:                                              # together within p, and the heaviest whatever it holds
                break
            kept.add(n)
        assert {n for n in range(8) if got[0, h, row, n]} == kept
    assert unlike > 0 and not got.tril().all()


def test_sparge_guard_keeps_what_a_mean_hides():
    """A block of opposite keys has mean nought; its pooled product says nothing of the key that matters."""
    q = torch.zeros(1, 1, 32, D, dtype=torch.float64)
    q[..., 0] = 4.0
    k = torch.zeros(1, 1, 32, D, dtype=torch.float64)
    k[..., 1] = 1.0
    k[..., 0] = 0.5
    k[0, 0, 4:8] = torch.tensor([[9.0], [-9.0], [9.0], [-9.0]], dtype=torch.float64) * torch.eye(D, dtype=torch.float64)[0]
    at = {theta: SpargeAttention(dial=0.5, block=4, query_block=4, theta=theta).choose(q, k, True)[0, 0, 7, 1].item() for theta in (-1.0, 0.5)}
    assert at == {-1.0: False, 0.5: True}


def test_twilight_prunes_candidates_by_estimated_mass():
    q, k, _ = qkv(24, 24)
    p, page, budget, generous = 0.8, 4, 0.2, 2.0
    got = Twilight(budget=budget, dial=p, page=page, generous=generous).choose(q, k, True)
    copy = rounded(k, 4)
    assert copy[0, 0, 0].unique().numel() <= 16 and (copy - k).abs().max() <= (k.amax(-1) - k.amin(-1)).max() / 30 + 1e-12
    for h, t, at, _ in rows(q, k):
        own, bound = at // page, {}
        for n in range(own):
            keys = k[0, h // 2, n * page : (n + 1) * page]
            bound[n] = torch.maximum(q[0, h, t] * keys.amin(0), q[0, h, t] * keys.amax(0)).sum().item()
        keep = math.ceil((own + 1) * budget * generous)
        pages = {own, *sorted(bound, key=lambda n: -bound[n])[: keep - 1]}
        found = {s: (copy[0, h // 2, s] @ q[0, h, t] / D**0.5).item() for s in range(at + 1) if s // page in pages}
        total, kept, held = sum(map(math.exp, found.values())), {at}, math.exp(found[at])
        for s in sorted(found, key=lambda s: -found[s]):
            if s == at:
                continue
            if held >= p * total:
                break
            kept.add(s)
            held += math.exp(found[s])
        assert {s for s in range(at + 1) if got[0, h, t, s]} == kept


def test_twilight_keeps_few_of_a_peaked_head_and_many_of_a_flat_one():
    q, k, _ = qkv(64, 64, sharp=1.0)
    q[:, 0] *= 8
    q[:, 1] *= 0.05
    kept = Twilight(budget=0.9, dial=0.9, generous=3.0).choose(q, k, True)[0, :, -1].sum(-1)
    assert kept[0] < 12 and kept[1] > 45


def test_tidal_takes_over_what_an_earlier_layer_found():
    method, layers = Tidal(budget=0.25, dense=2, every=3), [qkv(20, 20, seed=n) for n in range(7)]
    outs, masks = [], []
    for layer, (q, k, v) in enumerate(layers):
        outs.append(method.attend(q, k, v, scale=D**-0.5, layer=layer))
        masks.append(method._carried.get(-1))
    for layer, source in enumerate([None, None, 2, 2, 2, 5, 5]):
        q, k, v = layers[layer]
        for h, t, at, z in rows(q, k):
            if source is None:
                keep = torch.arange(at + 1)
            else:
                qs, ks, _ = layers[source]
                zs = ks[0, h // 2, : at + 1] @ qs[0, h, t] / D**0.5
                zs[at] = math.inf
                keep = zs.topk(max(1, round(0.25 * (at + 1)))).indices
            torch.testing.assert_close(outs[layer][0, h, t], z[keep].softmax(0) @ v[0, h // 2, keep])


def test_tidal_keeps_rows_of_a_padded_batch_apart():
    method = Tidal(budget=0.5, dense=0, every=4)
    q, k, v = (x.repeat(2, 1, 1, 1) for x in qkv(12, 12))
    q[1], k[1] = q[1].flip(1), k[1].flip(1)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[1, :4] = False
    for layer in range(2):
        got = method.attend(q, k, v, scale=1.0, padding_BS=real, layer=layer)
        alone = Tidal(budget=0.5, dense=0, every=4)
        for up_to in range(layer + 1):
            want = alone.attend(q[1:, :, 4:], k[1:, :, 4:], v[1:, :, 4:], scale=1.0, layer=up_to)
        torch.testing.assert_close(got[1:, :, 4:], want)


def test_squeezed_by_its_estimate():
    q, k, _ = qkv(40, 40)
    segment, size, dial = 16, 4, 3.0
    got = Squeezed(dial=dial, segment=segment, size=size).choose(q, k, True)
    at_XZ = clustered(k[:, :, :32].reshape(-1, segment, D), 4).view(G, 2, segment)
    for h, t, at, _ in rows(q, k):
        g, context = h // 2, at // segment * segment
        weight = {}
        for s in range(context):
            x, z = divmod(s, segment)
            mine = [x * segment + j for j in range(segment) if at_XZ[g, x, j] == at_XZ[g, x, z]]
            weight[s] = math.exp((k[0, g, mine].mean(0) @ q[0, h, t] / D**0.5).item())
        total = sum(weight.values())                                           # sum over clusters of N_j exp(q C_j)
        want = {s for s in weight if weight[s] / total >= math.exp(-dial)} | set(range(context, at + 1))
        assert {s for s in range(at + 1) if got[0, h, t, s]} == want


def test_squeezed_clusters_find_more_than_random_ones():
    """Planted directions: the keys of a query's own direction are those kept."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.nn.functional.normalize(torch.randn(8, 32, generator=generator), dim=-1)
    kind = torch.randint(8, (256,), generator=generator)
    k = (centre[kind] * 6 + 0.3 * torch.randn(256, 32, generator=generator))[None, None]
    q = (centre[kind[-1]] * 6)[None, None, None]
    k = torch.cat([k, torch.zeros(1, 1, 1, 32)], 2)
    kept = Squeezed(dial=6.0, segment=128, size=16).choose(q, k, True)[0, 0, 0, :256]
    mine = kind == kind[-1]
    assert kept[mine].double().mean() > 0.95 and kept[~mine].double().mean() < 0.1


def test_squeezed_clusters_a_segment_once_where_a_cache_keeps_it():
    model, _, _ = rarefy.open_model("builtin")
    ids = torch.randint(100, (1, 70), generator=torch.Generator().manual_seed(0))
    method = Squeezed(dial=4.0, segment=16, size=4)
    with torch.no_grad(), rarefy.replaced(model, {"layers.*.attn": method}):
        whole = model(input_ids=ids, use_cache=False).logits
        cache = Cache()
        model(input_ids=ids[:, :50], past_key_values=cache)
        for t in range(50, 70):
            step = model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits
    torch.testing.assert_close(step[0, -1], whole[0, -1], rtol=1e-4, atol=1e-4)
