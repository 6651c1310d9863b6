"""Shared DIFF, LLSA, NOSA, BiFormer, Sparsifiner, SPT, Flux and DSV against their formulas."""

import math

import pytest
import torch
from trained_inputs import SIZES, gradients, qkv

import rarefy
from rarefy import replaced
from rarefy.attention.trained import Distilled, Trained
from rarefy.attention.trained.biformer import BiFormer
from rarefy.attention.trained.diff import Diff
from rarefy.attention.trained.dsv import DSV
from rarefy.attention.trained.flux import Flux
from rarefy.attention.trained.llsa import LLSA
from rarefy.attention.trained.nosa import NOSA
from rarefy.attention.trained.shared_diff import SharedDiff
from rarefy.attention.trained.sparsifiner import Sparsifiner
from rarefy.attention.trained.spt import SPT
from rarefy.errors import BadInput, Unsupported
from site_models import build, inputs, run


def agree(got, wanted, leaves):
    """Values and gradients."""
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(got, leaves), gradients(wanted, leaves), strict=True):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def see(T, S):
    return torch.ones(T, S, dtype=torch.bool).tril(S - T)


@pytest.mark.parametrize(("T", "S"), [(9, 9), (4, 9)])
def test_shared_diff_is_diff_with_the_updates_written_into_its_projections(T, S):
    leaves = qkv(T, S, grad=True)
    method = SharedDiff(**SIZES, rank=6, layer=2).double()         # of full rank: any pair of projections, so DIFF
    one = torch.eye(6, dtype=torch.float64)
    q, k, v = leaves
    both_q = torch.stack([q @ (one + method.query_in_IHDR[i] @ method.query_out_IHRD[i]) for i in (0, 1)], 2).flatten(1, 2)
    each = [(k @ (one + method.key_in_IGDR[i] @ method.key_out_IGRD[i])).repeat_interleave(2, 1) for i in (0, 1)]
    both_k = torch.stack(each, 2).flatten(1, 2)
    diff = Diff(8, 8, 6, layer=2).double()
    weights = method.state_dict()
    diff.load_state_dict({"lambda_4D": weights["lambda_4D"], "norm_D": torch.ones(12)})
    wanted = diff(both_q, both_k, v.repeat_interleave(4, 1))[:, ::2]
    agree(method(*leaves), wanted, leaves)


def test_shared_diff_without_updates_is_one_minus_lambda_of_softmax_attention_and_counts_its_numbers():
    q, k, v = qkv(9)
    method = SharedDiff(**SIZES, rank=3, layer=1, eps=0.0).double()
    assert sum(p.numel() for n, p in method.named_parameters() if "IH" in n or "IG" in n) == 2 * (4 + 2) * 2 * 3 * 6
    with torch.no_grad():
        method.query_out_IHRD.zero_()
        method.key_out_IGRD.zero_()
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    a, b, c, d = method.lambda_4D.detach()
    weight = 0.8 - 0.6 * math.exp(-0.3) + math.exp(a @ b) - math.exp(c @ d)
    torch.testing.assert_close(method.maps(q, k, 6**-0.5).sum(-1), torch.full((2, 4, 9), 1 - weight, dtype=torch.float64))
    unit = dense / dense.square().mean(-1, keepdim=True).sqrt() * math.copysign(1, 1 - weight)
    torch.testing.assert_close(method(q, k, v), unit * (0.2 + 0.6 * math.exp(-0.3)), rtol=1e-8, atol=1e-10)


