"""ZipVL, sorted keys, video heads, and methods that keep something from one step of denoising to the next, against their formulas."""

import pytest
import torch

from rarefy.attention.dynamic.permuted import PermutedBlocks
from rarefy.attention.dynamic.rettention import Rettention
from rarefy.attention.dynamic.sparse_d import SparseD
from rarefy.attention.dynamic.svg import SparseVideo
from rarefy.attention.dynamic.zipvl import ZipVL
from rarefy.errors import BadInput

HEADS, KEY_HEADS, D = 4, 2, 8


def qkv(T, batch=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, n, T, D, generator=draw, dtype=torch.float64) for n in (HEADS, KEY_HEADS, KEY_HEADS)]


def weights(q, k, keep):
    return (q @ k.repeat_interleave(2, 1).mT / D**0.5).masked_fill(~keep, -torch.inf).softmax(-1)


def attended(q, k, v, keep):
    return weights(q, k, keep) @ v.repeat_interleave(2, 1)


def causal(T):
    return torch.ones(T, T, dtype=torch.bool).tril()


@pytest.mark.parametrize("probes", [3, 30])
def test_zipvl_keeps_the_fewest_tokens_with_a_share_of_what_is_received(probes):
    q, k, v = qkv(20)
    rows = range(20) if probes == 30 else [0, 5, 11, 17, 18, 19]
    each = weights(q, k, causal(20))
    keep = torch.zeros(2, 1, 20, 20, dtype=torch.bool)
    for b in range(2):
        got = [sum(float(each[b, h, t, s]) for h in range(HEADS) for t in rows) / sum(s <= t for t in rows) for s in range(20)]
        chosen, total = [], 0.0
        for s in sorted(range(20), key=lambda s: -got[s]):  # noqa: B023
            chosen.append(s)
            total += got[s]
            if total >= 0.6 * sum(got):
                break
        keep[b, 0, :, chosen] = True
        assert 2 < len(chosen) < 18
    keep = (keep | torch.eye(20, dtype=torch.bool)) & causal(20)
    method = ZipVL(dial=0.6, probes=probes)
    torch.testing.assert_close(method(q, k, v), attended(q, k, v, keep), rtol=1e-9, atol=1e-11)
    assert method.measured_density() == pytest.approx(float(keep.sum()) / (2 * 210))


def test_zipvl_does_not_favour_early_tokens_where_attention_is_even():
    _, k, _ = qkv(64)
    got = ZipVL(probes=64).received(torch.zeros(2, HEADS, 64, D, dtype=torch.float64), k, True)
    # of an even causal map token s receives the mean of 1 / (t + 1) over t >= s: without the division it would be their sum
    wanted = torch.tensor([sum(1 / (t + 1) for t in range(s, 64)) / (64 - s) for s in range(64)], dtype=torch.float64)
    torch.testing.assert_close(got, wanted.expand(2, -1))


def test_zipvl_keeps_more_where_attention_is_spread_and_everything_while_decoding():
    q, k, v = qkv(64)
    method, shares = ZipVL(dial=0.9), []
    for sharp in (0.1, 3.0, 10.0):
        aim = k.repeat_interleave(2, 1)[:, :, :1]
        method(q + sharp * aim, k, v)
        shares.append(method.measured_density())
    assert shares[0] > 1.5 * shares[1] > 1.5 * shares[2]
    step = method(q[:, :, -1:], k, v)
    torch.testing.assert_close(step, attended(q, k, v, causal(64))[:, :, -1:])


WINDOW = (torch.arange(20)[:, None] - torch.arange(20)).abs() < 3


