"""Every entry point of block attention on drawn cases: shapes, heads, dtypes, memory layouts, masks, biases, against dense float64.

A case that once failed has a test of its own behind the drawn ones.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import rarefy.kernels.top_k as top
from rarefy.errors import BadInput
from rarefy.kernels.block_attention import BlockMask, block_attention, blocks_of, token_attention, token_mask
from rarefy.kernels.block_attention.lines import line_attention, line_pairs

TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def dense(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) in float64 over the pairs of keep [B, H, T, S]."""
    share = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(share, 1), v.double().repeat_interleave(share, 1)
    score = (q.double() @ k.mT * scale).masked_fill(~keep, -torch.inf)
    some = keep.any(-1, keepdim=True)
    weight = torch.where(keep, score - torch.where(some, score.amax(-1, keepdim=True), 0.0), 0.0).exp() * keep
    weight = weight / torch.where(some, weight.sum(-1, keepdim=True), 1.0)
    return weight @ v, torch.where(some[..., 0], score.logsumexp(-1), -torch.inf)


def odd_offset(x: Tensor) -> Tensor:
    room = torch.full((x.numel() + 3,), torch.nan, dtype=x.dtype)
    room[1 : 1 + x.numel()] = x.reshape(-1)
    return room[1 : 1 + x.numel()].view(x.shape)


def every_other_row(x: Tensor) -> Tensor:
    room = torch.full((*x.shape[:2], 2 * x.shape[2], x.shape[3] + 1), torch.nan, dtype=x.dtype)
    room[:, :, ::2, : x.shape[3]] = x
    return room[:, :, ::2, : x.shape[3]]


LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x, odd_offset, every_other_row, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x.mT.contiguous().mT,
    lambda x: x[:1].expand_as(x), lambda x: x[:, :1].expand_as(x), lambda x: x[:, :, :1].expand_as(x), lambda x: x[..., :1].expand_as(x),
]


def drawn(seed: int, dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCE)) -> tuple[random.Random, torch.Generator, Tensor, Tensor, Tensor]:
    """q, k, v of any heads, lengths, widths and layouts."""
    pick, r = random.Random(seed), torch.Generator().manual_seed(seed)
    B, G = pick.choice([1, 1, 2]), pick.choice([1, 2, 3])
    H, S = G * pick.choice([1, 2, 4]), pick.choice([1, 2, 16, 17, 63, 64, 65, 100, 130])
    T, D = pick.choice([1, S, pick.randint(1, S)]), pick.choice([1, 2, 5, 8, 17, 64, 80, 129, 256, 257])
    dtype = pick.choice(dtypes)
    q, k, v = (pick.choice(LAYOUTS)(torch.randn(B, m, n, D, generator=r).to(dtype)) for m, n in ((H, T), (G, S), (G, S)))
    return pick, r, q, k, v


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype, size: float = 1.0) -> None:
    wanted = wanted.detach()
    most = float(wanted.abs().nan_to_num(0, 0, 0).max()) if wanted.numel() else 1.0
    t = TOLERANCE[dtype] * max(1.0, size)
    torch.testing.assert_close(got.detach().double(), wanted, rtol=t, atol=t * max(1.0, most))


