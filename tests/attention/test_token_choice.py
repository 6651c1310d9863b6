"""Compiled choices of single keys, each against its definition: ranked in few channels, hashed alike, reaching a share, listed."""

import math

import pytest
import torch

from rarefy.attention.cache import Cache
from rarefy.attention.dynamic.double_sparsity import DoubleSparsity
from rarefy.attention.dynamic.loki import Loki
from rarefy.attention.dynamic.magicpig import MagicPIG
from rarefy.attention.dynamic.rules import tail_levels
from rarefy.attention.dynamic.twilight import Twilight
from rarefy.attention.dynamic.vertical_slash import VerticalSlash
from rarefy.errors import BadInput
from rarefy.kernels.block_attention import top_pages
from rarefy.kernels.block_attention.agree import agreements, narrowest
from rarefy.kernels.block_attention.bounds import MANY
from rarefy.kernels.block_attention.listed import listed_products
from rarefy.kernels.block_attention.ranked import ranked_attention
from rarefy.kernels.block_attention.reach import reach


def qkv(B, H, G, T, S, D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, n, s, D, generator=generator) for n, s in ((H, T), (G, S), (G, S)))


def best(score, keep_T):
    """[B, H, T, S] bool: a query's own key, then the highest before it, of equals the first."""
    T, S = score.shape[2:]
    at_S, at_T = torch.arange(S), torch.arange(S - T, S)[:, None]
    score = score.double().masked_fill(at_S > at_T, -torch.inf).masked_fill(at_S == at_T, torch.inf)
    order = score.argsort(dim=-1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(-1, order, at_S.expand_as(order)) < keep_T[:, None]


def masked(q, k, v, keep, scale):
    share = q.shape[1] // k.shape[1]
    score = (q.double() @ k.double().repeat_interleave(share, 1).mT * scale).masked_fill(~keep, -torch.inf)
    return score.softmax(-1) @ v.double().repeat_interleave(share, 1)


@pytest.mark.parametrize("T, S, share", [(70, 90, 0.2), (1, 5, 1.0), (33, 4000, 0.03), (40, 2300, 0.7), (20, 2100, 1e-9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranked_attention_is_attention_to_the_highest(T, S, share, dtype):
    """Scores are small whole numbers: exact in any order of summing, and full of ties."""
    q, k, v = (x.to(dtype) for x in qkv(2, 4, 2, T, S, 24))
    low_q, low_k = (x.mul(3).round() for x in qkv(2, 4, 2, T, S, 7, seed=1)[:2])
    keep_T = torch.tensor([max(1, round(share * n)) for n in range(S - T + 1, S + 1)])
    got = ranked_attention(q, k, v, low_q, low_k, keep_T, scale=0.3)
    want = masked(q, k, v, best(low_q @ low_k.repeat_interleave(2, 1).mT, keep_T), 0.3)
    torch.testing.assert_close(got.double(), want, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


def test_ranked_attention_of_equal_and_of_infinitely_small_scores():
    q, k, v = qkv(1, 1, 1, 4, 3000, 8)
    keep_T = torch.full((4,), 200)
    for low_k in (torch.zeros(1, 1, 3000, 1), torch.linspace(-1e-40, 1e-40, 3000)[None, None, :, None]):
        got = ranked_attention(q, k, v, torch.ones(1, 1, 4, 1), low_k, keep_T, scale=0.3)
        torch.testing.assert_close(got.double(), masked(q, k, v, best(low_k.mT.expand(1, 1, 4, -1), keep_T), 0.3), atol=1e-5, rtol=0)


def test_ranked_attention_refuses_counts_that_no_query_has():
    q, k, v = qkv(1, 1, 1, 4, 9, 8)
    for keep in (0, 7):
        with pytest.raises(BadInput, match="keeps 1 key to as many as it sees"):
            ranked_attention(q, k, v, q, k, torch.full((4,), keep), scale=0.3)


@pytest.mark.parametrize("kind", [Loki, DoubleSparsity])
def test_a_long_prefill_keeps_what_its_method_chooses(kind):
    q, k, v = qkv(1, 4, 2, 300, 400, 16)
    method = kind(0.1)
    method.observe(q, k, v)
    method.finish()
    keep = method.choose(q, k, True)
    got = method.attend(q, k, v, scale=0.7)
    torch.testing.assert_close(got.double(), masked(q, k, v, keep, 0.7), atol=1e-5, rtol=0)
    assert method.measured_density() == pytest.approx(float(keep.sum()) / (4 * (300 * 400 - 300 * 299 // 2)), abs=1e-12)
    with pytest.raises(BadInput, match="saw no data"):
        kind(0.1)(q, k[:, :, :300], v[:, :, :300])


@pytest.mark.parametrize("bits", [8, 12, 20])
def test_agreements_by_comparing(bits):
    generator = torch.Generator().manual_seed(bits)
    kind = narrowest(bits)
    for T, tables in ((1, 9), (20, 9), (3, 255), (9, 300)):
        q, k = (torch.randint(0, 3, (2, n, s, tables), generator=generator).to(kind) for n, s in ((4, T), (2, 300)))
        k = k[:, :, :277]                                                  # a view, as of a cache that grows
        want = (q[..., None, :] == k.repeat_interleave(2, 1)[:, :, None]).sum(-1)
        assert torch.equal(agreements(q, k).long(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reach_by_sorting(dtype):
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        N = int(torch.randint(1, 60, (1,), generator=generator))
        mass = torch.randn(5, N, generator=generator, dtype=dtype).mul(3).softmax(-1)
        mass = (mass * 8).round() / 8 if seed % 3 == 0 else mass           # ties and zeros
        first = torch.rand(5, N, generator=generator) < 0.1
        for rest in (0.0, 0.01, 0.3, 0.9, 1.0, math.inf):
            level = tail_levels(mass.double(), first).masked_fill(first, -torch.inf)
            bound = torch.inf if rest == 0 else -math.log(rest) if rest < math.inf else -torch.inf
            assert torch.equal(reach(mass, first, rest), level <= bound), (seed, rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_products_with_listed_keys(dtype):
    q, k, _ = (x.to(dtype) for x in qkv(2, 4, 2, 3, 90, 24))
    index = torch.randint(-1, 90, (2, 4, 3, 130), generator=torch.Generator().manual_seed(0))
    want = (q.double() @ k.double().repeat_interleave(2, 1).mT).gather(3, index.clamp_min(0)).masked_fill(index < 0, -torch.inf)
    torch.testing.assert_close(listed_products(q, k, index).double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("N", [MANY - 1, MANY, MANY + 5])
def test_top_pages_by_sorting(N):
    score = torch.randn(1, 3, 1, N, generator=torch.Generator().manual_seed(N)).mul(4).round()
    order = score.argsort(dim=-1, descending=True, stable=True)
    for keep in (1, 40, N - 1, N):
        assert torch.equal(top_pages(score, keep), torch.zeros_like(score, dtype=torch.bool).scatter_(3, order[..., :keep], True))


def test_magicpig_weighs_listed_keys_as_its_definition_in_float64():
    q, k, v = qkv(2, 4, 2, 300, 400, 16)
    method = MagicPIG(bits=4, tables=9, sinks=2, window=8, centre=32)
    got = method.attend(q, k, v, scale=0.25)
    kept = method.measured_density()
    double = MagicPIG(bits=4, tables=9, sinks=2, window=8, centre=32)
    want = double.attend(q.double(), k.double(), v.double(), scale=0.25)
    assert kept == pytest.approx(double.measured_density(), abs=1e-4)
    assert float((got.double() - want).abs().amax(-1).ge(1e-4).double().mean()) < 1e-2     # a hash may fall to the other side in float32


@pytest.mark.parametrize("make", [
    lambda: MagicPIG(bits=4, tables=9, centre=32), lambda: Twilight(0.2, dial=0.7, page=8)], ids=["magicpig", "twilight"])
def test_a_step_beside_the_cache_is_the_last_row_of_the_prefill(make):
    q, k, v = qkv(2, 4, 2, 90, 90, 16)
    whole, method, cache = make()(q, k, v), make(), Cache()
    cache.update(k[:, :, :80], v[:, :, :80], 0)
    for t in range(80, 90):
        keys, values = cache.update(k[:, :, t : t + 1], v[:, :, t : t + 1], 0)
        got = method.attend(q[:, :, t : t + 1], keys, values, scale=0.25, cache=cache.layers[0])
        torch.testing.assert_close(got, whole[:, :, t : t + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_a_method_for_prefill_is_dense(dtype):
    q, k, v = (x.to(dtype) for x in qkv(2, 4, 2, 1, 70, 16))
    method = VerticalSlash(0.1)
    torch.testing.assert_close(method(q, k, v).double(), masked(q, k, v, torch.ones(2, 4, 1, 70, dtype=torch.bool), 0.25),
                               atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)
    assert method.measured_density() == 1.0 and method.dims() == (4, 16, 70.0)
