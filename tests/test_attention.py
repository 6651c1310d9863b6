"""Attention methods against their papers' formulas written out, and the laws that the shared contract cannot say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rarefy.attention.block import BlockAttention, highest
from rarefy.attention.dynamic.scores import page_bounds
from rarefy.attention.quest import Quest
from rarefy.attention.random import RandomBlocks
from rarefy.attention.window import WindowSinks
from rarefy.errors import BadInput
from rarefy.kernels.block_attention import block_attention_reference

METHODS = [Quest, RandomBlocks, WindowSinks]


def heads(B: int = 2, H: int = 4, G: int = 2, S: int = 111, D: int = 8, T: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    r = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, n, s, D, generator=r) for n, s in ((H, T or S), (G, S), (G, S)))  # type: ignore[return-value]


def decoded(method: BlockAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query at a time over a growing cache."""
    return torch.cat([method(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1]) for t in range(q.shape[2])], 2)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("S", [1, 63, 111])
@pytest.mark.parametrize("query_block", [1, 16])
@pytest.mark.parametrize("cls", METHODS)
def test_full_budget_is_torchs_attention(cls: type[BlockAttention], query_block: int, S: int) -> None:
    q, k, v = heads(S=S)
    method = cls(budget=1.0, block=16, query_block=query_block)
    torch.testing.assert_close(method(q, k, v), dense(q, k, v), rtol=1e-5, atol=1e-6)
    assert method.measured_density() == 1.0


