"""Block attention against softmax written out pair by pair, in awkward shapes, with gradients and bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import rarefy.kernels.block_attention as kernel
from rarefy.errors import BadInput
from rarefy.kernels.block_attention import block_attention, block_attention_reference, blocks_of, decode, gather
from rarefy.kernels.block_attention.gather import gather_blocks

SHAPES = [  # B, H, G, T, S, D, block, query_block
    (1, 1, 1, 1, 1, 1, 1, 1), (2, 4, 2, 63, 63, 8, 16, 16), (1, 6, 2, 111, 111, 5, 16, 8), (1, 2, 1, 7, 111, 4, 16, 4),
    (2, 2, 2, 1, 63, 8, 16, 1), (1, 3, 3, 13, 40, 7, 7, 3), (1, 2, 2, 5, 5, 3, 64, 64), (1, 2, 1, 33, 40, 4, 8, 1),
]


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, block: int, query_block: int, scale: float, causal: bool = True, allowed: Any = None
) -> Tensor:
    """Python floats, one pair at a time."""
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    out = torch.zeros(B, H, T, D, dtype=torch.float64)
    q, k, v = q.double(), k.double(), v.double()
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            for t in range(T):
                at = S - T + t
                row = at // query_block - (S - T) // query_block
                keys = [s for s in range(S) if mask[b, h, row, s // block] and not (causal and s > at)]
                if allowed is not None:
                    keys = [s for s in keys if allowed(torch.tensor(at), torch.tensor(s))]
                logits = [float(q[b, h, t] @ k[b, g, s]) * scale for s in keys]
                weights = [math.exp(x - max(logits)) for x in logits]
                for s, w in zip(keys, weights, strict=True):
                    out[b, h, t] += w / sum(weights) * v[b, g, s]
    return out


def case(shape: tuple[int, ...], seed: int = 0, share: float = 0.5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    B, H, G, T, S, D, block, query_block = shape
    r = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, n, length, D, generator=r).to(dtype) for n, length in ((H, T), (G, S), (G, S)))
    return q, k, v, torch.rand(B, H, *blocks_of(T, S, block, query_block), generator=r) < share


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_path_is_the_definition(shape: tuple[int, ...], causal: bool) -> None:
    q, k, v, mask = case(shape)
    how = {"block": shape[6], "query_block": shape[7], "scale": 0.7, "causal": causal}
    expected = by_definition(q, k, v, mask, **how).float()
    for path in (block_attention, block_attention_reference, gather_blocks):
        torch.testing.assert_close(path(q, k, v, mask, **how), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    T=st.integers(1, 24), past=st.integers(0, 30), D=st.integers(1, 6), block=st.integers(1, 20), query_block=st.integers(1, 20),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]), share=st.floats(0, 1), causal=st.booleans(), seed=st.integers(0, 99),
)
def test_any_shape(T: int, past: int, D: int, block: int, query_block: int, heads: tuple[int, int], share: float, causal: bool, seed: int) -> None:
    shape = (2, *heads, T, T + past, D, block, query_block)
    q, k, v, mask = case(shape, seed, share)
    how = {"block": block, "query_block": query_block, "scale": D**-0.5, "causal": causal}
    expected = by_definition(q, k, v, mask, **how).float()
    torch.testing.assert_close(block_attention(q, k, v, mask, **how), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gather_blocks(q, k, v, mask, **how), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES[1:4])
def test_a_pattern_finer_than_a_block(shape: tuple[int, ...]) -> None:
    q, k, v, mask = case(shape, share=0.7)
    how = {"block": shape[6], "query_block": shape[7], "scale": 0.5, "allowed": lambda at, s: (at - s) % 3 == 0}
    expected = by_definition(q, k, v, mask, **how).float()
    for path in (block_attention, gather_blocks):
        got = path(q, k, v, mask, causal=True, **how)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_chunks_of_query_blocks_join(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, mask = case(SHAPES[2])
    how = {"block": 16, "query_block": 8, "scale": 1.0, "causal": True}
    whole = gather_blocks(q, k, v, mask, **how)
    for limit in (1, 40_000, 90_000):
        monkeypatch.setattr(gather, "CHUNK_BYTES", limit)
        torch.testing.assert_close(gather_blocks(q, k, v, mask, **how), whole, rtol=1e-5, atol=1e-6)


def test_rows_of_single_queries_join(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, mask = case((1, 2, 1, 33, 40, 4, 8, 1))
    how = {"block": 8, "query_block": 1, "scale": 1.0, "causal": True, "allowed": lambda at, s: (at + s) % 5 != 0}
    whole = block_attention_reference(q, k, v, mask, **how)
    for rows in (1, 7, 33):
        monkeypatch.setattr(gather, "ROWS", rows)
        torch.testing.assert_close(block_attention(q, k, v, mask, **how), whole, rtol=1e-5, atol=1e-6)


def test_one_mask_for_every_head() -> None:
    q, k, v, mask = case((2, 4, 2, 63, 63, 8, 16, 16))
    shared = mask[:1, :1].expand_as(mask)
    how = {"block": 16, "query_block": 16, "scale": 1.0, "causal": True, "allowed": lambda at, s: (at + s) % 5 != 0}
    expected = by_definition(q, k, v, shared, **how).float()
    torch.testing.assert_close(gather_blocks(q, k, v, shared, **how), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", [block_attention, gather_blocks, block_attention_reference])
def test_full_mask_is_torchs_attention(path: Any) -> None:
    q, k, v, mask = case((2, 4, 2, 63, 63, 8, 16, 16))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    got = path(q, k, v, torch.ones_like(mask), block=16, query_block=16, scale=8**-0.5, causal=True)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("path", [block_attention, gather_blocks, block_attention_reference])
def test_a_query_without_keys_gives_zeros_and_finite_gradients(path: Any, T: int) -> None:
    q, k, v, mask = case((1, 2, 1, T, 20, 4, 4, 3 if T > 1 else 1))
    mask[:, 0] = False
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = path(q, k, v, mask, block=4, query_block=3 if T > 1 else 1, scale=1.0, causal=True)
    assert torch.equal(out[:, 0], torch.zeros_like(out[:, 0]))
    out.square().sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))
    with torch.no_grad():
        again = path(q, k, v, mask, block=4, query_block=3 if T > 1 else 1, scale=1.0, causal=True)
    assert torch.equal(again[:, 0], torch.zeros_like(out[:, 0]))


def test_a_decoding_query_never_reads_pages_it_did_not_choose() -> None:
    q, k, v, mask = case((1, 4, 2, 1, 100, 8, 16, 1), share=0.4)
    expected = block_attention_reference(q, k, v, mask, block=16, query_block=1, scale=0.3)
    unread_GS = ~mask[0, :, 0].view(2, 2, -1).any(1).repeat_interleave(16, -1)[:, :100]
    assert unread_GS.any()
    k, v = (x.masked_fill(unread_GS[..., None], float("nan")) for x in (k, v))
    torch.testing.assert_close(block_attention(q, k, v, mask, block=16, query_block=1, scale=0.3), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not decode.available(torch.ones(1)), reason="numba is not installed")
def test_the_fast_decode_takes_views_and_large_logits() -> None:
    r = torch.Generator().manual_seed(0)
    cache = torch.randn(2, 50, 2, 8, generator=r)                      # [B, S, G, D], as some caches lie
    k, v, q = cache.transpose(1, 2), cache.flip(1).transpose(1, 2), 40 * torch.randn(2, 4, 1, 8, generator=r)
    assert decode.available(q, k, v)
    mask = torch.ones(2, 4, 1, 4, dtype=torch.bool)
    expected = by_definition(q, k, v, mask, block=16, query_block=1, scale=1.0).float()
    torch.testing.assert_close(block_attention(q, k, v, mask, block=16, query_block=1, scale=1.0), expected, rtol=1e-4, atol=1e-5)
    assert not decode.available(q.requires_grad_(), k, v) and not decode.available(q.detach().double(), k, v)


@pytest.mark.parametrize("T, query_block", [(7, 3), (7, 1), (1, 1)])
def test_gradcheck(T: int, query_block: int) -> None:
    q, k, v, mask = case((1, 2, 1, T, 11, 3, 4, query_block), share=0.6, dtype=torch.float64)
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    how = {"block": 4, "query_block": query_block, "scale": 0.8, "causal": True}
    assert torch.autograd.gradcheck(lambda *x: block_attention(*x, mask, **how), inputs)
    assert torch.autograd.gradcheck(lambda *x: gather_blocks(*x, mask, **how), inputs)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float64, 1e-12)])
@pytest.mark.parametrize("T", [1, 20])
def test_other_dtypes(dtype: torch.dtype, tolerance: float, T: int) -> None:
    shape = (1, 4, 2, T, 40, 16, 8, 4 if T > 1 else 1)
    q, k, v, mask = case(shape, dtype=dtype)
    mask[..., -1] = True
    how = {"block": 8, "query_block": shape[7], "scale": 0.25}
    out = block_attention(q, k, v, mask, **how)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), by_definition(q, k, v, mask, **how), rtol=tolerance, atol=tolerance)


def test_work_follows_the_mask() -> None:
    """On torch's plain products: its counter does not see the fused attention kernel of the CPU, which gets the same shapes."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from rarefy.cost import counted_flops

    q, k, v, mask = case((1, 2, 2, 256, 256, 16, 16, 16))
    own = torch.eye(16, dtype=torch.bool).expand_as(mask)
    how = {"block": 16, "query_block": 16, "scale": 1.0}
    with sdpa_kernel(SDPBackend.MATH):
        sparse = counted_flops(lambda: gather_blocks(q, k, v, own, causal=True, **how))
        whole = counted_flops(lambda: gather_blocks(q, k, v, torch.ones_like(mask), causal=True, **how))
    assert sparse == 2 * 2 * 2 * 256 * 16 * 16                         # two products, a multiply-add is 2; H, T, keys, D
    assert whole == 16 * sparse


