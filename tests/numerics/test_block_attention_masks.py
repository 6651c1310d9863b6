"""Block masks with partial tiles, log-sum-exp, token lists and merging, against loops over single pairs in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.errors import BadInput
from rarefy.kernels.block_attention import BlockMask, block_attention, block_attention_reference, blocks_of, merge, token_attention
from rarefy.kernels.block_attention.gather import gather_blocks

SHAPES = [  # B, H, G, T, S, D, block, query_block
    (1, 2, 1, 21, 21, 5, 8, 4), (2, 4, 2, 7, 23, 3, 4, 8), (1, 2, 2, 1, 19, 4, 8, 1), (1, 3, 1, 9, 14, 2, 4, 1), (1, 4, 2, 70, 90, 8, 16, 32),
]


def by_pairs(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Python floats over the pairs of keep [b, h, T, S]."""
    B, H, T, _ = q.shape
    q, k, v = q.double(), k.double(), v.double()
    out, lse = torch.zeros_like(q), torch.full((B, H, T), -math.inf, dtype=torch.float64)
    keep = keep.expand(B, H, T, -1)
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        g = h // (H // k.shape[1])
        keys = keep[b, h, t].nonzero()[:, 0].tolist()
        if keys:
            weights = [math.exp(float(q[b, h, t] @ k[b, g, s]) * scale) for s in keys]
            lse[b, h, t] = math.log(sum(weights))
            out[b, h, t] = sum(w / sum(weights) * v[b, g, s] for w, s in zip(weights, keys, strict=True))
    return out, lse


def case(shape: tuple[int, ...], seed: int = 0, heads: int | None = None, batch: int | None = None) -> tuple[Tensor, Tensor, Tensor, BlockMask]:
    """Random q, k, v and a mask whose blocks are out, whole, or one of five random tiles; the last tile is empty."""
    B, H, G, T, S, D, block, query_block = shape
    r = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, n, length, D, generator=r) for n, length in ((H, T), (G, S), (G, S)))
    size = (batch or B, heads or H, *blocks_of(T, S, block, query_block))
    tiles = torch.rand(6, query_block, block, generator=r) < torch.linspace(0.9, 0.0, 6)[:, None, None]
    partial = torch.randint(-1, 6, size, generator=r, dtype=torch.int32)
    return q, k, v, BlockMask(torch.rand(size, generator=r) < 0.7, partial, tiles, block, query_block)


def pairs_by_definition(mask: BlockMask, T: int, S: int, causal: bool) -> Tensor:
    """One pair at a time."""
    b, h = mask.blocks.shape[:2]
    keep = torch.zeros(b, h, T, S, dtype=torch.bool)
    for i, j, t, s in itertools.product(range(b), range(h), range(T), range(S)):
        at = S - T + t
        place = i, j, at // mask.query_block - (S - T) // mask.query_block, s // mask.block
        number = int(mask.partial[place]) if mask.partial is not None else -1
        inside = number < 0 or bool(mask.tiles[number, at % mask.query_block, s % mask.block])
        keep[i, j, t, s] = bool(mask.blocks[place]) and inside and not (causal and s > at)
    return keep


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_pairs_and_density_of_a_mask(shape: tuple[int, ...], causal: bool) -> None:
    T, S = shape[3:5]
    *_, mask = case(shape)
    expected = pairs_by_definition(mask, T, S, causal)
    assert torch.equal(mask.pairs(T, S, causal), expected)
    seen = sum(S - T + t + 1 if causal else S for t in range(T)) * expected.shape[0] * expected.shape[1]
    assert mask.density(T, S, causal) == pytest.approx(int(expected.sum()) / seen, abs=1e-12)
    whole = BlockMask(mask.blocks, None, None, mask.block, mask.query_block)
    assert whole.density(T, S, causal) == pytest.approx(int(pairs_by_definition(whole, T, S, causal).sum()) / seen, abs=1e-12)