@pytest.mark.parametrize("seed", range(0, 60, 6))
def test_block_attention(seed: int) -> None:
    for one in range(seed, seed + 6):
        pick, r, q, k, v = drawn(one)
        (B, H, T, D), S = q.shape, k.shape[2]
        block, query_block = (pick.choice([16, 32, 64, 128]) for _ in range(2)) if pick.random() < 0.7 else (pick.randint(1, 40), pick.choice([1, 7]))
        b, h = pick.choice([1, B]), pick.choice([1, H])
        size = (b, h, *blocks_of(T, S, block, query_block))
        mask = BlockMask(torch.rand(size, generator=r) < pick.choice([0.0, 0.3, 0.7, 1.1]), None, None, block, query_block)
        if pick.random() < 0.5:
            tiles = torch.rand(3, query_block, block, generator=r) < pick.choice([0.0, 0.3, 0.7])
            mask = BlockMask(mask.blocks, torch.randint(-1, 3, size, generator=r).int(), tiles, block, query_block)
        table = torch.randint(0, 3, (S,), generator=r)
        allowed = pick.choice([None, lambda t, s, table=table: table[t] == table[s], lambda t, s, head: (t + s + head) % 3 != 0])
        causal, scale = pick.random() < 0.6, pick.choice([D**-0.5, 1.0, 0.0, -0.3])
        how = {"block": block, "query_block": query_block, "causal": causal, "allowed": allowed}
        keep = token_mask(mask, T, S, heads=H, **how).expand(B, H, T, S)
        wanted = [pick.random() < 0.5 for _ in range(3)]
        inputs = [x.detach().requires_grad_(want) for x, want in zip((q, k, v), wanted, strict=True)]
        exact = [x.detach().double().requires_grad_(want) for x, want in zip((q, k, v), wanted, strict=True)]
        out, lse = block_attention(*inputs, mask, scale=scale, return_lse=True, **how)
        expected, expected_lse = dense(*exact, keep, scale)
        size_ = float(expected_lse.detach().abs().nan_to_num(0, 0, 0).max()) / (1 if q.dtype in (torch.float32, torch.float64) else 8)
        close(out, expected, q.dtype, size_)
        close(torch.where(lse > -torch.inf, lse, -1.0), torch.where(expected_lse > -torch.inf, expected_lse, -1.0), q.dtype)
        assert out.dtype == q.dtype
        if any(wanted):
            weight = torch.randn(out.shape, generator=r, dtype=torch.float64)
            got = torch.autograd.grad((out * weight).sum(), [x for x in inputs if x.requires_grad])
            for a, e in zip(got, torch.autograd.grad((expected * weight).sum(), [x for x in exact if x.requires_grad]), strict=True):
                close(a, e, q.dtype, 5 * max(1.0, size_))              # products of D roundings with keys and queries


@pytest.mark.parametrize("seed", range(0, 40, 10))
def test_token_attention(seed: int) -> None:
    for one in range(seed, seed + 10):
        pick, r, q, k, v = drawn(1000 + one)
        (B, H, T, D), S = q.shape, k.shape[2]
        K = pick.choice([0, 1, 2, 63, 64, 65, 130])
        index = torch.randint(-1, S, (pick.choice([1, B]), pick.choice([1, H]), pick.choice([1, T]), K), generator=r)
        index = index.masked_fill(torch.rand(index.shape, generator=r) < pick.choice([0.0, 0.5, 1.1]), -1)
        bias = None
        if pick.random() < 0.6:
            bias = torch.randn(pick.choice([1, B]), pick.choice([1, H]), pick.choice([1, T]), K, generator=r)
            bias = bias.masked_fill(torch.rand(bias.shape, generator=r) < pick.choice([0.0, 0.5]), -torch.inf)
        scale = pick.choice([D**-0.5, 0.0, -0.5])
        out, lse = token_attention(q, k, v, index, scale=scale, bias_BHTK=bias, return_lse=True)
        at = index.expand(B, H, T, K)
        each = torch.arange(B)[:, None, None, None], torch.arange(H)[:, None, None] // (H // k.shape[1]), at.clamp_min(0)
        score = (q.double()[..., None, :] * k.double()[each]).sum(-1) * scale + (0 if bias is None else bias.double())
        score = score.masked_fill(at < 0, -torch.inf)
        total = score.logsumexp(-1) if K else torch.full((B, H, T), -torch.inf, dtype=torch.float64)
        weight = (score - torch.where(total > -torch.inf, total, 0.0)[..., None]).exp()
        size = float(total.abs().nan_to_num(0, 0, 0).max())
        close(out, (weight[..., None] * v.double()[each]).sum(-2), q.dtype, size)
        close(torch.where(lse > -torch.inf, lse, -1.0), torch.where(total > -torch.inf, total, -1.0), q.dtype, size)


