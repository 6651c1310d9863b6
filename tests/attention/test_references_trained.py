"""Trained attention against the formulas of its authors' own code, written anew in that code's layout: whole matrices, views and pooling."""

import pytest
import torch
from torch.nn.functional import avg_pool2d, max_pool2d, one_hot, pad
from trained_inputs import SIZES, qkv

from rarefy.attention.trained.base import dense_map
from rarefy.attention.trained.biformer import BiFormer
from rarefy.attention.trained.diff import Diff
from rarefy.attention.trained.moba import MoBA
from rarefy.attention.trained.nsa import NSA
from rarefy.attention.trained.sea import SEA
from rarefy.attention.trained.seer import Seer
from rarefy.attention.trained.sma import SMA


def see(T):
    return torch.ones(T, T, dtype=torch.bool).tril()


def weighted(score, mask, v):
    """Softmax attention over a mask; rows without a key give zeros."""
    return score.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num() @ v


def test_moba_keeps_its_own_block_and_the_best_past_ones():
    q, k, v = qkv(22, key_heads=4)
    block, top, own = 4, 3, torch.arange(22) // 4
    mean = torch.stack([k[:, :, own == n].mean(2) for n in range(6)], 2)
    gate = (q @ mean.mT).masked_fill(torch.arange(6) > own[:, None], -torch.inf).masked_fill(torch.arange(6) == own[:, None], torch.inf)
    chosen = torch.zeros_like(gate, dtype=torch.bool).scatter(3, gate.topk(top, -1).indices, True)
    wanted = weighted(q @ k.mT * 6**-0.5, chosen.repeat_interleave(block, 3)[..., :22] & see(22), v)
    torch.testing.assert_close(MoBA(block=block, top=top)(q, k, v), wanted)


