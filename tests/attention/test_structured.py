"""Attention that is more than a mask, against its formulas written out one query at a time."""

import pytest
import torch
from structured_inputs import dense, each_query, qkv, softmax_over

from rarefy.attention.structured.combiner import Combiner
from rarefy.attention.structured.lsg import LSG, PICKS
from rarefy.attention.structured.near import SparseBEV
from rarefy.attention.structured.scattered import Scattered
from rarefy.attention.structured.shifted import SCCA, LongLoRA, SinkLoRA
from rarefy.attention.structured.star import Star
from rarefy.attention.structured.swat import SWAT, slopes
from rarefy.attention.structured.swinbert import SwinBERT
from rarefy.errors import BadInput, Unsupported


@pytest.mark.parametrize("anchor", [True, False])
@pytest.mark.parametrize("question", [0, 1, 5, 12, 99])
def test_star_is_its_two_phases(anchor, question):
    q, k, v = qkv(29)

    def keys(at, head):
        return [j for j in range(at + 1) if at >= 29 - question or j // 8 == at // 8 or anchor and j < 8]

    torch.testing.assert_close(Star(8, question, anchor)(q, k, v), each_query(q, k, v, softmax_over(keys)))


@pytest.mark.parametrize("T", [1, 3, 11, 28])
def test_stars_second_phase_is_dense_over_the_keys_it_is_given(T):
    q, k, v = qkv(T, 29)
    torch.testing.assert_close(Star(8)(q, k, v), dense(q, k, v))


def test_star_with_one_block_is_dense():
    q, k, v = qkv(29)
    torch.testing.assert_close(Star(32)(q, k, v), dense(q, k, v))
    method = Star(8, question=2)
    method(q, k, v)
    kept = sum(at + 1 if at >= 27 else at % 8 + 1 + 8 * (at >= 8) for at in range(29))
    assert method.measured_density() == pytest.approx(kept / (29 * 15))
    with pytest.raises(Unsupported, match="causal"):
        method.attend(q, k, v, scale=1.0, causal=False)


def combined(block, region, pool, asks):
    """The paper's p(j | i), key by key."""
    def row(q, k, v, at, head, queries=None):
        scale, p = len(q) ** -0.5, torch.zeros(len(k), dtype=k.dtype)
        direct = [j for j in range(at + 1) if j // block == at // block]
        starts = range(0, at // block * block, region)
        pooled = {s: (k[s : s + region].amax(0) if pool == "max" else k[s : s + region].mean(0)) for s in starts}
        Z = sum((q @ k[j] * scale).exp() for j in direct) + sum((q @ pooled[s] * scale).exp() for s in starts)
        for j in direct:
            p[j] = (q @ k[j] * scale).exp() / Z
        for s in starts:
            ask = pooled[s] if queries is None else queries[s : s + region].amax(0)
            inside = (k[s : s + region] @ ask * scale).softmax(0)
            p[s : s + region] = (q @ pooled[s] * scale).exp() / Z * inside
        torch.testing.assert_close(p.sum(), torch.ones((), dtype=p.dtype))
        assert (p[: at + 1] > 0).all() and (p[at + 1 :] == 0).all()
        return p @ v

    return row


@pytest.mark.parametrize(("T", "S"), [(29, 29), (3, 29), (1, 24), (5, 5)])
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_combiner_is_its_factorised_distribution(T, S, pool):
    q, k, v = qkv(T, S)
    torch.testing.assert_close(Combiner(8, 4, pool)(q, k, v), each_query(q, k, v, combined(8, 4, pool, "keys")))


def test_combiner_with_pooled_queries_is_the_papers():
    q, k, v = qkv(29)
    row = combined(8, 4, "max", "queries")
    want = torch.stack([
        torch.stack([row(q[b, h, t], k[b, h // 2], v[b, h // 2], t, h, q[b, h]) for t in range(29)]) for b in range(2) for h in range(4)
    ]).view(q.shape)
    torch.testing.assert_close(Combiner(8, 4, summary="queries")(q, k, v), want)
    with pytest.raises(Unsupported, match="keys"):
        Combiner(8, 4, summary="queries")(q[:, :, -2:], k, v)


def test_combiner_with_regions_of_one_key_is_dense():
    q, k, v = qkv(29)
    torch.testing.assert_close(Combiner(8, 1)(q, k, v), dense(q, k, v))


def one_by_one(method, q, k, v):
    return torch.cat([method(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1]) for t in range(q.shape[2])], 2)


SAME_IN_DECODING = [
    Combiner(8, 4), SWAT(7), Scattered(5), SwinBERT(29, block=8), SparseBEV(4, 6, 5.0).double(), *(LSG(4, 2, 3, pick) for pick in PICKS),
]


@pytest.mark.parametrize("method", SAME_IN_DECODING, ids=lambda m: m.name + str(m.arguments.get("pick", "")))
def test_prefill_is_decoding(method):
    q, k, v = qkv(29)
    torch.testing.assert_close(method(q, k, v), one_by_one(method, q, k, v))


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="decoding is phase 2: what is generated sees all that the prompt's blocks did not")
def test_prefill_is_decoding_for_star():
    q, k, v = qkv(29)
    torch.testing.assert_close(Star(8)(q, k, v), one_by_one(Star(8), q, k, v))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "S", "window"), [(29, 29, 7), (3, 29, 7), (29, 29, 1), (270, 275, 9), (9, 9, 99)])
def test_swat_is_its_sum_over_the_window(T, S, window, causal):
    q, k, v = qkv(T, S, batch=1)
    size = [-(2.0**-4), -(2.0**-8), 2.0**-4, 2.0**-8]

    def row(q, k, v, at, head):
        out = torch.zeros_like(q)
        for j in range(max(0, at - window + 1), at + 1 if causal else min(S, at + window)):
            out = out + v[j] / (1 + (-(q @ k[j]) / 6**0.5 - size[head] * abs(at - j)).exp())
        return out

    method = SWAT(window)
    torch.testing.assert_close(method.attend(q, k, v, scale=6**-0.5, causal=causal), each_query(q, k, v, row))
    pairs = sum(min(at, window - 1) + 1 + (0 if causal else min(S - 1 - at, window - 1)) for at in range(S - T, S))
    seen = T * S if causal is False else sum(at + 1 for at in range(S - T, S))
    assert method.measured_density() == pytest.approx(pairs / seen)


def test_swats_slopes_are_balanced():
    assert slopes(8).sum() == 0 and slopes(1).tolist() == [-(2.0**-8)] and len(slopes(5)) == 5


def stood_for(pick, k, v, head, factor, seed):
    """(keys, values) that stand for a block, in words of the paper's five selections."""
    M, width = k.shape
    C = M // factor
    if pick == "pool":
        return k.view(C, factor, width).mean(1), v.view(C, factor, width).mean(1)
    if pick == "lsh":
        plane = torch.randn(width, C // 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        kind = torch.cat([k @ plane, -(k @ plane)], 1).argmax(1)
        classes = kind.unique().tolist()
        return torch.stack([k[kind == c].mean(0) for c in classes]), torch.stack([v[kind == c].mean(0) for c in classes])
    at = {"norm": sorted(range(M), key=lambda j: -float(k[j] @ k[j]))[:C], "stride": [c * factor + head % factor for c in range(C)],
          "block_stride": [head % factor * C + c for c in range(C)]}[pick]
    return k[at], v[at]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "S", "first"), [(45, 45, 3), (45, 45, 0), (5, 45, 1), (1, 37, 0), (2, 2, 3)])
@pytest.mark.parametrize("pick", PICKS)
def test_lsg_is_one_softmax_over_gathered_keys(pick, T, S, first, causal):
    q, k, v = qkv(T, S, batch=1)
    block, factor = 8, 2

    def row(q, k, v, at, head):
        n = (at - first) // block
        if at < first:
            keys, values = (k[: at + 1], v[: at + 1]) if causal else (k, v)
        else:
            low, high = first + max(0, n - 1) * block, at + 1 if causal else min(S, first + (n + 2) * block)
            keys, values = [k[:first], k[low:high]], [v[:first], v[low:high]]
            whole = (S - first) // block
            for b in range(whole):
                if 2 <= (n - b if causal else abs(n - b)) <= 1 + factor:
                    here = slice(first + b * block, first + (b + 1) * block)
                    few = stood_for(pick, k[here], v[here], head // 2, factor, 4)
                    keys.append(few[0])
                    values.append(few[1])
            keys, values = torch.cat(keys), torch.cat(values)
        return (keys @ q / 6**0.5).softmax(0) @ values

    method = LSG(block, factor, first, pick, seed=4)
    torch.testing.assert_close(method.attend(q, k, v, scale=6**-0.5, causal=causal), each_query(q, k, v, row))


@pytest.mark.parametrize("pick", PICKS)
def test_lsg_of_a_short_input_is_dense(pick):
    q, k, v = qkv(17)
    torch.testing.assert_close(LSG(8, 2, 1, pick)(q, k, v), dense(q, k, v))


def test_lsg_counts_what_it_forms():
    method = LSG(8, 2, 1, "pool")
    method(*qkv(45, batch=1))
    pairs = sum(1 if p < 1 else 1 + p - (1 + max(0, (p - 1) // 8 - 1) * 8) + 1 + 4 * min(2, max(0, (p - 1) // 8 - 1)) for p in range(45))
    assert method.measured_density() == pytest.approx(pairs / (45 * 23))


def rolled(q, k, v, group, shift, at):
    """Groups after a roll, as LongLoRA computes them, keys later than the query left out."""
    q, k, v, place = (x.roll(-shift, -2) for x in (q, k, v, at[:, None]))
    outs = []
    for start in range(0, len(at), group):
        one = slice(start, start + group)
        score = (q[..., one, :] @ k[..., one, :].mT / q.shape[-1] ** 0.5).masked_fill(place[one].mT > place[one], -torch.inf)
        outs.append(score.softmax(-1) @ v[..., one, :])
    return torch.cat(outs, -2).roll(shift, -2)


def test_longlora_trains_by_rolled_groups_and_serves_dense():
    q, k, v = qkv(32)
    method, at = LongLoRA(8, 4, 4).train(), torch.arange(32)
    wide_k, wide_v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    want = torch.cat([rolled(q[:, h], wide_k[:, h], wide_v[:, h], 8, 4 * (h >= 2), at)[:, None] for h in range(4)], 1)
    torch.testing.assert_close(method(q, k, v), want)
    torch.testing.assert_close(method.reference(q, k, v), want)
    torch.testing.assert_close(method.eval()(q, k, v), dense(q, k, v))
    torch.testing.assert_close(method.train()(q, k, v), want)


@pytest.mark.parametrize(("method", "rule"), [
    (SinkLoRA(8, 2, 0.25, 4, 4), lambda i, j, h: j < 2 or (i // 8 == j // 8 if h < 3 else (i + 4) // 8 % 4 == (j + 4) // 8 % 4)),
    (SCCA(8, 2, 4, 4), lambda i, j, h: (j + (0 if h < 2 else 4)) % 32 // 8 == i // 8),
], ids=["sinklora", "scca"])
def test_the_others_train_by_their_masks_and_serve_dense(method, rule):
    q, k, v = qkv(32)
    rows = [[[j for j in range(i + 1) if rule(i, j, h)] for i in range(32)] for h in range(4)]

    def row(q, k, v, at, head):
        return softmax_over(lambda a, h: rows[h][a])(q, k, v, at, head) if rows[head][at] else torch.zeros_like(q)

    torch.testing.assert_close(method.train()(q, k, v), each_query(q, k, v, row))
    torch.testing.assert_close(method.eval()(q, k, v), dense(q, k, v))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "S"), [(31, 31), (4, 31), (1, 3)])
def test_scattered_attention_is_linear_attention_in_each_window(T, S, causal):
    q, k, v = qkv(T, S)
    group = torch.tensor([7, 1, 1, 7, 0, 0, 0, 7, 3] * 4)[:S]
    phi = torch.nn.functional.elu

    def row(q, k, v, at, head):
        keys = [j for j in range(at + 1 if causal else S) if group[j] == group[at]]
        weight = torch.stack([(phi(q * 0.5) + 1) @ (phi(k[j] * 0.5) + 1) for j in keys])
        return weight / weight.sum() @ v[keys]

    method = Scattered()
    with method.bind(group):
        torch.testing.assert_close(method.attend(q, k, v, scale=0.25, causal=causal), each_query(q, k, v, row))
        pairs = sum(int((group[: at + 1 if causal else S] == group[at]).sum()) for at in range(S - T, S))
        assert method.measured_density() == pytest.approx(pairs / (sum(range(S - T + 1, S + 1)) if causal else T * S))
        with pytest.raises(BadInput, match="window"):
            method(*qkv(99))
        with pytest.raises(Unsupported, match="padding"):
            method.attend(q, k, v, scale=1.0, padding_BS=torch.ones(2, S, dtype=torch.bool))



@pytest.mark.parametrize(("T", "S"), [(19, 19), (3, 19)])
def test_a_learned_mask_multiplies_before_the_sum_and_is_binary_afterwards(T, S):
    q, k, v = qkv(T, S)
    method = SwinBERT(24, block=4).double()
    gate = method.logit_LL.sigmoid().detach()
    for soft in (True, False):
        method.train(soft)

        def row(q, k, v, at, head, soft=soft):
            m = [1.0 if j == at else float(gate[at, j]) if soft else float(gate[at, j] > 0.5) for j in range(at + 1)]
            weight = torch.tensor(m, dtype=q.dtype) * (k[: at + 1] @ q / 6**0.5).exp()
            return weight / weight.sum() @ v[: at + 1]

        torch.testing.assert_close(method(q, k, v), each_query(q, k, v, row))
    kept = sum(int((gate[at, :at] > 0.5).sum()) + 1 for at in range(S - T, S))
    method.measured_density()
    method(q, k, v)
    assert method.measured_density() == pytest.approx(kept / sum(range(S - T + 1, S + 1)))
    assert method.penalty().item() == pytest.approx(float(gate.mean()))
    with pytest.raises(BadInput, match="resized"):
        method(*qkv(25))
    with torch.no_grad():
        method.logit_LL.fill_(3.0)
    torch.testing.assert_close(method(q, k, v), dense(q, k, v))


def test_a_resized_mask_keeps_its_corners():
    method = SwinBERT(9).eval()
    other = method.resized(17)
    assert not other.training and torch.equal(other.logit_LL[::2, ::2], method.logit_LL)
    torch.testing.assert_close(other.logit_LL[1, 0], method.logit_LL[:2, 0].mean())


def test_the_penalty_leaves_the_pairs_that_matter():
    draw, L = torch.Generator().manual_seed(0), 12
    method = SwinBERT(L, weight=2.0, block=4).train()
    step, lag = torch.optim.Adam(method.parameters(), 0.1), 5
    for _ in range(150):
        q, k, v = (size * torch.randn(8, 1, L, 4, generator=draw) for size in (0.1, 0.1, 1.0))
        want = (v + v.roll(lag, 2)) / 2                       # the own value and that `lag` before
        loss = (method(q, k, v) - want)[:, :, lag:].square().mean() + method.penalty()
        step.zero_grad()
        loss.backward()
        step.step()
    found = method.eval().mask(L, L)[lag:].tril(lag - 1)
    planted = torch.eye(L).roll(-lag, 1)[lag:]
    assert torch.equal(found, planted)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [0.0, 0.6])
@pytest.mark.parametrize("T", [19, 3])
def test_distance_is_held_against_keys(T, rows, causal):
    q, k, v = qkv(T, 19)
    place = torch.rand(19, 2, generator=torch.Generator().manual_seed(3))
    method = SparseBEV(4, 6, rows).double()

    def row(q, k, v, at, head):
        keys = [j for j in range(at + 1 if causal else 19) if not rows or abs(float(place[j, 0] - place[at, 0])) < rows]
        tau = (1 + (q @ method.slope_HD[head] + method.start_H[head]).exp()).log().detach()
        score = torch.stack([q @ k[j] * 0.4 - tau * (place[j] - place[at]).double().norm() for j in keys])
        return score.softmax(0) @ v[keys]

    with method.bind(place):
        got = method.attend(q, k, v, scale=0.4, causal=causal)
        torch.testing.assert_close(got, each_query(q, k, v, row))
        with pytest.raises(BadInput, match="coordinates"):
            method(*qkv(20))


def test_a_larger_slope_looks_nearer_and_none_is_dense():
    q, k, v = qkv(40, batch=1)
    method, reach = SparseBEV(4, 6).double(), []
    apart = (torch.arange(40)[:, None] - torch.arange(40)).abs().double()
    for start in (-40.0, -4.0, -2.0, 0.0, 2.0):
        with torch.no_grad():
            method.slope_HD.zero_()
            method.start_H.fill_(start)
            reach.append((method.select(q, k).weight * apart).sum(-1).mean().item())
            if start == -40.0:
                torch.testing.assert_close(method(q, k, v), dense(q, k, v))
    assert all(a > b for a, b in zip(reach, reach[1:], strict=False))


PADDED = [Star(8, 3), Combiner(8, 4), SWAT(5), LSG(4, 2, 2), Scattered(6), SwinBERT(32).eval(), SparseBEV(4, 6).double()]


@pytest.mark.parametrize("method", PADDED, ids=lambda m: m.name)
def test_padding_is_not_there(method):
    q, k, v = qkv(23)
    real = torch.ones(2, 23, dtype=torch.bool)
    real[0, :6] = real[1, 15:] = False
    got = method.attend(q, k, v, scale=6**-0.5, padding_BS=real)
    for b in range(2):
        alone = method(*(x[b : b + 1, :, real[b]] for x in (q, k, v)))
        torch.testing.assert_close(got[b : b + 1, :, real[b]], alone)
    assert (got[0, :, :6] == 0).all() and (got[1, :, 15:] == 0).all()
