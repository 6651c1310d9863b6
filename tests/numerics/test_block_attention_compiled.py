"""The compiled paths against the dense definition in float64: shapes, dtypes, tiles, gradients, decoding, hosts without AVX-512."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rarefy.errors import BadInput
from rarefy.kernels import native
from rarefy.kernels.block_attention import (
    BlockMask,
    block_attention,
    block_attention_reference,
    blocks_of,
    page_meta,
    page_scores,
    tiles,
    token_attention,
    top_pages,
)

pytestmark = pytest.mark.skipif(not native.serves(torch.ones(1)), reason="numba is not installed")

SHAPES = [  # B, H, G, T, S, D, block, query_block
    (1, 2, 1, 100, 100, 64, 64, 64), (2, 4, 2, 77, 130, 64, 64, 64), (1, 2, 1, 200, 333, 24, 16, 16), (1, 2, 2, 150, 150, 128, 32, 128),
    (1, 3, 1, 90, 90, 7, 128, 32), (1, 1, 1, 5, 51, 256, 64, 16), (1, 2, 1, 64, 65, 1, 16, 64), (1, 2, 2, 300, 300, 80, 128, 128),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def case(shape: tuple[int, ...], dtype: torch.dtype, partial: bool, views: bool = False) -> tuple[Tensor, Tensor, Tensor, BlockMask]:
    B, H, G, T, S, D, block, query_block = shape
    r = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, m, n, D, generator=r).to(dtype) for m, n in ((H, T), (G, S), (G, S)))
    if views:                                                          # caches lie so, and longer than they are filled
        k, v = (torch.cat([x, x], 2).transpose(1, 2).contiguous().transpose(1, 2)[:, :, :S] for x in (k, v))
    size = (B, H, *blocks_of(T, S, block, query_block))
    blocks = torch.rand(size, generator=r) < 0.6
    if not partial:
        return q, k, v, BlockMask(blocks, None, None, block, query_block)
    tiles = torch.rand(5, query_block, block, generator=r) < 0.5
    return q, k, v, BlockMask(blocks, torch.randint(-1, 5, size, generator=r).int(), tiles, block, query_block)


def refuse_slow_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that falls back must not pass for one that was served."""
    import rarefy.kernels.block_attention as package

    for name in ("gather_blocks", "by_rows"):
        monkeypatch.setattr(package, name, None)


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_lse(shape: tuple[int, ...], dtype: torch.dtype, causal: bool, partial: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_slow_paths(monkeypatch)
    q, k, v, mask = case(shape, dtype, partial, views=True)
    how = {"block": shape[6], "query_block": shape[7], "scale": shape[5] ** -0.5, "causal": causal, "return_lse": True}
    out, lse = block_attention(q, k, v, mask, **how)
    expected, expected_lse = block_attention_reference(q.double(), k.double(), v.double(), mask, **how)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    assert torch.equal(out, block_attention(q.contiguous(), k.contiguous(), v.contiguous(), mask, **how)[0])


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_output_and_lse(shape: tuple[int, ...], dtype: torch.dtype, partial: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_slow_paths(monkeypatch)
    q, k, v, mask = case(shape, dtype, partial)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    r = torch.Generator().manual_seed(1)
    weight, weight_lse = torch.randn(q.shape, generator=r), torch.randn(q.shape[:3], generator=r)
    how = {"block": shape[6], "query_block": shape[7], "scale": shape[5] ** -0.5, "return_lse": True}

    def gradients(got: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        lse = torch.where(got[1] > -torch.inf, got[1], 0.0)
        return torch.autograd.grad((got[0] * weight).sum() + (lse * weight_lse).sum(), inputs)

    got = gradients(block_attention(q, k, v, mask, **how))
    for a, b in zip(got, gradients(block_attention_reference(q.double(), k.double(), v.double(), mask, **how)), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * float(b.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_that_nobody_chose_are_never_read(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_slow_paths(monkeypatch)
    q, k, v, mask = case((1, 4, 2, 300, 300, 32, 32, 64), dtype, False)
    blocks = mask.blocks & (torch.rand(mask.blocks.shape[:2] + (1, 10), generator=torch.Generator().manual_seed(3)) < 0.5)
    unread = ~blocks.view(1, 2, 2, -1, 10).any(3).any(2).repeat_interleave(32, -1)[..., :300]
    assert unread.any()
    k, v = (x.masked_fill(unread[..., None], torch.nan).requires_grad_() for x in (k, v))
    out = block_attention(q.requires_grad_(), k, v, blocks, block=32, query_block=64, scale=0.2)
    gradients = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert out.isfinite().all() and all(g.isfinite().all() for g in gradients)
    assert not gradients[1][unread].any() and not gradients[2][unread].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_sorted_by_hash_keep_their_places(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse causal flash attention: tokens in the order of their buckets, causality by the places they had, some dropped."""
    refuse_slow_paths(monkeypatch)
    r = torch.Generator().manual_seed(0)
    S, kept = 200, 150
    q, k, v = (torch.randn(1, 1, S, 16, generator=r).to(dtype) for _ in range(3))
    bucket = torch.randint(0, 6, (S,), generator=r)
    alive = torch.randperm(S, generator=r)[:kept].sort().values
    order = alive[bucket[alive].argsort(stable=True)]
    at = order.tolist()
    mask = torch.zeros(S, S, dtype=torch.bool)
    for i in at:
        for j in at:
            mask[i, j] = j <= i and bool(bucket[i] == bucket[j])
    weight = ((q[0, 0].double() @ k[0, 0].double().T) * 0.3).masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num()
    place, group = torch.cat([order, order.new_zeros(192 - kept)]), torch.cat([bucket[order], order.new_full((192 - kept,), -1)])

    def allowed(a: Tensor, s: Tensor) -> Tensor:
        return (place[s] <= place[a]) & (group[s] == group[a])

    full = torch.ones(1, 1, *blocks_of(kept, kept, 16, 32), dtype=torch.bool)
    found = BlockMask.of(full, allowed, kept, kept, block=16, query_block=32)
    assert int(found.blocks.sum()) < 0.5 * full.numel()                # tiles whose buckets do not meet are skipped
    out = block_attention(*(x[:, :, order] for x in (q, k, v)), found, block=16, query_block=32, scale=0.3, causal=False)
    torch.testing.assert_close(out[0, 0].double(), (weight @ v[0, 0].double())[order], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_block_chosen_is_torchs_attention(dtype: torch.dtype) -> None:
    q, k, v, mask = case((2, 4, 2, 130, 130, 64, 64, 64), dtype, False)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    got = block_attention(q, k, v, torch.ones_like(mask.blocks[:1, :1]), block=64, query_block=64, scale=64**-0.5)
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_far_apart(dtype: torch.dtype) -> None:
    """The maximum moves by thousands from block to block, up and down: nothing overflows, and what vanishes is 0."""
    q, k, v, mask = case((1, 1, 1, 192, 192, 16, 64, 64), dtype, False)
    k = k * torch.tensor([1.0, 300.0, 20.0]).repeat_interleave(64)[:, None].to(dtype)
    how = {"block": 64, "query_block": 64, "scale": 2.0, "return_lse": True}
    blocks = torch.ones_like(mask.blocks)
    out, lse = block_attention(q, k, v, blocks, **how)
    expected, expected_lse = block_attention_reference(q.double(), k.double(), v.double(), blocks, **how)
    torch.testing.assert_close(out.double(), expected, rtol=5e-3, atol=5e-3 if dtype == torch.float32 else 5e-2)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-2)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")      # Triton's interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_a_number_shows_and_stays_in_its_row(dtype: torch.dtype) -> None:
    q, k, v, mask = case((1, 1, 1, 64, 64, 16, 16, 16), dtype, False)
    blocks = torch.ones_like(mask.blocks)
    q[0, 0, 20, 3] = torch.nan
    out = block_attention(q, k, v, blocks, block=16, query_block=16, scale=1.0)
    assert out[0, 0, 20].isnan().all() and not out[0, 0, [i for i in range(64) if i != 20]].isnan().any()


def test_the_number_of_threads_changes_nothing() -> None:
    q, k, v, mask = case(SHAPES[1], torch.float32, True)
    how = {"block": 64, "query_block": 64, "scale": 0.3, "return_lse": True}
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def all_of_it() -> list[Tensor]:
        out, lse = block_attention(q, k, v, mask, **how)
        return [out, lse, *torch.autograd.grad(out.square().sum(), inputs)]

    one = all_of_it()
    torch.set_num_threads(3)
    try:
        three = all_of_it()
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_predicates_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_slow_paths(monkeypatch)
    q, k, v, mask = case(SHAPES[1], torch.float32, False)
    how = {"block": 64, "query_block": 64, "scale": 0.3, "allowed": lambda at, s, h: (at - s) % (h + 2) == 0}
    torch.testing.assert_close(block_attention(q, k, v, mask, **how), block_attention_reference(q, k, v, mask, **how), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("G", [1, 2, 4])
@pytest.mark.parametrize("block", [5, 16, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_over_pages(dtype: torch.dtype, block: int, G: int, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_slow_paths(monkeypatch)
    q, k, v, mask = case((2, 4, G, 1, 333, 40, block, 1), dtype, False, views=True)
    blocks = mask.blocks.clone()
    blocks[0, 0] = False
    out, lse = block_attention(q, k, v, blocks, block=block, query_block=1, scale=0.2, return_lse=True)
    expected = block_attention_reference(q.double(), k.double(), v.double(), blocks, block=block, query_block=1, scale=0.2, return_lse=True)
    torch.testing.assert_close(out.double(), expected[0], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 200])
def test_listed_tokens_in_chunks(keys: int) -> None:
    r = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, m, 24, generator=r).bfloat16() for n, m in ((4, 3), (2, 90), (2, 90)))
    index = torch.randint(-1, 90, (2, 1, 3, keys), generator=r)
    bias = torch.randn(1, 4, 3, keys, generator=r)
    got = token_attention(q, k, v, index, scale=0.2, bias_BHTK=bias, return_lse=True)
    q64 = q.double().requires_grad_()                                  # a gradient is wanted: the torch path
    expected = token_attention(q64, k.double(), v.double(), index, scale=0.2, bias_BHTK=bias, return_lse=True)
    torch.testing.assert_close(got[0].double(), expected[0].detach(), rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(got[1].double(), expected[1].detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("S", [16, 61])
def test_bounds_of_pages(S: int, dtype: torch.dtype) -> None:
    r = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 1, 12, generator=r).to(dtype), torch.randn(2, 2, S, 12, generator=r).to(dtype)
    got, kept = page_scores(q, k, 16), page_scores(q, k, 16, page_meta(k, 16))
    for n in range(-(-S // 16)):
        page = k[:, :, 16 * n : 16 * n + 16].repeat_interleave(2, 1).double()
        bound = torch.maximum(q.double() * page.amin(2, True), q.double() * page.amax(2, True)).sum(-1)
        torch.testing.assert_close(got[..., n].double(), bound, rtol=1e-5, atol=1e-5)
        assert (page @ q.double().mT).amax(2).le(bound + 1e-6).all()
    assert torch.equal(got, kept)
    meta, coarse = page_meta(k, 16).double(), page_meta(k, 16, half=True)
    outward = (coarse.double() - meta) * torch.tensor([1.0, -1.0]).repeat_interleave(12)
    assert coarse.dtype == torch.bfloat16 and outward.ge(0).all() and outward.le(meta.abs() * 2**-7).all()
    assert page_scores(q, k, 16, coarse).double().ge(got.double() - 1e-5).all()
    with pytest.raises(BadInput, match="page metadata"):
        page_scores(q, k, 8, page_meta(k, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keep", [1, 3, 7, 8, 20])
def test_top_pages_takes_the_first_of_equals(keep: int, dtype: torch.dtype) -> None:
    score = torch.tensor([[2, 5, 2, 5, 2, 1, 2, 5], [0, 0, 0, 0, 0, 0, 0, 0]], dtype=dtype).view(1, 2, 1, 8)
    got = top_pages(score, keep)
    for row, mask in zip(score.flatten(0, 2).tolist(), got.flatten(0, 2).tolist(), strict=True):
        first = sorted(range(8), key=lambda n: (-row[n], n))[:keep]
        assert [n for n in range(8) if mask[n]] == sorted(first)


@pytest.mark.slow
def test_a_host_without_avx512() -> None:
    """The same tests with narrow vectors and bfloat16 widened."""
    from rarefy.kernels.block_attention import tile

    if "+avx2" not in tile.features():
        pytest.skip("this host has no AVX2 to compile for")
    here = Path(__file__)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow",
         *(str(here.with_name(name)) for name in (here.name, "test_fuzz_kernels.py", "test_coded_attention.py"))],
        capture_output=True, text=True, cwd=here.parents[2],
        env={**os.environ, "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+avx,+bmi,+bmi2,+sse4.2,+popcnt,+f16c"},
    )
    assert run.returncode == 0, run.stdout[-3000:]


def test_what_is_served() -> None:
    q, k, v, _ = case(SHAPES[0], torch.float32, False)
    assert tiles.path(q, k, v, 64, 64, 0.1) is not None
    for block, query_block, scale in ((48, 64, 0.1), (64, 1, 0.1), (64, 64, -0.1)):
        assert tiles.path(q, k, v, block, query_block, scale) is None
    assert tiles.path(q.double(), k.double(), v.double(), 64, 64, 0.1) is None
    wide = q.repeat(1, 1, 1, 5)
    assert tiles.path(wide, wide, wide, 64, 64, 0.1) is None