def test_nsa_of_whole_blocks_is_three_masked_attentions_and_its_selection_comes_from_the_compressed_one():
    T, block, window, top = 23, 4, 5, 3
    q, k, v = qkv(T)
    hidden = torch.randn(2, T, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    m = NSA(phi="mean", hidden=8, **SIZES, block=block, compress=block, stride=block, window=window, local=1, top=top).double()
    k4, v4, t, N = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), torch.arange(T), T // block
    mean_k, mean_v = (x[:, :, : N * block].unflatten(2, (N, block)).mean(3) for x in (k4, v4))
    ended = torch.arange(N) <= ((t - block + 1) // block)[:, None]
    coarse = (q @ mean_k.mT * 6**-0.5).masked_fill(~ended, -torch.inf).softmax(-1).nan_to_num()
    score = pad(coarse, (0, 1)).unflatten(1, (2, 2)).sum(2)                                    # block 5 has not ended for any query
    own = one_hot(t // block, N + 1).bool()
    first = torch.arange(N + 1) == 0
    best = score.masked_fill(first | own | (torch.arange(N + 1) > (t // block)[:, None]), -torch.inf)
    more = torch.zeros_like(best, dtype=torch.bool).scatter(3, best.topk(top - 2, -1).indices, True) & (best > -torch.inf)
    chosen = (first | own | more).repeat_interleave(2, 1).repeat_interleave(block, 3)[..., :T]
    full, near = q @ k4.mT * 6**-0.5, t[:, None] - t < window
    gates = (hidden @ m.gate_EHC + m.bias_HC).sigmoid().view(2, T, 4, 3).permute(3, 0, 2, 1)[..., None]
    wanted = gates[0] * (coarse @ mean_v) + gates[1] * weighted(full, chosen & see(T), v4) + gates[2] * weighted(full, near & see(T), v4)
    torch.testing.assert_close(m(q, k, v, hidden), wanted)


@pytest.mark.parametrize("key_heads", [2, 4])
def test_diff_in_the_layout_of_its_authors(key_heads):
    """Halves of a head lie next to each other; key heads are repeated before they are paired, values after."""
    q, k, v = qkv(11, key_heads=key_heads)
    m, repeat = Diff(4, key_heads, 6, layer=3).double(), 4 // key_heads
    with torch.no_grad():
        m.norm_D.copy_(torch.linspace(0.5, 2, 12))
    start = 0.8 - 0.6 * torch.tensor(-0.9, dtype=torch.float64).exp()
    q1, k1, q2, k2 = m.lambda_4D
    weight = (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + start
    maps = (q @ k.repeat_interleave(repeat, 1).mT * 6**-0.5).masked_fill(~see(11), -torch.inf).softmax(-1).view(2, 2, 2, 11, 11)
    wide = v.transpose(1, 2).reshape(2, 11, key_heads // 2, 12).transpose(1, 2).repeat_interleave(repeat, 1)
    out = (maps[:, :, 0] - weight * maps[:, :, 1]) @ wide
    out = torch.nn.functional.rms_norm(out, (12,), m.norm_D, 1e-5) * (1 - start)
    torch.testing.assert_close(m(q, k, v).transpose(1, 2).flatten(2), out.transpose(1, 2).flatten(2))


def test_seer_learns_the_map_pooled_by_its_maxima():
    q, k, v = qkv(24)
    truth = Seer(**SIZES, block=4, query_block=4).truth(q, k, 6**-0.5, True, 4)
    pooled = max_pool2d(dense_map(q, k, 6**-0.5, True), 4, 4)
    torch.testing.assert_close(truth, pooled / pooled.sum(-1, keepdim=True))


def test_sma_compresses_attends_in_a_band_and_scatters_by_its_confidence():
    q, k, v = qkv(17)
    m, wanted = SMA(**SIZES, window=4, lean=0.1).double(), torch.zeros_like(q)
    torch.testing.assert_close(m.log_temperature.exp(), torch.tensor(0.3 * 12**0.5, dtype=torch.float64), rtol=1e-6, atol=0)
    p = ((v.transpose(1, 2).reshape(2, 17, 12) @ m.logit_E2 + m.bias_2) / m.log_temperature.exp()).softmax(-1)
    for b in range(2):
        at = (p[b].argmax(-1) == 1).nonzero()[:, 0]
        assert 3 < len(at) < 17
        band = see(len(at)) & ~see(len(at)).tril(-4)
        short = weighted(q[b, :, at] @ k[b, :, at].repeat_interleave(2, 0).mT * 6**-0.5, band, v[b, :, at].repeat_interleave(2, 0))
        wanted[b, :, at] = short * p[b, at].amax(-1)[:, None]
    torch.testing.assert_close(m(q, k, v), wanted)


def test_sea_stretches_a_row_of_cells_over_the_keys_it_sees():
    """Boundaries of cell c of a row of n keys are round(c n / C), as the authors' kernel walks them."""
    C = 8
    for n in range(1, 40):
        cell = SEA(**SIZES, cells=C)._cell(n, n, True, torch.device("cpu"))[-1]
        wanted = torch.full((n,), -1)
        for c in range(C):
            start, end = (int((2 * i * n + C) // (2 * C)) for i in (c, c + 1))                 # round half up
            wanted[start:end] = c
        assert torch.equal(cell, wanted)


def test_biformer_pools_the_image_and_routes_at_full_width():
    height, width = 6, 9
    q, k, v = qkv(height * width, key_heads=4)
    m = BiFormer(4, 4, 6, regions=3, top=2, width=width, local=0).double()
    image_q, image_k = (x.transpose(2, 3).reshape(2, 24, height, width) for x in (q, k))
    mean_q, mean_k = (avg_pool2d(x, (2, 3)).flatten(2) for x in (image_q, image_k))
    best = (mean_q.mT @ mean_k).topk(2, -1).indices
    region = torch.arange(height).repeat_interleave(width) // 2 * 3 + torch.arange(width).repeat(height) // 3
    mask = one_hot(best, 9).sum(2).bool()[:, region][..., region]
    torch.testing.assert_close(m(q, k, v), weighted(q @ k.mT * 6**-0.5, mask[:, None], v))
