"""Dropped and sorted attention against dense attention under the mask that it comes to."""

import pytest
import torch

from rarefy.errors import BadInput
from rarefy.kernels.block_attention.irregular import Irregular


def inputs(B=2, H=4, G=2, T=29, S=29, D=6, dtype=torch.float64):
    draw = torch.Generator().manual_seed(T)
    return [torch.randn(shape, generator=draw, dtype=dtype, requires_grad=True) for shape in ((B, H, T, D), (B, G, S, D), (B, G, S, D))]


def masked(q, k, v, keep, scale):
    """Softmax over the pairs kept, zeros for rows without any."""
    share = q.shape[1] // k.shape[1]
    score = (q @ k.repeat_interleave(share, 1).mT * scale).masked_fill(~keep, -torch.inf)
    some = keep.any(-1, keepdim=True)
    return (torch.where(some, score, 0.0).softmax(-1) * some) @ v.repeat_interleave(share, 1), score.logsumexp(-1)


def agree(made, keep, given, scale=0.4):
    out, lse = made.attend(*given, scale=scale, return_lse=True)
    want, sums = masked(*given, keep, scale)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, sums)
    assert torch.equal(made.pairs(), keep)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), given, retain_graph=True) for x in (out, want)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("T", "S"), [(29, 29), (7, 29), (1, 29)])
def test_dropped_queries_and_keys(share, T, S):
    draw = torch.Generator().manual_seed(int(10 * share))
    keep_q, keep_k = torch.rand(2, 4, T, generator=draw) < share, torch.rand(2, 2, S, generator=draw) < share
    if share == 0.5:
        keep_k[1, 0] = False                                           # a head of which no key is left
        keep_q[0, 1] = False
    keep = keep_q[..., None] & keep_k.repeat_interleave(2, 1)[:, :, None] & (torch.arange(S) <= torch.arange(S - T, S)[:, None])
    agree(Irregular.of_kept(keep_q, keep_k, block=8), keep, inputs(T=T, S=S))


@pytest.mark.parametrize("buckets", [1, 3, 40])
@pytest.mark.parametrize(("T", "S"), [(29, 29), (7, 29)])
def test_buckets_of_a_hash(buckets, T, S):
    draw = torch.Generator().manual_seed(buckets)
    query, key = torch.randint(-1, buckets, (2, 4, T), generator=draw), torch.randint(-1, buckets, (2, 2, S), generator=draw)
    wide = key.repeat_interleave(2, 1)[:, :, None]
    keep = (query[..., None] == wide) & (wide >= 0) & (torch.arange(S) <= torch.arange(S - T, S)[:, None])
    agree(Irregular(query, key, block=8), keep, inputs(T=T, S=S))


def test_tiles_visited_are_those_with_a_pair_and_the_paper_s_ranges_hold_them():
    """Sixteen equal buckets of 1024 sorted places: a bucket's triangle of tiles is all that is visited."""
    draw = torch.Generator().manual_seed(0)
    bucket = torch.arange(16).repeat(64)[torch.randperm(1024, generator=draw)][None, None]
    made = Irregular(bucket, bucket, block=16)
    assert made.tiles() == 16 * (4 * 5 // 2)
    assert (made.mask.blocks[0] & ~made.asked).sum() == 0 and int(made.asked.sum()) == made.tiles()
    keep = torch.rand(1, 1, 1024, generator=draw) < 0.25
    kept = Irregular.of_kept(keep, keep, block=16)
    n = -(-int(keep.sum()) // 16)
    assert kept.tiles() == n * (n + 1) // 2 < 0.08 * 64 * 65 / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_near_double(dtype):
    q, k, v = (x.detach() for x in inputs(T=200, S=200, D=32, dtype=torch.float32))
    bucket = torch.randint(4, (2, 4, 200), generator=torch.Generator().manual_seed(1))
    made = Irregular(bucket, bucket[:, ::2], block=64)
    want = masked(q.double(), k.double(), v.double(), made.pairs(), 0.2)[0]
    got = made.attend(q.to(dtype), k.to(dtype), v.to(dtype), scale=0.2).double()
    torch.testing.assert_close(got, want, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0)


def test_what_does_not_fit_is_refused():
    zeros = torch.zeros(1, 2, 5, dtype=torch.long)
    unfit = ((zeros, zeros[:, :, :4]), (zeros, zeros.float()), (zeros - 2, zeros), (zeros[:, :, :0], zeros), (zeros, zeros.repeat(1, 2, 1)))
    for query, key in unfit:
        with pytest.raises(BadInput):
            Irregular(query, key)
    with pytest.raises(BadInput, match="bool"):
        Irregular.of_kept(zeros, zeros.bool())
    with pytest.raises(BadInput, match="made for"):
        Irregular(zeros, zeros).attend(*(x[:1] for x in inputs()), scale=1.0)