@pytest.mark.parametrize("cls", METHODS)
def test_prefill_is_decoding_with_a_choice_per_query(cls: type[BlockAttention]) -> None:
    q, k, v = heads(S=70)
    method = cls(budget=0.3, block=8)
    torch.testing.assert_close(method(q, k, v), decoded(method, q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("query_block", [1, 5, 16])
def test_a_window_is_the_same_in_prefill_and_decoding_whatever_the_query_block(query_block: int) -> None:
    q, k, v = heads(S=63)
    for method in (WindowSinks(budget=0.3, query_block=query_block), WindowSinks(window=9, query_block=query_block)):
        torch.testing.assert_close(method(q, k, v), decoded(method, q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("T", [1, 7, 30])
def test_a_cached_tail_is_the_tail_of_the_whole(cls: type[BlockAttention], T: int) -> None:
    q, k, v = heads(S=63)
    method = cls(budget=0.4, block=8)
    torch.testing.assert_close(method(q[:, :, -T:], k, v), method(q, k, v)[:, :, -T:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("query_block", [1, 8])
@pytest.mark.parametrize("cls", METHODS)
def test_the_future_is_without_effect(cls: type[BlockAttention], query_block: int) -> None:
    """Within the law: with shared choices only queries of later blocks are later."""
    q, k, v = heads(S=64)
    method, at = cls(budget=0.3, block=8, query_block=query_block), 40
    before = method(q, k, v)[:, :, :at]
    q, k, v = (torch.cat([x[:, :, :at], 50 * torch.randn_like(x[:, :, at:])], 2) for x in (q, k, v))
    torch.testing.assert_close(method(q, k, v)[:, :, :at], before, rtol=1e-6, atol=1e-6)


def test_quests_score_is_the_papers_formula_and_bounds_every_logit() -> None:
    q, k, _ = heads(B=1, S=45)
    score = Quest(block=16).scores(q, k, 1, True)
    for h in range(4):
        for t in range(45):
            for n in range(3):
                page = k[0, h // 2, 16 * n : 16 * n + 16]
                low, high = page.amin(0), page.amax(0)
                bound = sum(max(float(x * a), float(x * b)) for x, a, b in zip(q[0, h, t], low, high, strict=True))
                assert math.isclose(float(score[0, h, t, n]), bound, rel_tol=1e-4, abs_tol=1e-4)
                assert bound >= float((page @ q[0, h, t]).max()) - 1e-4


@pytest.mark.parametrize("S", [1, 16, 45, 63])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_score_of_one_query_is_that_of_prefill(S: int, dtype: torch.dtype) -> None:
    """float32 takes the one-pass kernel, float64 the products; keys as a view with other strides."""
    q, k, _ = (x.to(dtype) for x in heads(S=S))
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    one, all_ = Quest(block=16).scores(q[:, :, -1:], k, 1, True), Quest(block=16).scores(q, k, 1, True)
    torch.testing.assert_close(one, all_[:, :, -1:] if S > 1 else one, rtol=1e-5, atol=1e-5)
    low, high = (x.repeat_interleave(2, 1) for x in page_bounds(k, 16))
    q = q[:, :, -1:]
    torch.testing.assert_close(one, torch.maximum(q * low, q * high).sum(-1)[:, :, None], rtol=1e-5, atol=1e-5)


def test_page_bounds_of_a_short_last_page() -> None:
    k = torch.arange(10.0).view(1, 1, 10, 1)
    low, high = page_bounds(k, 4)
    assert low.flatten().tolist() == [0, 4, 8] and high.flatten().tolist() == [3, 7, 9]


def test_quest_keeps_the_highest_pages_and_its_own() -> None:
    q, k, v = heads(B=1, S=128, T=1)
    method = Quest(budget=0.25, block=16)
    score, mask = method.scores(q, k, 1, True)[0, :, 0], method.select(q, k, v).mask[0, :, 0]
    for h in range(4):
        others = score[h, :7].argsort(descending=True)
        assert sorted(mask[h].nonzero().flatten().tolist()) == sorted([int(others[0]), 7])      # 2 of 8, one of them its own


@pytest.mark.parametrize("cls", [Quest, WindowSinks])
def test_quest_finds_a_planted_key_that_a_window_drops(cls: type[BlockAttention]) -> None:
    q, k, v = heads(B=1, H=1, G=1, S=256, D=16, T=1)
    k = 0.1 * k
    k[0, 0, 100] = 8 * q[0, 0, 0] / q[0, 0, 0].norm()
    q = 4 * q
    found = (cls(budget=0.25, block=16)(q, k, v) - v[:, :, 100:101]).norm() < 0.05 * v[:, :, 100].norm()
    assert found == (cls is Quest)


def test_a_blocks_bound_is_its_queries_largest() -> None:
    q, k, _ = heads(S=50, T=23)                                        # positions 27..49: a ragged first and last block
    single, shared = Quest(block=8).scores(q, k, 1, True), Quest(block=8).scores(q, k, 8, True)
    cut = [t // 8 - 27 // 8 for t in range(27, 50)]
    for row in range(cut[-1] + 1):
        among = [i for i, c in enumerate(cut) if c == row]
        torch.testing.assert_close(shared[:, :, row], single[:, :, among].amax(2))


def test_highest_is_a_stable_sort() -> None:
    r = torch.Generator().manual_seed(0)
    score = torch.randint(-2, 3, (3, 4, 40, 11), generator=r).float()
    score[score == 2], score[score == -2] = torch.inf, -torch.inf
    keep = torch.randint(1, 12, (40, 1), generator=r)
    got = highest(score, keep)
    for row, k, mask in zip(score.flatten(0, 2).tolist(), keep.repeat(12, 1).flatten().tolist(), got.flatten(0, 2), strict=True):
        assert set(mask.nonzero().flatten().tolist()) == set(sorted(range(11), key=lambda n: (-row[n], n))[:k])


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.6])
def test_budget_counts_blocks_of_each_query(budget: float) -> None:
    q, k, v = heads(S=160)
    for cls in (Quest, RandomBlocks):
        count = cls(budget=budget, block=8).select(q, k, v).count
        expected = torch.tensor([max(1, round(budget * (p // 8 + 1))) for p in range(160)])
        assert torch.equal(count, expected.expand_as(count))


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("budget", [0.1, 0.25, 0.5])
def test_density_of_pairs_is_the_budget_on_a_long_context(cls: type[BlockAttention], budget: float) -> None:
    q, k, v = heads(B=1, H=2, G=1, S=1024, D=4)
    method = cls(budget=budget, block=8)
    method(q, k, v)
    assert abs(method.measured_density() - budget) < 0.02


@pytest.mark.parametrize("query_block", [1, 5, 16])
@pytest.mark.parametrize("cls", METHODS)
def test_measured_density_counts_pairs(cls: type[BlockAttention], query_block: int) -> None:
    """Attending to values that mark their key shows which pairs have weight."""
    S = 43
    q, k, _ = heads(B=2, S=S, T=20)
    v = torch.eye(S).expand(2, 2, S, S)
    method = cls(budget=0.3, block=7, query_block=query_block)
    q, k = (torch.nn.functional.pad(x, (0, S - 8)) for x in (q, k))
    pairs = (method(q, k, v) > 0).sum().item()
    visible = sum(t + 1 for t in range(S - 20, S)) * 2 * 4
    assert method.measured_density() == pytest.approx(pairs / visible, abs=1e-12)
    assert method.measured_density() == 1.0                            # asked again, nothing was run in between


def test_window_and_sinks_by_hand() -> None:
    q, k, v = heads(B=1, H=1, G=1, S=12)
    method = WindowSinks(window=3, sinks=2, block=4)
    allowed = torch.tensor([[s <= t and (s < 2 or t - s < 3) for s in range(12)] for t in range(12)])
    expected = scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    torch.testing.assert_close(method(q, k, v), expected, rtol=1e-5, atol=1e-6)
    assert str(method.pattern) == "(window(3) | sinks(2))"
    shares = WindowSinks(budget=0.25, sinks=4).pattern.mask(100, 100).sum(-1)
    assert shares.tolist() == [max(1, round(0.25 * (p + 1))) for p in range(100)]


@pytest.mark.parametrize("T, S", [(1, 1), (1, 40), (17, 40), (40, 40), (63, 63)])
@pytest.mark.parametrize("query_block", [1, 5, 16])
@pytest.mark.parametrize("arguments", [{"budget": 0.1}, {"budget": 0.7}, {"budget": 1.0}, {"window": 9}, {"window": 1, "sinks": 30}])
def test_window_blocks_are_those_of_the_compiled_pattern(arguments: dict, query_block: int, T: int, S: int) -> None:
    q, k, _ = heads(S=S, T=T)
    method = WindowSinks(block=6, query_block=query_block, **arguments)
    expected = method.pattern.compile(T, S, size=6, query_block=1 if T == 1 else query_block)
    assert torch.equal(method.choose(q, k, True), expected.expand(2, 4, *expected.shape))


def test_random_is_a_function_of_seed_and_even() -> None:
    q, k, v = heads(B=1, S=512)
    first, again, other = (RandomBlocks(budget=0.25, block=8, seed=s).select(q, k, v).mask for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    taken = first[0, :, 256:, :32].float().mean((0, 1))                # every query sees these, none owns one
    assert taken.min() > 0.15 and taken.max() < 0.35


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_as_if_it_were_not_there(cls: type[BlockAttention], side: str) -> None:
    q, k, v = heads(S=40)
    real = torch.ones(2, 40, dtype=torch.bool)
    cut = slice(0, 13) if side == "left" else slice(27, 40)
    real[1, cut] = False
    method = cls(budget=0.4, block=8)
    out = method.attend(q, k, v, scale=8**-0.5, padding_BS=real)
    alone = method(*(x[1:, :, real[1]] for x in (q, k, v)))
    torch.testing.assert_close(out[1:, :, real[1]], alone, rtol=1e-5, atol=1e-6)
    assert torch.equal(out[1, :, cut], torch.zeros_like(out[1, :, cut]))
    torch.testing.assert_close(out[:1], method(q[:1], k[:1], v[:1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("T", [1, 6])
def test_padding_on_the_left_of_a_cache(cls: type[BlockAttention], T: int) -> None:
    q, k, v = heads(S=40, T=T)
    real = torch.ones(2, 40, dtype=torch.bool)
    real[1, :13] = False
    method = cls(budget=0.4, block=8)
    out = method.attend(q, k, v, scale=8**-0.5, padding_BS=real)
    torch.testing.assert_close(out[1:], method(q[1:], k[1:, :, 13:], v[1:, :, 13:]), rtol=1e-5, atol=1e-6)
    assert (out[1].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("cls", METHODS)
def test_a_row_of_padding_alone_gives_zeros(cls: type[BlockAttention]) -> None:
    q, k, v = heads(S=20)
    real = torch.ones(2, 20, dtype=torch.bool)
    real[0] = False
    out = cls(block=4).attend(q, k, v, scale=1.0, padding_BS=real)
    assert torch.equal(out[0], torch.zeros_like(out[0])) and torch.isfinite(out).all()


@pytest.mark.parametrize("cls", METHODS)
def test_a_sequence_shorter_than_a_block(cls: type[BlockAttention]) -> None:
    q, k, v = heads(S=5)
    out = cls(budget=0.25, block=64)(q, k, v)
    assert torch.isfinite(out).all()
    if cls is not WindowSinks:                                         # one block, which is its own
        torch.testing.assert_close(out, dense(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", [Quest, RandomBlocks])
@pytest.mark.parametrize("budget", [0.25, 1.0])
def test_without_causality_blocks_are_chosen_of_all(cls: type[BlockAttention], budget: float) -> None:
    q, k, v = heads(S=64)
    method = cls(budget=budget, block=8)
    out, mask = method.attend(q, k, v, scale=0.3, causal=False), method.choose(q, k, False)
    assert (mask.sum(-1) == budget * 8).all()
    expected = block_attention_reference(q, k, v, mask, block=8, query_block=1, scale=0.3, causal=False)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("query_block", [1, 4])
@pytest.mark.parametrize("cls", METHODS)
def test_gradients_are_those_of_the_reference(cls: type[BlockAttention], query_block: int) -> None:
    method = cls(budget=0.4, block=4, query_block=query_block)
    inputs = [x.double().requires_grad_() for x in heads(B=1, S=19, D=4)]
    weight = torch.randn(1, 4, 19, 4, dtype=torch.float64)
    got = torch.autograd.grad((method(*inputs) * weight).sum(), inputs)
    expected = torch.autograd.grad((method.reference(*inputs) * weight).sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_cost_counts_the_choice_and_follows_the_density() -> None:
    q, k, v = heads(B=1, H=4, G=2, S=320, D=8, T=1)
    method = Quest(budget=0.25, block=16)
    with pytest.raises(BadInput, match="run it once"):
        method.cost()
    method(q, k, v)
    assert method.dense_cost().flops == 4 * 4 * 8 * 320
    assert method.cost().flops == 0.25 * method.dense_cost().flops + 2 * 2 * 4 * 8 * 20        # two bounds of 20 pages
    assert method.cost(0.5).bytes == 2 * method.cost().bytes


@pytest.mark.parametrize("cls", METHODS)
def test_bad_input_is_named(cls: type[BlockAttention]) -> None:
    q, k, v = heads(H=4, G=2, S=20)
    method = cls(block=4)
    for budget in (0, -0.1, 1.5, float("nan"), True):
        with pytest.raises(BadInput, match=r"budget=.*\(0, 1\]"):
            cls(budget=budget)
    with pytest.raises(BadInput, match="3 query heads are no multiple of 2"):
        method(q[:, :3], k, v)
    bad = k.clone()
    bad[0, 1, 3, 2] = float("nan")
    with pytest.raises(BadInput, match="keys of attention/.* in layer 7: 1 of .* NaN"):
        method.attend(q, bad, v, scale=1.0, layer=7)
    with pytest.raises(BadInput, match="20 queries but only 10 keys"):
        method(q, k[:, :, :10], v[:, :, :10])