def test_rettention_is_exact_while_nothing_moves_and_follows_its_formula_when_it_does():
    q, k, v = qkv(20)
    method, all_pairs = Rettention("band(-2, 2)", block=4, query_block=4, refresh=3), torch.ones(20, 20, dtype=torch.bool)
    how = {"scale": D**-0.5, "causal": False}
    dense, sparse = attended(q, k, v, all_pairs), attended(q, k, v, WINDOW)
    torch.testing.assert_close(method.attend(q, k, v, **how), sparse)
    share = (weights(q, k, all_pairs) * WINDOW).sum(-1, keepdim=True)
    moved = [x + 0.1 * y for x, y in zip((q, k, v), qkv(20, seed=1), strict=True)]
    with method.denoising(steps=5):
        torch.testing.assert_close(method.attend(q, k, v, **how), dense)
        torch.testing.assert_close(method.attend(q, k, v, **how), dense)
        torch.testing.assert_close(method.attend(*moved, **how), dense + share * (attended(*moved, WINDOW) - sparse))
        torch.testing.assert_close(method.attend(*moved, **how), attended(*moved, all_pairs))        # refreshed
        torch.testing.assert_close(method.attend(q, k, v, **how, layer=1), dense)                    # another layer has steps of its own
    torch.testing.assert_close(method.attend(q, k, v, **how), sparse)


@pytest.mark.parametrize("drift", [0.05, 0.2])
def test_rettention_is_nearer_to_dense_attention_than_the_pattern_alone(drift):
    q, k, v = qkv(20)
    moved = [x + drift * y for x, y in zip((q, k, v), qkv(20, seed=1), strict=True)]
    method, how = Rettention("band(-2, 2)", block=4, query_block=4), {"scale": D**-0.5, "causal": False}
    plain = method.attend(*moved, **how)
    with method.denoising(steps=2):
        method.attend(q, k, v, **how)
        got = method.attend(*moved, **how)
    wanted = attended(*moved, torch.ones(20, 20, dtype=torch.bool))
    assert (got - wanted).norm() < 0.3 * (plain - wanted).norm()


