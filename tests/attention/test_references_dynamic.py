"""Dynamic and structured attention against the rules of their authors' own code, written anew in that code's layout: whole matrices, sorts, sums."""

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize, pad, scaled_dot_product_attention

from rarefy.attention.dynamic.double_sparsity import DoubleSparsity
from rarefy.attention.dynamic.hashing import planes
from rarefy.attention.dynamic.magicpig import MagicPIG
from rarefy.attention.dynamic.permuted import PermutedBlocks
from rarefy.attention.dynamic.pooled import Pooled
from rarefy.attention.dynamic.rettention import Rettention
from rarefy.attention.dynamic.sparge import SpargeAttention
from rarefy.attention.dynamic.sparse_d import SparseD
from rarefy.attention.dynamic.squeezed import Squeezed, clustered
from rarefy.attention.dynamic.tidal import Tidal
from rarefy.attention.dynamic.vertical_slash import VerticalSlash
from rarefy.attention.quest import Quest
from rarefy.attention.structured.moa import influence
from rarefy.attention.structured.star import Star

H, G, D = 4, 2, 8


def qkv(T, S=None, seed=0, sharp=1.0):
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, n, m, D, generator=draw, dtype=torch.float64) for n, m in ((H, T), (G, S or T), (G, S or T)))
    return q * sharp, k, v