def test_empty() -> None:
    for shape in ((0, 2, 1, 5, 5, 4, 2, 2), (1, 2, 1, 0, 5, 4, 2, 2), (1, 2, 1, 0, 0, 4, 2, 2)):
        q, k, v, mask = case(shape)
        assert block_attention(q, k, v, mask, block=2, query_block=2, scale=1.0).shape == q.shape


def test_what_does_not_fit_is_refused() -> None:
    q, k, v, mask = case((1, 4, 2, 8, 8, 4, 4, 4))
    how = {"block": 4, "query_block": 4, "scale": 1.0}
    with pytest.raises(BadInput, match="do not fit"):
        block_attention(q[:, :3], k, v, mask[:, :3], **how)
    with pytest.raises(BadInput, match="do not fit"):
        block_attention(q, k, v[:, :, :7], mask, **how)
    with pytest.raises(BadInput, match="8 queries but only 4 keys"):
        block_attention(q, k[:, :, :4], v[:, :, :4], mask, **how)
    with pytest.raises(BadInput, match=r"block mask has shape \[1, 4, 2, 1\].*need \[1, 4, 2, 2\]"):
        block_attention(q, k, v, mask[..., :1], **how)
    with pytest.raises(BadInput, match="keys on meta"):
        block_attention(q, k.to("meta"), v.to("meta"), mask, **how)
    assert kernel.blocks_of(0, 8, 4, 4) == (0, 2)
