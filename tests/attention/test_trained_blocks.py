"""MoBA, NSA, FSA and SeerAttention against their formulas, written one query at a time."""

import math

import pytest
import torch
from trained_inputs import SIZES, gradients

from rarefy.attention.trained.by_keys import by_keys
from rarefy.attention.trained.fsa import FSA
from rarefy.attention.trained.moba import MoBA
from rarefy.attention.trained.nsa import NSA
from rarefy.attention.trained.seer import Seer
from rarefy.errors import BadInput
from rarefy.kernels.block_attention import block_attention


def qkv(T, S=None, batch=2, heads=4, key_heads=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    S = S or T
    shapes = ((batch, heads, T, 6), (batch, key_heads, S, 6), (batch, key_heads, S, 6))
    return [torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in shapes]


def over(q, k, v, keys):
    """softmax(q k / sqrt(D)) v over a list of keys, of one query."""
    return (k[keys] @ q / q.shape[-1] ** 0.5).softmax(0) @ v[keys] if len(keys) else torch.zeros_like(q)


def each_query(q, k, v, keys_of):
    """keys_of(b, h, g, position) -> list of keys."""
    B, H, T, _ = q.shape
    G, S = k.shape[1:3]
    every = [(b, h, h * G // H, t) for b in range(B) for h in range(H) for t in range(T)]
    rows = [over(q[b, h, t], k[b, g], v[b, g], keys_of(b, h, g, S - T + t)) for b, h, g, t in every]
    return torch.stack(rows).view(q.shape)


def moba_by_definition(q, k, v, block, top):
    """The conventions of the authors' naive code: own block first whatever its gate, later ones never, top counts the own one."""

    def keys_of(b, h, g, at):
        own, score = at // block, {}
        for n in range(own):
            score[n] = (q[b, h, at - k.shape[2] + q.shape[2]] @ k[b, g, n * block : (n + 1) * block].mean(0)).item()
        picked = [own, *sorted(score, key=score.__getitem__, reverse=True)[: top - 1]]
        return sorted(s for n in picked for s in range(n * block, (n + 1) * block) if s <= at)

    return each_query(q, k, v, keys_of)


@pytest.mark.parametrize("order", ["queries", "keys"])
@pytest.mark.parametrize(("T", "S"), [(23, 23), (5, 23)])
def test_moba_and_its_gradients_are_the_definition(order, T, S):
    leaves = qkv(T, S)
    method = MoBA(block=4, top=3, order=order)
    got, wanted = method(*leaves), moba_by_definition(*leaves, 4, 3)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(got, leaves), gradients(wanted, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_moba_counts_its_blocks_and_all_of_them_are_dense():
    q, k, v = (x.detach() for x in qkv(16))
    method = MoBA(block=4, top=2)
    method(q, k, v)
    own, before = sum(i % 4 + 1 for i in range(16)), 4 * 12       # the own block up to the query, and one whole block from position 4 on
    assert method.measured_density() == (own + before) / (16 * 17 / 2)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(MoBA(block=4, top=4)(q, k, v), dense)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_keys_outside_is_queries_outside(key_heads, causal):
    leaves = qkv(19, 26, key_heads=key_heads)
    mask = torch.rand(2, 4, 19, 7, generator=torch.Generator().manual_seed(3)) < 0.4
    mask[0, 1, 5] = False                                         # a query without any key
    got = by_keys(*leaves, mask, block=4, scale=0.3, causal=causal)
    wanted = block_attention(*leaves, mask, block=4, query_block=1, scale=0.3, causal=causal)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    assert not got[0, 1, 5].any()
    for a, b in zip(gradients(got, leaves), gradients(wanted, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def nsa(cls=NSA, **more):
    given = {"block": 4, "compress": 4, "stride": 2, "window": 5, "local": 1, "top": 3, **more}
    return cls(hidden=10, **SIZES, **given).double()


def nsa_parts(m, q, k, v):
    """Compressed, selected and window branch by definition, with the selection of each (batch, key head, query)."""
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    ends = [i * m.stride + m.compress - 1 for i in range((S - m.compress) // m.stride + 1)]

    def phi(x, which, i):
        rows = x[i * m.stride : i * m.stride + m.compress] + m.place_2LD[which]
        return torch.nn.functional.silu(rows.reshape(-1) @ m.down_2LDD[which]) @ m.up_2DD[which]

    coarse, picked = torch.zeros(B, H, T, D, dtype=q.dtype), {}
    rows = {}
    for b in range(B):
        for g in range(G):
            small = [torch.stack([phi(x[b, g], w, i) for i in range(len(ends))]) for w, x in enumerate((k, v))]
            for t in range(T):
                at, importance = S - T + t, [0.0] * math.ceil(S / m.block)
                seen = [i for i, end in enumerate(ends) if end <= at]
                for h in range(g * H // G, (g + 1) * H // G):
                    rows[b, h, t] = over(q[b, h, t], *small, seen)
                    weight = (small[0][seen] @ q[b, h, t] / D**0.5).softmax(0) if seen else []
                    for i, w in zip(seen, weight, strict=True):
                        for stretch in range(i, i + m.compress // m.stride):
                            importance[stretch * m.stride // m.block] += w.item()
                own = at // m.block
                forced = {0, *range(max(0, own - m.local + 1), own + 1)}
                rest = sorted((n for n in range(own + 1) if n not in forced), key=importance.__getitem__, reverse=True)
                picked[b, g, at] = sorted([*forced, *rest[: max(0, m.top - len(forced))]])
    coarse = torch.stack([rows[b, h, t] for b in range(B) for h in range(H) for t in range(T)]).view(q.shape)
    fine = each_query(q, k, v, lambda b, h, g, at: [s for n in picked[b, g, at] for s in range(n * m.block, (n + 1) * m.block) if s <= at])
    near = each_query(q, k, v, lambda b, h, g, at: list(range(max(0, at - m.window + 1), at + 1)))
    return coarse, fine, near


@pytest.mark.parametrize("cls", [NSA, FSA])
@pytest.mark.parametrize(("T", "S"), [(21, 21), (6, 21)])
def test_nsa_and_its_gradients_are_the_definition(cls, T, S):
    method, leaves = nsa(cls), qkv(T, S)
    hidden = torch.randn(2, T, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(5), requires_grad=True)
    gate = (hidden @ method.gate_EHC + method.bias_HC).sigmoid().view(2, T, 4, 3).transpose(1, 2)
    wanted = sum(gate[..., i : i + 1] * branch for i, branch in enumerate(nsa_parts(method, *leaves)))
    got = method(*leaves, hidden)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    every = [*leaves, hidden, *method.parameters()]
    for a, b in zip(gradients(got, every), gradients(wanted, every), strict=True):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_nsa_reads_its_hidden_state_and_counts_all_branches():
    method, (q, k, v) = nsa(top=1), (x.detach() for x in qkv(12))
    with pytest.raises(BadInput, match="hidden"):
        method(q, k, v)
    method(q, k, v, torch.zeros(2, 12, 10, dtype=torch.float64))
    # first block and own block; window of 5; compressed keys ending at 3, 5, 7, 9, 11
    selected = sum(min(t + 1, 4) + (t % 4 + 1 if t >= 4 else 0) for t in range(12))
    window, small = sum(min(t + 1, 5) for t in range(12)), sum((t - 1) // 2 for t in range(3, 12))
    assert method.measured_density() == pytest.approx((selected + window + small) / 78)


def test_nsa_gates_begin_near_one_half_whatever_the_token():
    """Wide draws give each token other gates, which a lookup has to be learned against."""
    hidden = torch.randn(1, 200, 64, generator=torch.Generator().manual_seed(0))
    gates = NSA(hidden=64, **SIZES).gates(hidden)
    assert 0.02 < gates.std() < 0.06 and (gates - 0.5).abs().max() < 0.2


def test_seer_truth_is_the_pooled_map_and_the_gate_its_formula():
    q, k, v = (x.detach() for x in qkv(22))
    method = Seer(**SIZES, block=4, query_block=3, d_gate=4, budget=0.5).double()
    score = q @ k.repeat_interleave(2, 1).mT / 6**0.5
    p = score.masked_fill(~torch.ones(22, 22, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    truth = torch.stack([torch.stack([p[:, :, i : i + 3, j : j + 4].amax((2, 3)) for j in range(0, 22, 4)], -1) for i in range(0, 22, 3)], 2)
    truth = truth / truth.sum(-1, keepdim=True)
    torch.testing.assert_close(method.truth(q, k, 6**-0.5, True, 3), truth)

    def turn(x, at):                                              # two numbers of the gate turned together as a complex one
        rate = torch.tensor([1.0, 10000.0**-0.5], dtype=torch.float64) * at
        return torch.view_as_real(torch.complex(x[..., :2], x[..., 2:]) * torch.polar(torch.ones_like(rate), rate)).mT.flatten(-2)

    logit = torch.zeros(2, 4, 8, 6, dtype=torch.float64)
    for i in range(8):
        query = turn(torch.einsum("bhd,hdc->bhc", q[:, :, 3 * i : 3 * i + 3].mean(2), method.query_HDC), 3 * i // 4)
        for j in range(6):
            part = k[:, :, 4 * j : 4 * j + 4]
            key = turn(torch.einsum("bgd,gdc->bgc", torch.cat([part.amax(2), part.amin(2), part.mean(2)], -1), method.key_GDC), j)
            logit[:, :, i, j] = (query * key.repeat_interleave(2, 1)).sum(-1) / 2
    torch.testing.assert_close(method.scores(q, k, 3, True), logit)
    later = torch.arange(6) * 4 > (torch.arange(8)[:, None] * 3 + 2).clamp_max(21)
    gate = logit.masked_fill(later, -torch.inf).softmax(-1)
    kl = (truth * (truth.clamp_min(1e-300).log() - gate.clamp_min(1e-300).log())).sum(-1).mean()
    torch.testing.assert_close(method.distil(q, k, v, scale=6**-0.5, causal=True).total, kl)


@pytest.mark.parametrize("method", [MoBA(block=4, top=2), Seer(**SIZES, block=4, query_block=1, budget=0.4).double(), nsa()])
def test_one_query_at_a_time_gives_what_the_whole_gives(method):
    q, k, v = (x.detach() for x in qkv(18))
    hidden = torch.randn(2, 18, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    more = (lambda at: {"hidden_BTD": hidden[:, at]}) if isinstance(method, NSA) else (lambda at: {})
    with torch.no_grad():
        whole = method.attend(q, k, v, scale=0.4, **more(slice(None)))
        for t in range(18):
            step = method.attend(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], scale=0.4, **more(slice(t, t + 1)))
            torch.testing.assert_close(step[:, :, 0], whole[:, :, t], rtol=1e-10, atol=1e-12)


def test_layers_of_another_shape_and_bad_sizes_are_refused():
    q, k, v = (x.detach() for x in qkv(8, heads=2))
    with pytest.raises(BadInput, match="made for 4 query heads"):
        Seer(**SIZES).double()(q, k, v)
    with pytest.raises(BadInput, match="made for 4 query heads"):
        nsa()(q, k, v, torch.zeros(2, 8, 10, dtype=torch.float64))
    with pytest.raises(BadInput, match="stride=3"):
        nsa(stride=3)
    with pytest.raises(BadInput, match="order='rows'"):
        MoBA(order="rows")
