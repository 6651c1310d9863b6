"""AdaSpa, chunks with budgets by recall, antidiagonals, FlexPrefill and Quest's bounds by top-p against their formulas and what was planted."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rarefy.attention.cache import Cache
from rarefy.attention.dynamic.adaspa import AdaSpa
from rarefy.attention.dynamic.antidiagonal import Antidiagonal, AntidiagonalTopP
from rarefy.attention.dynamic.chunked import Chunked
from rarefy.attention.dynamic.flex_prefill import FlexPrefill
from rarefy.attention.dynamic.quest_top_p import QuestTopP
from rarefy.attention.dynamic.vertical_slash import VerticalSlash
from rarefy.errors import BadInput
from rarefy.kernels.block_attention import block_attention

H, G, D = 4, 2, 8


def qkv(T, batch=1, seed=0, S=None):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, n, t, D, generator=draw, dtype=torch.float64) for n, t in ((H, T), (G, S or T), (G, S or T))]


def weights(q, k, keep):
    return (q @ k.repeat_interleave(H // G, 1).mT / D**0.5).masked_fill(~keep, -torch.inf).softmax(-1)


def attended(q, k, v, keep):
    return weights(q, k, keep) @ v.repeat_interleave(H // G, 1)


def causal(T):
    return torch.ones(T, T, dtype=torch.bool).tril()


def full(T):
    return torch.ones(T, T, dtype=torch.bool)


def spread(mask, block, T):
    return mask.repeat_interleave(block, 2)[:, :, :T].repeat_interleave(block, 3)[..., :T]


# ----------------------------------------------------------------------------------------------------------- AdaSpa


def block_mass(weight, block):
    """[B, H, Q, N] of a map, block by block."""
    B, _, T, S = weight.shape
    out = torch.zeros(B, H, -(-T // block), -(-S // block), dtype=weight.dtype)
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            out[:, :, i, j] = weight[:, :, i * block : (i + 1) * block, j * block : (j + 1) * block].sum((2, 3))
    return out


@pytest.mark.parametrize("is_causal", [True, False])
def test_cached_lse_gives_the_mass_of_blocks_while_inputs_repeat_and_near_it_when_they_drift(is_causal):
    q, k, _ = qkv(22, batch=2)
    seen, method = causal(22) if is_causal else full(22), AdaSpa(block=4, query_block=4)
    lse = (q @ k.repeat_interleave(2, 1).mT / D**0.5).masked_fill(~seen, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(method.masses(q, k, is_causal, lse), block_mass(weights(q, k, seen), 4))
    assert method.masses(40 * q, 40 * k, is_causal, lse).max() <= 16                             # an lse that is out of date passes no bound
    moved = [x + 0.05 * y for x, y in zip((q, k), qkv(22, 2, seed=1)[:2], strict=True)]
    wanted = block_mass(weights(*moved, seen), 4)
    got = method.masses(*moved, is_causal, lse)
    assert 1e-3 < float((got - wanted).norm() / wanted.norm()) < 0.2


def adaspa_mask(mass, budget):
    """Its definition for attention both ways, in loops."""
    B, _, Q, N = mass.shape
    keep = torch.zeros(mass.shape, dtype=torch.bool)
    for b in range(B):
        recall = []
        for h in range(H):
            rows = [sorted(mass[b, h, i].tolist(), reverse=True)[: max(1, round(budget * N))] for i in range(Q)]
            recall.append(sum(map(sum, rows)) / float(mass[b, h].sum()))
        n = min(H // 2, sum(r > 0.8 for r in recall))
        order, shift = sorted(range(H), key=lambda h: -recall[h]), min(budget / 2, 1 - budget)  # noqa: B023
        share = [budget] * H
        for h in order[:n]:
            share[h] = budget - shift
        for h in order[H - n :]:
            share[h] = budget + shift
        for h in range(H):
            for i in range(Q):
                best = sorted(range(N), key=lambda j: -float(mass[b, h, i, j]))[: max(1, round(share[h] * N))]  # noqa: B023
                keep[b, h, i, best] = True
    return keep, recall


def sharpened(q, k):
    """The first two heads' queries aim, four at a time, at one key, so that one block holds most of their mass."""
    q = q.clone()
    q[:, :2] = 6 * k.repeat_interleave(2, 1)[:, :2, torch.arange(q.shape[2]) // 4 * 12 % q.shape[2]]
    return q


@pytest.mark.parametrize("budget", [0.25, 0.5, 0.8])
def test_adaspa_moves_budget_from_heads_that_keep_most_to_those_that_keep_least(budget):
    q, k, v = qkv(40, batch=2)
    q = sharpened(q, k)
    method = AdaSpa(budget, block=4, query_block=4)
    mask, recall = adaspa_mask(block_mass(weights(q, k, full(40)), 4), budget)
    assert recall[0] > 0.8 and (budget > 0.5 or recall[2] < 0.8)
    torch.testing.assert_close(method.attend(q, k, v, scale=D**-0.5, causal=False), attended(q, k, v, spread(mask, 4, 40)))
    per_head = mask.double().mean((0, 2, 3))
    assert per_head[0] < per_head[2] and method.measured_density() == pytest.approx(budget, abs=0.06)


def test_a_run_of_adaspa_searches_where_it_should_with_the_lse_of_the_last_dense_step():
    inputs = [[sharpened(q, k), k, v] for q, k, v in (qkv(24, seed=s) for s in range(7))]
    method, how = AdaSpa(0.3, block=4, query_block=4, dense=0.3, every=2), {"scale": D**-0.5, "causal": False}
    with method.denoising(steps=7):                                            # dense: 0, 1 (searched); masks found at 1, 3, 5
        outs = [method.attend(*x, **how) for x in inputs]
    for n in range(2):
        torch.testing.assert_close(outs[n], attended(*inputs[n], full(24)))
    q, k, _ = inputs[1]
    lse = (q @ k.repeat_interleave(2, 1).mT / D**0.5).logsumexp(-1)
    for n, at in ((2, 1), (3, 3), (4, 3), (5, 5), (6, 5)):
        q, k, _ = inputs[at]
        score = q @ k.repeat_interleave(2, 1).mT / D**0.5
        mass = block_mass((score - torch.maximum(lse, score.amax(-1))[..., None]).exp(), 4)
        torch.testing.assert_close(outs[n], attended(*inputs[n], spread(adaspa_mask(mass, 0.3)[0], 4, 24)))
    with method.denoising(steps=3), pytest.raises(BadInput, match="other sizes"):
        method.attend(*inputs[0], **how)
        method.attend(*qkv(28), **how)


def test_adaspa_at_full_budget_is_dense_whatever_heads_keep():
    q, k, v = qkv(22)
    torch.testing.assert_close(AdaSpa(1.0, block=4, query_block=4)(sharpened(q, k), k, v), attended(sharpened(q, k), k, v, causal(22)))


# -------------------------------------------------------------------------------------------------------- antidiagonals


def antidiagonal_mass(q, k, block, stride, is_causal):
    """[B, H, Q, N] by the paper's definition, tile by tile."""
    B, _, T, _ = q.shape
    S, score = k.shape[2], q @ k.repeat_interleave(H // G, 1).mT / D**0.5
    first, tiles = (S - T) // stride, -(-S // stride)
    tile = torch.full((B, H, tiles - first, tiles), -math.inf, dtype=q.dtype)
    for x in range(tiles - first):
        for y in range(first + x + 1 if is_causal else tiles):
            tile[:, :, x, y] = sum(
                score[:, :, at - (S - T), key] for i in range(stride)
                if S - T <= (at := (first + x) * stride + stride - 1 - i) < S and (key := y * stride + i) < S) / stride
    mass = tile.softmax(-1)
    Q0, N = (S - T) // block, -(-S // block)
    out = torch.zeros(B, H, N - Q0, N, dtype=q.dtype)
    for x in range(tiles - first):
        for y in range(tiles):
            out[:, :, (first + x) * stride // block - Q0, y * stride // block] += mass[:, :, x, y]
    return out


@pytest.mark.parametrize(("T", "S", "is_causal"), [(32, 32, True), (29, 29, True), (11, 30, True), (29, 29, False)])
def test_antidiagonals_by_their_definition(T, S, is_causal):
    q, k, _ = qkv(T, batch=2, S=S)
    wanted = antidiagonal_mass(q, k, 8, 4, is_causal)
    torch.testing.assert_close(Antidiagonal(block=8, query_block=8, stride=4).scores(q, k, 8, is_causal), wanted)


@pytest.mark.parametrize("p", [0.5, 0.75, 0.95])
def test_antidiagonal_top_p_keeps_the_first_and_the_own_block_and_then_the_fewest_that_reach_p(p):
    q, k, v = qkv(61, batch=2)
    q = 3 * q
    mass, keep = antidiagonal_mass(q, k, 8, 4, True), torch.zeros(2, H, 8, 8, dtype=torch.bool)
    for b in range(2):
        for h in range(H):
            for i in range(8):
                row = mass[b, h, i].tolist()
                chosen = sorted({0, i})
                for j in sorted(set(range(i)) - {0}, key=lambda j: -row[j]):  # noqa: B023
                    if sum(row[c] for c in chosen) >= p * sum(row):
                        break
                    chosen.append(j)
                keep[b, h, i, chosen] = True
    assert 0.25 < keep.tril().float().mean() < 0.55                            # all that is seen: 0.5625
    method = AntidiagonalTopP(block=8, query_block=8, dial=p, stride=4)
    torch.testing.assert_close(method(q, k, v), attended(q, k, v, spread(keep, 8, 61) & causal(61)))


def planted(back):
    """Queries and keys whose heavy logits are a column (back None: the key at 37), or the diagonal so many keys back."""
    draw, T = torch.Generator().manual_seed(0), 256
    q, k = (0.5 * torch.randn(1, 1, T, T, generator=draw) for _ in range(2))
    if back is None:
        q[..., 0], k[..., 0], k[:, :, 37, 0] = 40.0, 0.0, 40.0
        return q, k, {(i, 2) for i in range(8, 16)}
    code = 40 * torch.eye(T)
    q[:, :, back:] += code[:-back]
    return q, k + code, {(i, i - 3) for i in range(8, 16)}


@pytest.mark.parametrize("back", [None, 47, 49])
def test_antidiagonals_see_planted_lines(back):
    q, k, heavy = planted(back)
    mask = Antidiagonal(0.3, 16, 16, stride=8).choose(q, k, True)[0, 0]
    assert all(bool(mask[i, j]) for i, j in heavy)
    assert mask.float().mean() < 0.2


def test_antidiagonals_of_even_tiles_are_blind_to_diagonals_at_an_even_distance():
    """On an antidiagonal of s places i + j = s - 1, so that i - j is odd where s is even: the paper's "every slash" holds for half of them."""
    q, k, heavy = planted(48)
    mask = Antidiagonal(0.3, 16, 16, stride=8).choose(q, k, True)[0, 0]
    assert sum(bool(mask[i, j]) for i, j in heavy) <= 4
    mask = Antidiagonal(0.3, 15, 15, stride=5).choose(q, k, True)[0, 0]
    assert all(bool(mask[i, i - 3] | mask[i, i - 4]) for i in range(9, 17))


def test_antidiagonal_blocks_are_whole_tiles():
    with pytest.raises(BadInput, match="query_block=12"):
        Antidiagonal(block=8, query_block=12, stride=8)
    q, k, v = qkv(33)
    step = Antidiagonal(0.1, 8, 8, 4)(q[:, :, -1:], k, v)
    torch.testing.assert_close(step, attended(q, k, v, causal(33))[:, :, -1:])
    torch.testing.assert_close(Antidiagonal(0.1, 8, 8, 4)(q[:, :, :1], k[:, :, :1], v[:, :, :1]), v[:, :, :1].repeat_interleave(2, 1))


# -------------------------------------------------------------------------------------------------------------- chunks


def fitted(method, *batches):
    for batch in batches:
        method.observe(*batch)
    method.finish()
    return method


def test_recall_from_the_difference_of_lse_is_the_mass_that_is_kept():
    q, k, v = qkv(50, batch=2)
    method = fitted(Chunked(0.3, chunk=16, last=4), (q, k, v))
    keep = method.choose(q, k, True)
    torch.testing.assert_close(method.recall(q, k, v), (weights(q, k, causal(50)) * keep).sum(-1))
    assert 0.2 < method.measured_density() or keep.any()


def test_chunks_are_served_alike_at_once_and_through_a_cache():
    q, k, v = qkv(50)
    method = fitted(Chunked(0.3, chunk=16, last=4), qkv(50, seed=1))
    whole, cache, parts = method(q, k, v), Cache(), []
    for start in range(0, 50, 16):
        keys, values = cache.update(k[:, :, start : start + 16], v[:, :, start : start + 16], 0)
        parts.append(method.attend(q[:, :, start : start + 16], keys, values, scale=D**-0.5))
    torch.testing.assert_close(torch.cat(parts, 2), whole)
    torch.testing.assert_close(method.attend(q[:, :, 8:], k, v, scale=D**-0.5)[:, :, 8:], whole[:, :, 16:])    # chunks are cut by position
    later = k.clone()
    later[:, :, 32:] += 5
    torch.testing.assert_close(method(q, later, v)[:, :, :32], whole[:, :, :32])            # what comes later decides nothing
    with pytest.raises(BadInput, match="ahead"):
        method.attend(q, k, v, scale=1.0, causal=False)


def test_one_chunk_is_vertical_slash_of_the_same_probe():
    q, k, v = qkv(40)
    method = fitted(Chunked(0.3, chunk=64, last=8), (q, k, v))
    keep = method.choose(q, k, True)
    for h in range(H):
        density = float(keep[0, h].sum()) / 820
        alone = VerticalSlash(density, last=8).choose(q, k, True)[0, h]
        assert float((alone ^ keep[0, h]).sum()) <= 0.02 * 820                               # the same lines, up to a cell of the histogram


def test_each_chunk_probes_with_its_own_last_queries():
    q, k, v = qkv(48)
    method = fitted(Chunked(0.3, chunk=16, last=4), (q, k, v))
    keep = method.choose(q, k, True)
    for start in (0, 16, 32):
        probe, end = weights(q, k, causal(48))[0, :, start + 12 : start + 16, : start + 16], start + 16
        for h in range(H):
            mass = probe[h].sum(0)
            at = int(mass[: start + 1].argmax())                                             # the heaviest whole column
            column = [int((mass > mass[at]).sum())]
            if column[0] == 0:
                assert bool(keep[0, h, start:end, at].all())


def test_heads_are_raised_to_the_target_recall_and_no_further():
    q, k, v = qkv(48, batch=3)
    q = torch.cat([4 * q[:, :2], 0.3 * q[:, 2:]], 1)
    for target in (0.6, 0.85):
        method = fitted(Chunked(0.05, target=target, chunk=16, last=8), (q, k, v))
        recall = method.recall(q, k, v).mean((0, 2))
        assert bool((recall >= target - 1e-9).all())
        method.cells_H -= 40                                                                 # a hundredth less of the lines
        least = method.recall(q, k, v).mean((0, 2))
        assert bool((least[2:] < target).all())
    floor = fitted(Chunked(0.5, target=0.01, chunk=16, last=8), (q, k, v))
    assert float(floor.choose(q, k, True).double().sum((0, 2, 3)).min()) >= 0.5 * 3 * 48 * 49 / 2


def test_without_a_target_heads_share_the_budget_at_one_recall():
    q, k, v = qkv(48, batch=3)
    q = torch.cat([4 * q[:, :2], 0.3 * q[:, 2:]], 1)
    method = fitted(Chunked(0.3, chunk=16, last=8), (q, k, v))
    method(q, k, v)
    assert method.measured_density() == pytest.approx(0.3, abs=0.02)
    recall = method.recall(q, k, v).mean((0, 2))
    assert float(recall.max() - recall.min()) < 0.1
    density = method.choose(q, k, True).double().mean((0, 2, 3))
    assert float(density[2:].min()) > 1.5 * float(density[:2].max())


# ------------------------------------------------------------------------------------------------------- FlexPrefill


def fewest(mass, share):
    """How many of the heaviest hold a share."""
    total, count = 0.0, 0
    for x in sorted(mass, reverse=True):
        if total >= share * sum(mass):
            break
        total, count = total + x, count + 1
    return count


def flex_mask(q, k, block, gamma, tau):
    """[H, N, N] of one prompt of whole blocks, pattern by pattern."""
    T, N = q.shape[2], q.shape[2] // block
    keep, divergences = torch.zeros(H, N, N, dtype=torch.bool), []
    probe = weights(q, k, causal(T))[0, :, -block:]
    for h in range(H):
        means = [x.unflatten(0, (N, block)).mean(1) for x in (q[0, h], k[0, h // 2])]
        guess = (means[0] @ means[1].T / D**0.5).masked_fill(~causal(N), -math.inf).softmax(-1)
        p, r = probe[h].sum(0).unflatten(0, (N, block)).sum(1) / block, guess[-1]
        m = (p + r) / 2
        divergences.append(math.sqrt(float(((p * (p / m).log()).sum() + (r * (r / m).log()).sum()) / 2)))
        keep[h, :, 0] = keep[h].diagonal()[:] = True
        if divergences[-1] < tau:
            flat = guess.flatten()
            best = sorted(range(N * N), key=lambda i: -float(flat[i]))[: fewest(flat.tolist(), gamma)]  # noqa: B023
            keep[h].view(-1)[best] = True
        else:
            slash = [sum(float(probe[h, i, T - block + i - d]) for i in range(block) if T - block + i >= d) for d in range(T)]
            for mass, is_column in ((probe[h].sum(0).tolist(), True), (slash, False)):
                each = [sum(mass[n * block : (n + 1) * block]) for n in range(N)]
                order = [0, *sorted(range(1, N), key=lambda n: -each[n])]  # noqa: B023
                for n in order[: fewest(mass, gamma) // block + 1]:
                    if is_column:
                        keep[h, :, n] = True
                    else:
                        keep[h].diagonal(-n)[:] = True
        keep[h] &= causal(N)
    return keep, divergences


@pytest.mark.parametrize("gamma", [0.4, 0.8])
def test_flex_prefill_picks_a_pattern_by_divergence_and_the_fewest_that_hold_gamma(gamma):
    q, k, v = qkv(40)
    q[:, ::2] *= 0.2                                                           # flat heads, whose block means can be trusted
    q[:, 1::2] *= 2
    keep, divergences = flex_mask(q, k, 4, gamma, 0.12)
    assert max(divergences[::2]) < 0.12 < min(divergences[1::2])
    method = FlexPrefill(block=4, dial=gamma, tau=0.12)
    assert torch.equal(method.choose(q, k, True)[0], keep)
    assert 0.1 < keep.float().mean() < 0.5
    torch.testing.assert_close(method(q, k, v), attended(q, k, v, spread(keep[None], 4, 40) & causal(40)))
    with pytest.raises(BadInput, match="ahead"):
        method.attend(q, k, v, scale=1.0, causal=False)


# ---------------------------------------------------------------------------------------------------------- Quest, top-p


def test_quest_top_p_keeps_the_pages_whose_bounds_hold_p():
    q, k, v = qkv(30)
    method = QuestTopP(block=4, dial=0.7)
    keep = torch.zeros(1, H, 30, 30, dtype=torch.bool)
    for h in range(H):
        for t in range(30):
            pages = [k[0, h // 2, 4 * n : min(4 * n + 4, 30)] for n in range(t // 4 + 1)]
            bound = torch.stack([torch.maximum(q[0, h, t] * x.amax(0), q[0, h, t] * x.amin(0)).sum() / D**0.5 for x in pages])
            mass, own = bound.softmax(0).tolist(), t // 4
            chosen = [own]
            for n in sorted(range(own), key=lambda n: -mass[n]):  # noqa: B023
                if sum(mass[c] for c in chosen) >= 0.7:
                    break
                chosen.append(n)
            for n in chosen:
                keep[0, h, t, 4 * n : 4 * n + 4] = True
    keep &= causal(30)
    assert 0.2 < float(keep.sum()) / (H * 465) < 0.9
    torch.testing.assert_close(method(q, k, v), attended(q, k, v, keep))


def test_block_attention_with_all_blocks_returns_the_lse_that_adaspa_forms():
    q, k, v = qkv(20)
    _, lse = block_attention(q, k, v, torch.ones(1, 1, 5, 5, dtype=torch.bool), block=4, query_block=4, scale=D**-0.5, return_lse=True)
    method = AdaSpa(block=4, query_block=4)
    torch.testing.assert_close(method.masses(q, k, True, lse), method.masses(q, k, True))
    torch.testing.assert_close(scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True),
                               AdaSpa(1.0, 4, 4)(q, k, v))