def llsa_by_definition(q, k, v, m, causal):
    """One query at a time: a set of blocks that shrinks from level to level, and a list of (key, value, weight)."""
    B, H, T, D = q.shape
    S, share, rows = k.shape[2], H // k.shape[1], []

    def mean(x, n, size):
        return x[n * size : min((n + 1) * size, S)].mean(0)

    for b, h, t in ((b, h, t) for b in range(B) for h in range(H) for t in range(T)):
        at, key, value, open_to, seen = S - T + t, k[b, h // share], v[b, h // share], None, []
        for level in range(m.levels, 0, -1):
            size = m.block**level
            first = at // size * size
            asks = q[b, h, max(0, first - S + T) : first + size - S + T].mean(0) if m.shared else q[b, h, t]
            below = [n * m.block + i for n in open_to or [] for i in range(m.block)]
            every = range(-(-S // size)) if open_to is None else [n for n in below if n * size < S]
            every = [n for n in every if not causal or n <= at // size]
            rank = sorted(every, key=lambda n: math.inf if causal and n == at // size else (asks @ mean(key, n, size)).item(), reverse=True)
            open_to = rank[: m.top]
            means = [n for n in every if not (causal and n == at // size) and not (m.coarse == "rest" and n in open_to) and m.coarse != "none"]
            seen += [(mean(key, n, size), mean(value, n, size), min((n + 1) * size, S) - n * size) for n in means]
        tokens = [n * m.block + i for n in open_to for i in range(m.block)]
        seen += [(key[s], value[s], 1) for s in tokens if s < S and (not causal or s <= at)]
        ks, vs, w = torch.stack([x[0] for x in seen]), torch.stack([x[1] for x in seen]), torch.tensor([x[2] for x in seen]).double()
        weight = (ks @ q[b, h, t] / D**0.5).exp() * w
        rows.append(weight / weight.sum() @ vs)
    return torch.stack(rows).view(q.shape)


@pytest.mark.parametrize("coarse", ["all", "rest", "none"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("T", "S", "causal"), [(22, 22, True), (5, 22, True), (22, 22, False)])
def test_llsa_and_its_gradients_are_the_definition(coarse, shared, T, S, causal):
    leaves = qkv(T, S, batch=1, grad=True)
    method = LLSA(top=2, block=2, levels=3, shared=shared, coarse=coarse)
    wanted = llsa_by_definition(*leaves, method, causal)
    agree(method.attend(*leaves, scale=6**-0.5, causal=causal), wanted, leaves)


@pytest.mark.parametrize("causal", [True, False])
def test_llsa_that_takes_every_block_is_dense_and_each_key_counts_once(causal):
    q, k, v = qkv(23)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    for coarse in ("rest", "none"):
        torch.testing.assert_close(LLSA(top=12, block=2, coarse=coarse).attend(q, k, v, scale=6**-0.5, causal=causal), dense)
    flat = k.mean(2, keepdim=True).expand_as(k)                     # keys all alike: means lose nothing, whatever is taken
    few = LLSA(top=1, block=2, levels=3, coarse="rest").attend(q, flat, v, scale=6**-0.5, causal=causal)
    torch.testing.assert_close(few, torch.nn.functional.scaled_dot_product_attention(q, flat, v, is_causal=causal, enable_gqa=True))


def test_llsa_reads_a_number_of_keys_that_grows_with_the_logarithm():
    found = []
    for levels in (2, 3, 4):
        S = 4 ** (levels + 1)
        q, k, v = qkv(1, S, batch=1)
        method = LLSA(top=2, block=4, levels=levels, coarse="all")
        method.attend(q, k, v, scale=1.0)
        found.append(round(method.measured_density() * S))
    # 8 tokens, 8 means of each level but the coarsest, and those 4; one fewer at each level: the block of the query
    assert found == [8 + 8 * (levels - 1) + 4 - levels for levels in (2, 3, 4)]


def nosa_by_definition(q, k, v, m):
    B, H, T, D = q.shape
    G, S, share = k.shape[1], k.shape[2], q.shape[1] // k.shape[1]
    s = torch.stack([m.size_G[g] * torch.log(1 + ((v[:, g] @ m.importance_GD[g]) + m.bias_G[g]).exp()) for g in range(G)], 1)
    rows, chosen = torch.zeros_like(q), {}
    for b, g, t in ((b, g, t) for b in range(B) for g in range(G) for t in range(T)):
        at = S - T + t
        own = at // m.block
        windows = [i for i in range(S // m.pool) if (i + 1) * m.pool - 1 <= at]
        mean = [k[b, g, i * m.pool : (i + 1) * m.pool].mean(0) for i in windows]
        p = sum((torch.stack(mean) @ q[b, h, t] / D**0.5).softmax(0) for h in range(g * share, (g + 1) * share)) if windows else []
        per = m.block // m.pool
        aware = {n: max([p[i].item() for i in windows if i // per == n], default=0.0) for n in range(own + 1)}
        steady = {n: max(s[b, g, n * m.block + j * m.pool : n * m.block + (j + 1) * m.pool].mean().item() for j in range(per)) for n in range(own)}
        keep = max(1, round(m.budget * (own + 1)))
        fixed = math.floor(keep * m.steady)
        forced = {0, *range(max(0, own - m.local + 1), own + 1)}
        rank = sorted(set(aware) - forced, key=aware.__getitem__, reverse=True)
        taken = forced | set(rank[: max(0, keep - fixed - len(forced))])
        taken |= set(sorted(set(steady) - taken, key=steady.__getitem__, reverse=True)[:fixed])
        chosen[b, g, t] = taken
        keys = [j for j in range(at + 1) if j // m.block in taken]
        for h in range(g * share, (g + 1) * share):
            weight = (k[b, g, keys] @ q[b, h, t] / D**0.5).exp() * s[b, g, keys].exp()
            rows[b, h, t] = weight / weight.sum() @ v[b, g, keys]
    return rows, chosen


@pytest.mark.parametrize(("T", "S"), [(38, 38), (7, 38)])
@pytest.mark.parametrize("steady", [0.0, 0.5])
def test_nosa_and_its_gradients_are_the_definition(T, S, steady):
    leaves = qkv(T, S, batch=1, grad=True)
    method = NOSA(**SIZES, budget=0.6, steady=steady, block=4, pool=2, local=1).double()
    wanted, chosen = nosa_by_definition(*leaves, method)
    mask = method.select(*leaves).mask
    assert all(set(mask[b, 2 * g, t].nonzero()[:, 0].tolist()) == taken for (b, g, t), taken in chosen.items())
    agree(method(*leaves), wanted, [*leaves, *method.parameters()])


def test_nosa_keeps_the_steady_share_from_step_to_step():
    q, k, v = qkv(96, batch=1)
    for steady, budget in ((0.5, 0.5), (0.75, 0.4)):
        method = NOSA(**SIZES, budget=budget, steady=steady, block=4, pool=2, local=1).double()
        mask = method.select(q, k, v).mask
        for t in range(1, 96):
            keep = max(1, round(budget * (t // 4 + 1)))
            both = (mask[:, :, t] & mask[:, :, t - 1]).sum(-1)
            assert (both >= math.floor(steady * keep) - (2 if t % 4 == 0 else 0)).all()    # a new block may join, and the budget grow by one
            assert torch.equal(method.moved(mask)[:, :, t - 1], mask[:, :, t].sum(-1) - both)


def test_nosa_begins_with_keys_about_equally_important():
    """Drawn wide, importance lifts some tokens for every query, and a lookup has to be learned against it."""
    importance = NOSA(4, 4, 32).importance(torch.randn(1, 4, 200, 32, generator=torch.Generator().manual_seed(0)))
    assert 0.01 < importance.std() < 0.1


def test_nosa_refuses_a_share_of_one_and_windows_that_do_not_fit():
    with pytest.raises(BadInput, match=r"steady=1\.0"):
        NOSA(**SIZES, steady=1.0)
    with pytest.raises(BadInput, match="pool=3"):
        NOSA(**SIZES, block=8, pool=3)


def biformer_by_definition(q, k, v, m, height, width):
    """Token by token: region of a token by its row and column, routed by mean affinities, then softmax; the convolution as four loops."""
    tall, wide = -(-height // m.regions), -(-width // m.regions)
    region = [(t // width // tall, t % width // wide) for t in range(height * width)]
    names, rows = sorted(set(region)), torch.zeros_like(q)
    members = {r: [t for t in range(height * width) if region[t] == r] for r in names}
    for b, h in ((b, h) for b in range(len(q)) for h in range(q.shape[1])):
        g = h * k.shape[1] // q.shape[1]
        for r in names:
            mean_q = q[b, :, members[r]].mean(1).flatten()                          # heads side by side
            match = {o: (mean_q @ k[b, :, members[o]].mean(1).repeat_interleave(2, 0).flatten()).item() for o in names}
            to = sorted(names, key=match.__getitem__, reverse=True)[: m.top]
            keys = [t for o in to for t in members[o]]
            for t in members[r]:
                rows[b, h, t] = (k[b, g, keys] @ q[b, h, t] / 6**0.5).softmax(0) @ v[b, g, keys]
                for i, j in ((i, j) for i in range(-1, 2) for j in range(-1, 2)):
                    y, x = t // width + i, t % width + j
                    if 0 <= y < height and 0 <= x < width:
                        rows[b, h, t] = rows[b, h, t] + v[b, g, y * width + x] * m.kernel_C1LL[g * 6 : g * 6 + 6, 0, i + 1, j + 1]
    return rows


@pytest.mark.parametrize(("height", "width", "regions"), [(6, 4, 2), (5, 7, 3)])
def test_biformer_and_its_gradients_are_the_definition(height, width, regions):
    leaves = qkv(height * width, batch=1, grad=True)
    method = BiFormer(**SIZES, regions=regions, top=2, width=width, local=3).double()
    wanted = biformer_by_definition(*leaves, method, height, width)
    agree(method(*leaves), wanted, [*leaves, method.kernel_C1LL])
    torch.testing.assert_close(method.reference(*leaves), wanted)


def test_biformer_of_all_regions_is_full_attention_and_counts_its_pairs():
    q, k, v = qkv(36)
    method = BiFormer(**SIZES, regions=3, budget=1.0, local=0)
    torch.testing.assert_close(method(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    assert method.measured_density() == 1.0
    half = BiFormer(**SIZES, regions=3, top=2, local=0)
    half(q, k, v)
    assert half.measured_density() == 2 / 9
    with pytest.raises(Unsupported, match="layer 3 is causal"):
        method.attend(q, k, v, scale=1.0, layer=3)
    with pytest.raises(Unsupported, match="padded"):
        method.attend(q, k, v, scale=1.0, causal=False, padding_BS=torch.ones(2, 36, dtype=torch.bool))
    with pytest.raises(BadInput, match="35 tokens are no square map"):
        method(q[:, :, :35], k[:, :, :35], v[:, :, :35])
    with pytest.raises(BadInput, match="4 queries and 36 keys"):
        method.attend(q[:, :, :4], k, v, scale=1.0, causal=False)


def kept_keys(method, q, k, v, score):
    """Attention to the round(budget n) keys of the highest score, one query at a time; the mask is compared on the way."""
    T, S, share, rows = q.shape[2], k.shape[2], q.shape[1] // k.shape[1], torch.zeros_like(q)
    mask = method.select(q, k, v).mask
    for b, h, t in ((b, h, t) for b in range(len(q)) for h in range(q.shape[1]) for t in range(T)):
        n = S - T + t + 1
        best = sorted(range(n), key=lambda s: score(b, h, t, s), reverse=True)[: max(1, round(method.budget * n))]
        assert mask[b, h, t].nonzero()[:, 0].tolist() == sorted(best)
        rows[b, h, t] = (k[b, h // share, best] @ q[b, h, t] / 6**0.5).softmax(0) @ v[b, h // share, best]
    return rows


@pytest.mark.parametrize(("T", "S"), [(13, 13), (4, 13)])
def test_dsv_and_its_gradients_are_the_definition(T, S):
    leaves = qkv(T, S, grad=True)
    method = DSV(**SIZES, budget=0.4, rank=3).double()
    q, k, _ = leaves

    def guess(b, h, t, s):
        return (q[b, h, t] @ method.query_HDC[h]) @ (k[b, h // 2, s] @ method.key_GDC[h // 2])

    agree(method(*leaves), kept_keys(method, *leaves, lambda *at: guess(*at).item()), leaves)
    off = [(q[b, h, t] @ k[b, h // 2, s] / 6**0.5 - guess(b, h, t, s)) ** 2
           for b in range(2) for h in range(4) for t in range(T) for s in range(S - T + t + 1)]
    torch.testing.assert_close(method.distil(*leaves, scale=6**-0.5, causal=True).total, torch.stack(off).mean())


def test_dsv_of_full_rank_finds_the_true_keys_leaves_heads_dense_and_profiles_them():
    q, k, v = qkv(20)
    method = DSV(**SIZES, budget=0.3, rank=6, dense_heads="1").double()
    with torch.no_grad():
        method.query_HDC.copy_(torch.eye(6))
        method.key_GDC.copy_(torch.eye(6))
    mask = method.select(q, k, v).mask
    assert torch.equal(mask[:, 1], see(20, 20).expand(2, -1, -1))
    exact = (q[:, 2] @ k[:, 1].mT).masked_fill(~see(20, 20), -torch.inf)
    assert all(set(mask[b, 2, t].nonzero()[:, 0].tolist()) == set(exact[b, t].topk(max(1, round(0.3 * (t + 1)))).indices.tolist())
               for b in range(2) for t in range(20))
    sharp, flat = method.profile(q * 100, k, scale=1.0), method.profile(q * 0, k, scale=1.0)
    assert sharp.max() < 0.25 and flat.min() > 0.85
    with pytest.raises(BadInput, match="dense_heads='7'"):
        DSV(**SIZES, rank=3, dense_heads="7")


def test_spt_and_its_gradients_are_the_definition():
    leaves = qkv(13, grad=True)
    method = SPT(**SIZES, budget=0.4, parts=3, words=3).double()
    word = method.word_GMEC

    def codes(x, g):
        return [min(range(3), key=lambda e: ((x[2 * m : 2 * m + 2] - word[g, m, e]) ** 2).sum().item()) for m in range(3)]

    q, k, _ = leaves
    same = [[[[sum(a == b for a, b in zip(codes(q[b, h, t], h // 2), codes(k[b, h // 2, s], h // 2), strict=True)) for s in range(13)]
              for t in range(13)] for h in range(4)] for b in range(2)]
    assert len({x for b in same for h in b for t in h for x in t}) == 4
    agree(method(*leaves), kept_keys(method, *leaves, lambda b, h, t, s: (same[b][h][t][s], s)), leaves)
    near = [min(((x[2 * m : 2 * m + 2] - word[g, m, e]) ** 2).sum() for e in range(3))
            for y in (q, k) for b in range(2) for i in range(y.shape[1]) for x in y[b, i] for g in (i * 2 // y.shape[1],) for m in range(3)]
    each = torch.stack(near)
    wanted = (each[: 2 * 4 * 13 * 3].mean() + each[2 * 4 * 13 * 3 :].mean()) / 2
    torch.testing.assert_close(method.distil(*leaves, scale=1.0, causal=True).total, wanted)
    with pytest.raises(BadInput, match="parts=4"):
        SPT(**SIZES, parts=4)


@pytest.mark.parametrize(("T", "S"), [(13, 13), (4, 13)])
def test_sparsifiner_and_its_gradients_are_the_definition(T, S):
    leaves = qkv(T, S, grad=True)
    method = Sparsifiner(**SIZES, budget=0.4, tokens=16, down=5, d_low=2, floor=0.19, sparse=0.5).double()
    q, k, _ = leaves
    score = torch.zeros(2, 4, T, S, dtype=torch.float64)
    dropped = 0
    for b, h, t in ((b, h, t) for b in range(2) for h in range(4) for t in range(T)):
        n, g = S - T + t + 1, h // 2
        low = method.down_GNI[g, :n].T @ (k[b, g, :n] @ method.key_GDC[g])
        p = (low @ (q[b, h, t] @ method.query_HDC[h]) / 2**0.5).softmax(0)
        dropped += int((p < 0.19).sum())
        score[b, h, t] = (p * (p >= 0.19)) @ method.up_HIN[h, :, :S]
    assert 0 < dropped < score[..., 0].numel() * 5
    agree(method(*leaves), kept_keys(method, *leaves, lambda b, h, t, s: score[b, h, t, s].item()), leaves)
    truth = (q @ k.repeat_interleave(2, 1).mT / 6**0.5).masked_fill(~see(T, S), -torch.inf).log_softmax(-1)
    guess = score.masked_fill(~see(T, S), -torch.inf).log_softmax(-1)
    kl = torch.where(see(T, S), truth.exp() * (truth - guess), 0.0).sum(-1).mean() + 0.5 * method.up_HIN.abs().mean()
    torch.testing.assert_close(method.distil(*leaves, scale=6**-0.5, causal=True).total, kl)
    both = method.connectivity(q[:, :, -1:], k, 6**-0.5, False)     # the last query sees all: causal or not is the same
    torch.testing.assert_close(both[:, :, 0], score[:, :, -1])
    with pytest.raises(BadInput, match="16 places and is given 17"):
        method(*qkv(17))


def flux(**given):
    return Flux(hidden=10, **SIZES, **{"window": 4, "sinks": 2, "tail": 3, "width": 5, **given}).double()


def test_flux_decides_by_request_and_decoding_keeps_the_decision():
    q, k, v = qkv(14, batch=6)
    hidden = torch.randn(6, 14, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    method = flux().eval()
    summary = torch.cat([hidden[:, :12].mean(1), hidden[:, 9:12].mean(1)], -1) @ method.in_EW
    z = (summary * summary.sigmoid()) @ method.out_W
    torch.testing.assert_close(method.route(hidden[:, :12]), z)
    assert 0 < (z > 0).sum() < 6
    at = torch.arange(14)
    near = see(14, 14) & ((at[:, None] - at < 4) | (at < 2))
    keep = torch.where((z > 0)[:, None, None], see(14, 14), near)
    score = (q @ k.repeat_interleave(2, 1).mT / 6**0.5).masked_fill(~keep[:, None], -torch.inf)
    wanted = score.softmax(-1) @ v.repeat_interleave(2, 1)
    with torch.no_grad():
        torch.testing.assert_close(method(q[:, :, :12], k[:, :, :12], v[:, :, :12], hidden[:, :12]), wanted[:, :, :12])
        for t in (12, 13):
            one = method.attend(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], scale=6**-0.5, hidden_BTD=hidden[:, t : t + 1])
            torch.testing.assert_close(one[:, :, 0], wanted[:, :, t])
        with pytest.raises(BadInput, match="2 rows are decoded in layer 0 whose prompts"):
            method.attend(q[:2, :, :1], k[:2], v[:2], scale=1.0, hidden_BTD=hidden[:2, :1])


def test_flux_mixes_both_ways_while_it_learns_and_its_gradient_reaches_the_router():
    q, k, v = qkv(9, batch=3, grad=True)
    hidden = torch.randn(3, 9, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    method = flux(target=0.1, price=2.0).train()
    torch.manual_seed(0)
    got = method(q, k, v, hidden)
    torch.manual_seed(0)
    noise = torch.rand(3, dtype=torch.float64)
    g = (method.route(hidden) + (noise / (1 - noise)).log()).sigmoid()
    at = torch.arange(9)
    near = see(9, 9) & ((at[:, None] - at < 4) | (at < 2))
    score = q @ k.repeat_interleave(2, 1).mT / 6**0.5
    full, few = (score.masked_fill(~m, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1) for m in (see(9, 9), near))
    agree(got, g[:, None, None, None] * full + (1 - g[:, None, None, None]) * few, [q, k, v, method.in_EW, method.out_W])
    torch.testing.assert_close(method.penalty().total, 2 * (g.mean() - 0.1))


def test_trained_charges_what_its_methods_charge_and_moves_the_routers_alone():
    model = build("llama")
    plan = rarefy.plan("attention/flux", model, window=2, sinks=1, target=0.1, price=3.0)
    wrapper = Trained(plan, model, train_model=False).train()
    ids = torch.randint(1, 40, (4, 12), generator=torch.Generator().manual_seed(0))
    loss = wrapper.loss(ids, ids)
    charged = sum(m.penalty().total for m in plan.values()) / 2
    torch.testing.assert_close(loss.total, loss.parts["ce"] + charged)
    assert charged > 0
    loss.total.backward()
    assert all(p.grad.abs().sum() > 0 for p in wrapper.parameters()) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("name", "given"), [
    ("shared_diff", {}), ("llsa", {"top": 1, "block": 2, "shared": False}), ("nosa", {"block": 4, "pool": 2, "local": 1}), ("dsv", {"rank": 4}),
    ("spt", {"parts": 4}), ("sparsifiner", {"tokens": 20, "down": 4}), ("flux", {"window": 3, "sinks": 1}),
])
def test_made_for_each_layer_put_in_and_decoding_as_prefill(name, given):
    model, what = build("llama"), inputs("llama", 1, 13)
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": torch.ones(1, 13).long()}
    before = run(model, **what)
    with replaced(model, rarefy.plan(f"attention/{name}", model, **given)):
        if name != "flux":                                        # without a cache its prompt grows with every token, and so may its decision
            assert torch.equal(*(model.generate(**what, **how, use_cache=cache) for cache in (True, False)))
        model.generate(**what, **how)
    assert torch.equal(run(model, **what), before)


@pytest.mark.parametrize(("name", "given"), [("dsv", {"rank": 8}), ("spt", {"parts": 4, "words": 4}), ("sparsifiner", {"tokens": 17, "down": 8})])
def test_layers_learn_what_their_papers_have_them_learn(name, given):
    model = build("llama")
    wrapper = Distilled(rarefy.plan(f"attention/{name}", model, 0.5, **given), model)
    ids = torch.randint(1, 40, (24, 5), generator=torch.Generator().manual_seed(0)).repeat(1, 4)[:, :17]
    before = wrapper.loss(ids, ids).total.item()
    rarefy.train({name: wrapper}, rarefy.TensorStream(ids, 8), rarefy.Recipe(steps=40, lr=2e-2))
    assert wrapper.loss(ids, ids).total.item() < 0.6 * before


def test_biformer_is_refused_by_a_causal_model_by_name():
    model = build("llama")
    with pytest.raises(Unsupported, match="attention/biformer: layer 0 is causal"), replaced(model, rarefy.plan("attention/biformer", model)):
        run(model, **inputs("llama", 1, 16))