def blocks(q, k, budget, prompt):
    """SparseD's mask by its definition, blocks of 4."""
    mass = weights(q, k, torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)).unflatten(-1, (-1, 4)).sum(-1).unflatten(2, (-1, 4)).mean(3)
    keep = torch.zeros_like(mass, dtype=torch.bool)
    edge, n = -(-prompt // 4), mass.shape[-1]
    for region in (range(edge), range(edge, n)):
        for at in torch.cartesian_prod(*(torch.arange(size) for size in mass.shape[:3])).tolist():
            best = sorted(region, key=lambda s: -float(mass[(*at, s)]))[: max(1, round(budget * len(region)))]  # noqa: B023
            keep[at[0], at[1], at[2], best] = True
    return keep


@pytest.mark.parametrize("prompt", [0, 10, 40])
def test_sparse_d_is_dense_first_and_then_keeps_the_choice_of_the_switch(prompt):
    q, k, v = qkv(40)
    method, how = SparseD(0.4, block=4, query_block=4, dense=0.4), {"scale": D**-0.5, "causal": False}
    moved, later = ([x + 0.5 * y for x, y in zip((q, k, v), qkv(40, seed=s), strict=True)] for s in (1, 2))
    with method.denoising(steps=5, prompt=prompt):
        for _ in range(2):
            torch.testing.assert_close(method.attend(q, k, v, **how), attended(q, k, v, torch.ones(40, 40, dtype=torch.bool)))
        keep = blocks(moved[0], moved[1], 0.4, prompt).repeat_interleave(4, 2).repeat_interleave(4, 3)
        assert not torch.equal(keep, blocks(later[0], later[1], 0.4, prompt).repeat_interleave(4, 2).repeat_interleave(4, 3))
        for now in (moved, later):
            torch.testing.assert_close(method.attend(*now, **how), attended(*now, keep))
    with pytest.raises(BadInput, match="dense"):
        SparseD(dense=float("nan"))


@pytest.mark.parametrize("is_causal", [True, False])
def test_sparse_video_gives_each_head_the_pattern_with_the_smaller_error(is_causal):
    frame, T = 6, 48
    at, draw = torch.arange(T), torch.Generator().manual_seed(0)
    code = torch.cat([torch.nn.functional.one_hot(x, 8).double() for x in (at // frame, at % frame)], -1)      # when, and where
    k = code.expand(2, KEY_HEADS, T, 16) + 0.1 * torch.randn(2, KEY_HEADS, T, 16, generator=draw, dtype=torch.float64)
    asks = torch.tensor([[1.0] * 8 + [0.0] * 8, [0.0] * 8 + [1.0] * 8], dtype=torch.float64)[[0, 1, 1, 0]]
    q = 16 * code * asks[:, None] + 0.1 * torch.randn(2, HEADS, T, 16, generator=draw, dtype=torch.float64)
    v = torch.randn(2, KEY_HEADS, T, 16, generator=draw, dtype=torch.float64)
    method = SparseVideo(frame, frames=0, places=0, samples=12)
    spatial = (at[:, None] // frame == at // frame) | (at < frame)
    temporal = (at[:, None] % frame == at % frame) | (at < frame)
    seen = causal(T) if is_causal else torch.ones(T, T, dtype=torch.bool)
    rows = [(i + 1) * T // 12 - 1 for i in range(12)]
    score, values = q @ k.repeat_interleave(2, 1).mT / 4, v.repeat_interleave(2, 1)
    dense, *outs = (score.masked_fill(~(keep & seen), -torch.inf).softmax(-1) @ values for keep in (seen, spatial, temporal))
    error = torch.stack([(out - dense)[:, :, rows].square().mean((2, 3)) for out in outs])
    got = method.attend(q, k, v, scale=0.25, causal=is_causal)
    torch.testing.assert_close(got, torch.where((error[0] <= error[1])[..., None, None], *outs))
    torch.testing.assert_close(method.errors(q, k, v, is_causal), error)
    assert (error[0] < error[1]).tolist() == [[True, False, False, True]] * 2


@pytest.mark.parametrize("T", [24, 22, 9])
def test_permuted_blocks_by_their_definition(T):
    q, k, v = qkv(T)
    method = PermutedBlocks(block=2, query_block=4, segment=8, dial=0.6)
    each, keep = weights(q, k, causal(T)), torch.zeros(2, HEADS, T, T, dtype=torch.bool)
    for b in range(2):
        for h in range(HEADS):
            mass = each[b, h, -2:].mean(0).tolist()
            order = []
            for start in range(0, T, 8):
                inside = range(start, min(start + 8, T))
                order += sorted(inside, key=lambda s: -mass[s]) if len(inside) == 8 else list(inside)  # noqa: B023
            for start in range(0, T, 4):
                rows = range(start, min(start + 4, T))
                query, n, near = q[b, h, list(rows)].mean(0), rows[-1] // 2 + 1, start // 8 * 8
                held = [*order[:near], *range(near, T)]                                      # the own segment stays in order
                far = [query @ k[b, h // 2, held[2 * i : 2 * i + 2]].mean(0) / D**0.5 for i in range(near // 2)]
                score = torch.stack(far).softmax(0).tolist() if far else []                  # of earlier segments alone
                total, chosen = 0.0, [i for i in range(n) if 2 * i >= near or 0 in held[2 * i : 2 * i + 2]]
                for i in sorted(range(near // 2), key=lambda i: -score[i]):  # noqa: B023
                    if total >= 0.6:
                        break
                    chosen.append(i)
                    total += score[i]
                for i in chosen:
                    keep[b, h, start : start + 4, held[2 * i : 2 * i + 2]] = True
    keep &= causal(T)
    torch.testing.assert_close(method(q, k, v), attended(q, k, v, keep), rtol=1e-9, atol=1e-11)


def test_sorting_gathers_scattered_keys_into_fewer_blocks():
    draw = torch.Generator().manual_seed(0)
    way = torch.nn.functional.normalize(torch.randn(1, 1, 1, 32, generator=draw), dim=-1)
    q, k, v = (torch.randn(1, 2, 256, 32, generator=draw) for _ in range(3))
    heavy = torch.randperm(256, generator=draw)[:24]
    k[:, :, heavy] += 8 * way
    q = q + 8 * way
    error, share = {}, {}
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    for permute, dial in ((True, 0.97), (False, 0.7)):                         # the same dial is not the same error: unsorted, more is kept here
        method = PermutedBlocks(block=8, query_block=8, segment=64, dial=dial, permute=permute)
        error[permute] = float((method(q, k, v) - dense).norm() / dense.norm())
        share[permute] = method.measured_density()
    assert share[True] < share[False] and error[True] < 0.5 * error[False]