@pytest.mark.parametrize("seed", range(0, 30, 10))
def test_line_attention(seed: int) -> None:
    for one in range(seed, seed + 10):
        pick, r, q, k, v = drawn(2000 + one)
        (B, H, T, _), S = q.shape, k.shape[2]
        column, back = (torch.rand(pick.choice([1, B]), pick.choice([1, H]), S, generator=r) < pick.choice([0.0, 0.05, 0.5, 1.1]) for _ in range(2))
        apart = torch.arange(S - T, S)[:, None] - torch.arange(S)
        keep = ((column[:, :, None] | back[:, :, apart.clamp_min(0)]) & (apart >= 0)).expand(B, H, T, S)
        close(line_attention(q, k, v, column, back, scale=0.3), dense(q, k, v, keep, 0.3)[0], q.dtype, 4.0)
        assert torch.equal(line_pairs(column.expand(B, H, S), back.expand(B, H, S), T), keep.sum((-1, -2)))


@pytest.mark.parametrize("at", [0, 1, 2])
def test_half_precision_at_an_odd_place_in_memory(at: int) -> None:
    """Pairs of bfloat16 are read as one number, which an odd offset does not allow."""
    given = [torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3)]
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    expected = block_attention(*given, mask, block=64, query_block=64, scale=0.25)
    given[at] = odd_offset(given[at])
    assert torch.equal(block_attention(*given, mask, block=64, query_block=64, scale=0.25), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_predicates_may_look_positions_up_in_a_table(dtype: torch.dtype) -> None:
    """They are asked at positions that exist, also in the last, ragged block."""
    r = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 4, generator=r).to(dtype) for n in (21, 37, 37))
    table = torch.randint(0, 3, (37,), generator=r)

    def allowed(t: Tensor, s: Tensor) -> Tensor:
        return table[t] == table[s]

    keep = ((table[16:, None] == table) & (torch.arange(37) <= torch.arange(16, 37)[:, None])).expand(1, 2, 21, 37)
    whole = torch.ones(1, 1, *blocks_of(21, 37, 16, 16), dtype=torch.bool)
    close(block_attention(q, k, v, whole, block=16, query_block=16, scale=0.5, allowed=allowed), dense(q, k, v, keep, 0.5)[0], dtype)
    assert torch.equal(BlockMask.of(whole, allowed, 21, 37, block=16, query_block=16).pairs(21, 37, True), keep[:, :1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_that_a_row_did_not_choose_are_not_read(dtype: torch.dtype) -> None:
    """On no path: rows of other counts fill up with what they chose."""
    (q, k, v), _, how = served(dtype)
    mask = torch.zeros(1, 4, *blocks_of(40, 60, 16, 16), dtype=torch.bool)
    mask[..., 0], mask[:, 1, :, 1] = True, True
    expected = block_attention(q, k, v, mask, **how)
    k[:, :, 32:], v[:, :, 32:] = torch.nan, torch.nan
    assert torch.equal(block_attention(q, k, v, mask, **how), expected)
    k[:, 1, 16:], v[:, 1, 16:] = torch.nan, torch.nan                  # which the heads of the second key head leave out
    assert torch.equal(block_attention(q, k, v, mask, **how), expected)


def test_top_k_without_compiled_loops_orders_nan_and_ties() -> None:
    score = torch.tensor([[1.0, torch.nan, 1.0, 1.0, torch.nan], [torch.nan] * 5, [0.0, -0.0, 0.0, 0.0, 1.0]])
    for k in range(1, 6):
        assert torch.equal(top._torch(score, k).sort(-1).values, top.top_k_reference(score, k).sort(-1).values)


def served(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor, dict[str, float]]:
    """Inputs that the compiled tiles take, every query with some key."""
    r = torch.Generator().manual_seed(0)
    mask = torch.rand(1, 4, *blocks_of(40, 60, 16, 16), generator=r) < 0.5
    mask[..., 0] = True
    return [torch.randn(1, n, m, 8, generator=r, dtype=torch.float64).to(dtype) for n, m in ((4, 40), (2, 60), (2, 60))], mask, {
        "block": 16, "query_block": 16, "scale": 0.4}


def test_second_derivatives_through_the_compiled_path() -> None:
    """A graph asked for in the backward pass is there, and gives what the definition gives."""
    inputs, mask, how = served()
    seconds = []
    for kind in (torch.float32, torch.float64):
        given = [x.to(kind).requires_grad_() for x in inputs]
        out, _ = block_attention(*given, mask, return_lse=True, **how)
        first = torch.autograd.grad(out.square().sum(), given, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), given))
    for a, e in zip(*seconds, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-3, atol=1e-4 * float(e.abs().max()))