def each(x):
    """Keys or values by query head."""
    return x.repeat_interleave(H // G, 1)


def see(T, S=None):
    return torch.ones(T, S or T, dtype=torch.bool).tril((S or T) - T)


def weights(q, k, mask):
    return (q @ each(k).mT / D**0.5).masked_fill(~mask, -torch.inf).softmax(-1)


def test_quest_ranks_full_pages_by_the_larger_end_and_adds_the_last_page():
    q, k, _ = qkv(1, 45)
    page, budget = 4, 0.4
    sign = torch.where(q > 0, 1.0, -1.0)
    ends = pad(each(k) * sign, (0, 0, 0, -45 % page), value=-torch.inf).unflatten(2, (-1, page)).amax(3)
    bound = ((q * sign) @ ends.mT)[..., :-1]                                   # the newest page does not compete, and takes a place
    places = round(budget * 12)
    wanted = torch.zeros(1, H, 1, 12, dtype=torch.bool).scatter(3, bound.topk(places - 1, -1).indices, True)
    wanted[..., -1] = True
    assert torch.equal(Quest(budget, page).choose(q, k, True), wanted)


def test_minference_blocks_are_those_of_the_largest_products_of_means():
    q, k, _ = qkv(32)
    block, n = 4, torch.arange(8)
    score = torch.einsum("bhmd,bhnd->bhmn", q.view(1, H, 8, block, D).mean(3), each(k).view(1, H, 8, block, D).mean(3))
    score = score.masked_fill(n > n[:, None], -torch.inf).masked_fill(n == n[:, None], torch.inf)     # ours: its own block whatever its score
    got = Pooled(0.5, block, block).choose(q, k, True)
    for row in range(8):
        top = score[:, :, row].topk(max(1, round(0.5 * (row + 1))), -1).indices
        assert torch.equal(got[:, :, row], torch.zeros(1, H, 8, dtype=torch.bool).scatter(2, top, True))


def test_minference_lines_are_column_sums_and_sums_of_diagonals():
    q, k, _ = qkv(30)
    column, slash = VerticalSlash(0.2, last=6).lines(q, k, True)
    last = weights(q, k, see(30))[:, :, -6:]
    torch.testing.assert_close(column, last.sum(2))
    wide = torch.cat((last, torch.zeros(1, H, 6, 6, dtype=torch.float64)), -1)
    assert wide.shape[-1] == 36
    for back in range(24):
        torch.testing.assert_close(slash[..., back], wide.diagonal(24 - back, 2, 3).sum(-1))


def test_sparge_counts_blocks_by_a_search_in_the_running_sum():
    q, k, _ = qkv(48, seed=3, sharp=2.0)
    k[:, :, 8:24] = k[:, :, 8:24] * 0.2 + 1.0
    block, theta, tau, n = 4, 0.4, 0.7, torch.arange(12)

    def pooled(x):
        cut = x.view(1, H, 12, block, D)
        unit = normalize(cut, dim=-1)
        return cut.mean(3), (unit @ unit.mT).mean((3, 4)) > theta

    (mean_q, like_q), (mean_k, like_k) = pooled(q), pooled(each(k))
    past = n <= n[:, None]
    score = (mean_q @ mean_k.mT / D**0.5).masked_fill(~like_k[:, :, None] | ~past, -torch.inf).softmax(-1).nan_to_num()
    ordered = score.sort(dim=-1, descending=True)
    count = torch.searchsorted(ordered.values.cumsum(-1), torch.full((1, H, 12, 1), tau, dtype=torch.float64), right=True).clamp_min(1)
    wanted = torch.zeros_like(past).expand(1, H, -1, -1).scatter(3, ordered.indices, n.expand(1, H, 12, 12) < count)
    wanted = (wanted | ~like_k[:, :, None] | ~like_q[..., None]) & past | torch.eye(12, dtype=torch.bool)
    got = SpargeAttention(dial=tau, block=block, query_block=block, theta=theta).choose(q, k, True)
    assert torch.equal(got, wanted)
    assert like_q.any() and not like_q.all() and like_k.any() and not wanted.all()


def test_magicpig_is_two_softmaxes_over_centred_keys_merged():
    bits, tables, sinks, window, centre = 3, 8, 4, 6, 20
    q, k, v = qkv(1, 60)
    shifted = each(k - k[:, :, sinks:centre].mean(2, keepdim=True))
    normal = planes(D, tables, bits, 0, q)
    side_q, side_k = ((x @ normal > 0).unflatten(-1, (tables, bits)) for x in (q, shifted))
    agree = (side_q[:, :, 0, None] == side_k).all(-1).sum(-1)                  # [1, H, S] tables
    middle = torch.zeros(60, dtype=torch.bool)
    middle[sinks:-window] = True
    p = (1 - cosine_similarity(q, shifted, dim=-1).acos() / torch.pi) ** bits
    u = 1 - (1 - p) ** (tables - 1) * (tables * p + 1 - p)
    logit = (q @ shifted.mT / D**0.5)[:, :, 0]
    exact = logit.masked_fill(middle, -torch.inf)
    drawn = (logit - u.log()).masked_fill(~(middle & (agree >= 2)), -torch.inf)
    outs, sums = zip(*((x.softmax(-1)[:, :, None] @ each(v), x.logsumexp(-1)) for x in (exact, drawn)), strict=True)
    share = torch.stack(sums).softmax(0)[..., None, None]
    method = MagicPIG(bits, tables, sinks, window, centre)
    torch.testing.assert_close(method(q, k, v), outs[0] * share[0] + outs[1] * share[1])
    assert 0 < (middle & (agree >= 2)).sum() < H * middle.sum()


def test_squeezed_divides_by_all_keys_as_if_each_were_its_centroid():
    q, k, _ = qkv(3, 40, sharp=2.0)
    segment, size = 16, 4
    got = Squeezed(dial=3.0, segment=segment, size=size).choose(q, k, True)
    label = clustered(k[:, :, :32].reshape(-1, segment, D), segment // size).view(1, G, 2, segment)
    for h in range(H):
        keys = k[0, h // 2, :32].view(2, segment, D)
        centroid, number, of = [], [], torch.zeros(32, dtype=torch.long)
        for s in range(2):
            for c in label[0, h // 2, s].unique():
                member = label[0, h // 2, s] == c
                of[s * segment : (s + 1) * segment][member] = len(centroid)
                centroid.append(keys[s][member].mean(0))
                number.append(float(member.sum()))
        score = (q[0, h] @ torch.stack(centroid).mT / D**0.5).exp()
        importance = score / (score * torch.tensor(number, dtype=torch.float64)).sum(-1, keepdim=True)
        assert torch.equal(got[0, h, :, :32], (importance >= torch.tensor(-3.0, dtype=torch.float64).exp())[:, of])
        assert 0 < got[0, h, :, :32].sum() < 96
    assert torch.equal(got[..., 32:], see(3, 40)[:, 32:].expand(1, H, 3, 8))


def test_tidal_masks_later_layers_with_the_positions_of_the_last_selection():
    method, places = Tidal(0.25, dense=1, every=2), None
    for layer in range(5):
        q, k, v = qkv(1, 24, seed=layer)
        logit = q @ each(k).mT / D**0.5
        if layer in (1, 3):
            own = torch.zeros_like(logit)
            own[..., -1] = torch.inf                                           # ours: the newest position always among them
            places = torch.zeros_like(logit, dtype=torch.bool).scatter(3, (logit + own).topk(6, -1).indices, True)
        keep = torch.ones_like(logit, dtype=torch.bool) if places is None else places
        torch.testing.assert_close(method.attend(q, k, v, scale=D**-0.5, layer=layer), logit.masked_fill(~keep, -torch.inf).softmax(-1) @ each(v))


def test_double_sparsity_discards_by_the_products_of_its_best_channels():
    q, k, v = qkv(20)
    loud = torch.linspace(0.2, 2, D, dtype=torch.float64)                      # channels differ, and not alike in q and in k
    q, k = q * loud[[3, 1, 6, 0, 7, 2, 5, 4]], k * loud[[2, 7, 1, 5, 6, 4, 0, 3]]
    method = DoubleSparsity(0.3, channels=0.5)
    method.observe(q, k, v)
    method.finish()
    value = torch.einsum("bgctd,bgsd->bgctsd", q.unflatten(1, (G, 2)), k).abs().mean((0, 2, 3, 4))     # every token attends to all
    best = value.topk(D // 2, -1).indices.repeat_interleave(2, 0)[None, :, None]
    label = q.gather(3, best.expand(1, H, 20, -1)) @ each(k).gather(3, best.expand(1, H, 20, -1)).mT
    label = label.masked_fill(~see(20), -torch.inf).masked_fill(torch.eye(20, dtype=torch.bool), torch.inf)
    got = method.choose(q, k, True)
    for t in range(20):
        drop = label[:, :, t].sort(dim=-1, descending=True).indices[..., max(1, round(0.3 * (t + 1))) :]
        assert torch.equal(got[:, :, t], torch.ones(1, H, 20, dtype=torch.bool).scatter(2, drop, False))


@pytest.mark.parametrize("S", [48, 44])
def test_pbs_sorts_segments_and_stops_where_the_running_sum_is_reached(S):
    """Whole matrices over sorted keys, causality by the places they came from."""
    q, k, v = qkv(S, seed=1, sharp=2.0)
    block, segment, dial = 4, 16, 0.6
    whole, N = S // segment * segment, S // block
    mass = weights(q, k, see(S))[:, :, -block:].mean(2)[..., :whole].unflatten(-1, (-1, segment))
    place = (mass.argsort(-1, descending=True) + torch.arange(0, whole, segment)[:, None]).flatten(2)
    place = torch.cat((place, torch.arange(whole, S).expand(1, H, -1)), -1)
    keys, values = (each(x).gather(2, place[..., None].expand(-1, -1, -1, D)) for x in (k, v))
    n = torch.arange(N)
    inside = n[:, None] * block // segment == n * block // segment
    score = q.view(1, H, N, block, D).mean(3) @ keys.view(1, H, N, block, D).mean(3).mT / D**0.5
    score = score.masked_fill(inside | (n > n[:, None]), -torch.inf).softmax(-1).nan_to_num()
    ordered = score.sort(dim=-1, descending=True)
    reached = ordered.values.cumsum(-1) >= dial
    take = (n <= reached.int().argmax(-1, keepdim=True)) & reached.any(-1, keepdim=True)
    mask = torch.zeros_like(take).scatter(3, ordered.indices, take) | (place.view(1, H, N, block) == 0).any(-1)[:, :, None] | inside
    mask = mask.repeat_interleave(block, 2).repeat_interleave(block, 3) & (place[:, :, None] <= torch.arange(S)[:, None])
    wanted = (q @ keys.mT / D**0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ values
    torch.testing.assert_close(PermutedBlocks(block=block, query_block=block, segment=segment, dial=dial)(q, k, v), wanted)


@pytest.mark.parametrize("prompt", [0, 12])
def test_sparse_d_ranks_blocks_by_the_mean_of_their_attention(prompt):
    q, k, _ = qkv(32)
    block, method = 4, SparseD(0.5, block=4, query_block=4, dense=0.0)
    mean = weights(q, k, torch.ones(32, 32, dtype=torch.bool)).unfold(2, block, block).unfold(3, block, block).mean((-1, -2))
    edge, wanted = prompt // block, torch.zeros(1, H, 8, 8, dtype=torch.bool)
    for part in (slice(0, edge), slice(edge, 8)):
        inside = mean[..., part]
        if inside.shape[-1]:
            wanted[..., part] = torch.zeros_like(inside, dtype=torch.bool).scatter(3, inside.topk(round(0.5 * inside.shape[-1]), -1).indices, True)
    with method.denoising(steps=1, prompt=prompt):
        assert torch.equal(method._chosen(q, k, None, False), wanted)


def test_rettention_divides_by_the_denominator_over_the_kept_ratio():
    q, k, v = qkv(24)
    later = [x + 0.3 * y for x, y in zip((q, k, v), qkv(24, seed=1), strict=True)]
    at = torch.arange(24)
    keep = (at[:, None] - at).abs() <= 3
    method, how = Rettention("band(-3, 3)", block=4, query_block=4, refresh=5), {"scale": D**-0.5, "causal": False}

    def parts(q, k):
        exp = (q @ each(k).mT / D**0.5).exp()
        return exp * keep, exp.sum(-1, keepdim=True)

    near, total = parts(q, k)
    ratio = near.sum(-1, keepdim=True) / total
    rest = weights(q, k, torch.ones_like(keep)) @ each(v) - near / (near.sum(-1, keepdim=True) / ratio) @ each(v)
    with method.denoising(steps=2):
        method.attend(q, k, v, **how)
        now, _ = parts(*later[:2])
        wanted = now / (now.sum(-1, keepdim=True) / ratio) @ each(later[2]) + rest
        torch.testing.assert_close(method.attend(*later, **how), wanted)


def test_star_runs_anchor_and_block_as_one_short_sequence():
    q, k, v = qkv(30)
    block, ask, outs = 6, 5, []
    for start in range(0, 25, block):
        own = [*range(start, min(start + block, 25))]
        at = own if start == 0 else [*range(block), *own]
        out = scaled_dot_product_attention(q[:, :, at], each(k)[:, :, at], each(v)[:, :, at], is_causal=True)
        outs.append(out[:, :, -len(own) :])
    score = (q[:, :, -ask:] @ each(k).mT / D**0.5).masked_fill(~see(ask, 30), -torch.inf)
    torch.testing.assert_close(Star(block, question=ask)(q, k, v), torch.cat([*outs, score.softmax(-1) @ each(v)], 2))


def test_moa_influence_is_the_gradient_of_the_map_spread_over_the_rest():
    q, k, v = qkv(12)
    gradient = torch.randn(1, H, 12, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    held = weights(q, k, see(12)).requires_grad_()
    (slope,) = torch.autograd.grad((held @ each(v) * gradient).sum(), held)
    weight = held.detach()
    effect = -weight * (slope - (slope * weight).sum(-1, keepdim=True)) / (1 - weight)
    torch.testing.assert_close(influence(q, k, v, gradient, D**-0.5)[:, :, 1:], effect[:, :, 1:])