@pytest.mark.parametrize("sharing", [(None, None), (1, None), (1, 1)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_lse_of_a_mask_with_tiles(shape: tuple[int, ...], causal: bool, sharing: tuple[int | None, int | None]) -> None:
    q, k, v, mask = case(shape, heads=sharing[0], batch=sharing[1])
    out, lse = by_pairs(q, k, v, mask.pairs(*shape[3:5], causal), 0.7)
    how = {"block": shape[6], "query_block": shape[7], "scale": 0.7, "causal": causal}
    for path in (block_attention, block_attention_reference, gather_blocks):
        got, got_lse = path(q, k, v, mask, return_lse=True, **how)
        torch.testing.assert_close(got.double(), out, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got_lse.double(), lse, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(path(q, k, v, mask, **how).double(), out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_predicate_of_the_head(shape: tuple[int, ...]) -> None:
    q, k, v, mask = case(shape)
    T, S = shape[3:5]
    blocks = mask.blocks[:, :1]

    def allowed(at: Tensor, s: Tensor, head: Tensor) -> Tensor:
        return (at + s) % (head + 2) == 0

    at_T, at_S, head = torch.arange(S - T, S)[:, None], torch.arange(S), torch.arange(shape[1])[:, None, None]
    keep = pairs_by_definition(BlockMask(blocks, None, None, *shape[6:]), T, S, True) & ((at_T + at_S) % (head + 2) == 0)
    out, _ = by_pairs(q, k, v, keep, 0.5)
    how = {"block": shape[6], "query_block": shape[7], "scale": 0.5, "causal": True}
    for path in (block_attention, block_attention_reference, gather_blocks):
        torch.testing.assert_close(path(q, k, v, blocks.expand(-1, shape[1], -1, -1), allowed=allowed, **how).double(), out, rtol=1e-5, atol=1e-6)
    made = BlockMask.of(blocks, allowed, T, S, block=shape[6], query_block=shape[7], heads=shape[1])
    assert torch.equal(made.pairs(T, S, True), keep)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_predicate_compiles_to_few_tiles(shape: tuple[int, ...]) -> None:
    T, S, _, block, query_block = shape[3:]
    blocks = torch.ones(1, 1, *blocks_of(T, S, block, query_block), dtype=torch.bool)
    made = BlockMask.of(blocks, lambda at, s: (at - s < 6) & (at >= s) | (s < 2), T, S, block=block, query_block=query_block)
    at_T, at_S = torch.arange(S - T, S)[:, None], torch.arange(S)
    assert torch.equal(made.pairs(T, S, False)[0, 0], (at_T - at_S < 6) & (at_T >= at_S) | (at_S < 2))
    assert made.tiles is None or len(made.tiles) == len(torch.unique(made.tiles, dim=0)) <= 8 * max(block, query_block)


def test_equal_tiles_are_stored_once() -> None:
    blocks = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    made = BlockMask.of(blocks, lambda at, s: (at - s < 5) & (at >= s), 256, 256, block=8, query_block=8)
    assert made.tiles is not None and len(made.tiles) == 2 and int(made.blocks.sum()) == 63         # the diagonal and the one below it


@pytest.mark.parametrize("path", ["blocks", "tokens"])
def test_gradients_of_output_and_lse(path: str) -> None:
    q, k, v, mask = case((1, 2, 1, 7, 11, 3, 4, 2))
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    r = torch.Generator().manual_seed(1)
    index, bias = torch.randint(-1, 11, (1, 2, 7, 5), generator=r), torch.randn(1, 2, 7, 5, generator=r, dtype=torch.float64).requires_grad_()

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        if path == "tokens":
            out, lse = token_attention(q, k, v, index, scale=0.6, bias_BHTK=bias, return_lse=True)
        else:
            out, lse = block_attention(q, k, v, mask, block=4, query_block=2, scale=0.6, return_lse=True)
        return out, torch.where(lse > -torch.inf, lse, 0.0)

    assert torch.autograd.gradcheck(run, (q, k, v, bias))


@pytest.mark.parametrize("shared", [True, False])
def test_listed_tokens(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    r = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, m, 6, generator=r) for n, m in ((4, 5), (2, 30), (2, 30)))
    index = torch.randint(-1, 30, (1, 1, 5, 9) if shared else (2, 4, 5, 9), generator=r)
    index[..., 1, :] = -1
    index[..., 0, :2] = 7                                             # twice the same key: counts twice
    bias = torch.randn(2, 4, 5, 9, generator=r)
    bias[0, 0, 2, 0] = -math.inf
    out, lse = torch.zeros(2, 4, 5, 6, dtype=torch.float64), torch.full((2, 4, 5), -math.inf, dtype=torch.float64)
    for b, h, t in itertools.product(range(2), range(4), range(5)):
        listed = zip(index.expand(2, 4, 5, 9)[b, h, t].tolist(), bias[b, h, t].tolist(), strict=True)
        pairs = [(s, math.exp(float(q[b, h, t].double() @ k[b, h // 2, s].double()) * 0.5 + extra)) for s, extra in listed if s >= 0]
        total = sum(w for _, w in pairs)
        if total:
            out[b, h, t], lse[b, h, t] = sum(w / total * v[b, h // 2, s].double() for s, w in pairs), math.log(total)
    import rarefy.kernels.block_attention.tokens as tokens

    for limit in (1, 8 << 20):
        monkeypatch.setattr(tokens, "CHUNK_BYTES", limit)
        got, got_lse = token_attention(q, k, v, index, scale=0.5, bias_BHTK=bias, return_lse=True)
        torch.testing.assert_close(got.double(), out, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got_lse.double(), lse, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(token_attention(q[:, :, :1], k, v, index[:, :, :1], scale=0.5, bias_BHTK=bias[:, :, :1]).double(), out[:, :, :1],
                               rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_parts_merge_to_the_whole_in_any_order(causal: bool) -> None:
    q, k, v, mask = case(SHAPES[0])
    how = {"block": 8, "query_block": 4, "scale": 0.7, "causal": causal, "return_lse": True}
    third = torch.randint(0, 3, mask.blocks.shape)
    parts = [block_attention(q, k, v, BlockMask(mask.blocks & (third == i), mask.partial, mask.tiles, 8, 4), **how) for i in range(3)]
    whole = by_pairs(q, k, v, mask.pairs(21, 21, causal), 0.7)
    for order in itertools.permutations(range(3)):
        outs, lses = zip(*(parts[i] for i in order), strict=True)
        pair = merge(outs[:2], lses[:2])
        for got in (merge(outs, lses), merge([pair[0], outs[2]], [pair[1], lses[2]])):
            for a, b in zip(got, whole, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_bad_masks_and_lists_are_refused() -> None:
    q, k, v, mask = case(SHAPES[0])
    assert mask.partial is not None and mask.tiles is not None
    bad: list[tuple[Any, str]] = [
        (lambda: BlockMask(mask.blocks.int(), None, None, 8, 4), "blocks must be bool"),
        (lambda: BlockMask(mask.blocks, mask.partial, None, 8, 4), "come together"),
        (lambda: BlockMask(mask.blocks, mask.partial.long(), mask.tiles, 8, 4), "must be int32"),
        (lambda: BlockMask(mask.blocks, mask.partial, mask.tiles, 4, 8), r"tiles must be bool \[P, 8, 4\]"),
        (lambda: BlockMask(mask.blocks, mask.partial + 6, mask.tiles, 8, 4), "there are 6"),
        (lambda: block_attention(q, k, v, mask, block=4, query_block=4, scale=1.0), "blocks of 4 queries and 8 keys"),
        (lambda: block_attention(q, k, v, mask.blocks.expand(3, -1, -1, -1), block=8, query_block=4, scale=1.0), "block mask has shape"),
        (lambda: token_attention(q, k, v, torch.full((1, 2, 21, 3), 21), scale=1.0), "there are 21 keys"),
        (lambda: token_attention(q, k, v, torch.zeros(1, 2, 20, 3).long(), scale=1.0), "index must be"),
        (lambda: token_attention(q, k, v, torch.zeros(1, 2, 21, 3), scale=1.0), "index must be"),
        (lambda: token_attention(q, k[..., :2], v, torch.zeros(1, 2, 21, 3).long(), scale=1.0), "do not fit"),
        (lambda: merge([], []), "0 outputs"),
    ]
    for call, message in bad:
        with pytest.raises(BadInput, match=message):
            call()


def test_density_of_a_long_mask_expands_only_what_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    from rarefy.kernels.block_attention import pairs

    S, seen = 1 << 14, []
    tile = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(0)) < 0.3
    blocks = torch.ones(1, 1, S // 64, S // 64, dtype=torch.bool)
    mask = BlockMask(blocks, torch.zeros(blocks.shape, dtype=torch.int32), tile, 64, 64)
    cut = pairs._cut
    monkeypatch.setattr(pairs, "_cut", lambda chosen, *rest: seen.append(int(chosen.sum())) or cut(chosen, *rest))
    n, below = S // 64, int(tile[0].tril().sum())
    want = (n * (n - 1) // 2 * int(tile.sum()) + n * below) / (S * (S + 1) / 2)
    assert mask.density(S, S, True) == want
    assert seen == [n]                                                                       # the diagonal's