def test_forward_derivatives_and_function_transforms_are_not_lost() -> None:
    """The memory that compiled loops read holds no tangents and no batch: torch does the work."""
    (q, k, v), mask, how = served()
    out, tangent = torch.func.jvp(lambda x: block_attention(x, k, v, mask, **how), (q,), (torch.ones_like(q),))
    step = 1e-5
    near = [block_attention(q.double() + s * step, k.double(), v.double(), mask, **how) for s in (1, -1)]
    torch.testing.assert_close(tangent.double(), (near[0] - near[1]) / (2 * step), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(out, block_attention(q, k, v, mask, **how), rtol=1e-5, atol=1e-5)
    many = torch.stack([q, 2 * q])
    each = torch.func.vmap(lambda x: block_attention(x, k, v, mask, **how))(many)
    torch.testing.assert_close(each, torch.stack([block_attention(x, k, v, mask, **how) for x in many]), rtol=1e-5, atol=1e-5)
    index = torch.arange(3).view(1, 1, 1, 3)
    _, tangent = torch.func.jvp(lambda x: token_attention(x, k, v, index, scale=0.4), (q,), (torch.ones_like(q),))
    assert tangent.abs().sum() > 0


def test_an_empty_batch_keeps_its_graph() -> None:
    (q, k, v), mask, how = served()
    empty = q[:0].requires_grad_()
    block_attention(empty, k[:0], v[:0], mask[:0].expand(0, 4, -1, -1), **how).sum().backward()
    assert empty.grad is not None and empty.grad.shape == (0, 4, 40, 8)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton's interpreter has one grid for the whole process")
def test_many_python_threads_at_once_give_the_same_bits() -> None:
    from concurrent.futures import ThreadPoolExecutor

    inputs, mask, how = served()

    def once(_: int) -> list[Tensor]:
        given = [x.detach().requires_grad_() for x in inputs]
        out = block_attention(*given, mask, **how)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), given)]

    first = once(0)
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            for got in pool.map(once, range(12)):
                assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(("change", "says"), [
    (lambda q, k, v, m: (q, k.bfloat16(), v, m), "one dtype"), (lambda q, k, v, m: (q.long(), k.long(), v.long(), m), "floating point"),
    (lambda q, k, v, m: (q[0], k[0], v[0], m), "need four dims"), (lambda q, k, v, m: (q, k, v[..., :4], m), "do not fit"),
    (lambda q, k, v, m: (q, k, v, BlockMask(m, None, None, 0, 16)), "at least 1"),
])
def test_bad_input_is_named(change: Callable[..., tuple[Tensor, ...]], says: str) -> None:
    (q, k, v), mask, how = served()
    with pytest.raises(BadInput, match=says):
        block_attention(*change(q, k, v, mask), **how)


@pytest.mark.parametrize(("index", "bias", "says"), [
    (torch.zeros(1, 1, 1, 3, dtype=torch.bool), None, "whole numbers"), (torch.zeros(1, 1, 1, 3).long(), torch.zeros(7), "any dimension may be 1"),
    (torch.zeros(1, 1, 1, 3).long(), torch.zeros(1, 1, 2, 3), "any dimension may be 1"), (torch.full((1, 1, 1, 3), 60), None, "60 keys"),
])
def test_bad_lists_are_named(index: Tensor, bias: Tensor | None, says: str) -> None:
    (q, k, v), _, _ = served()
    with pytest.raises(BadInput, match=says):
        token_attention(q, k, v, index, scale=1.0, bias_BHTK=bias)
