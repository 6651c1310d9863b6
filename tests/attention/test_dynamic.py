"""Dynamic selection against the papers' formulas written out naively, and against what was planted."""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from rarefy.attention.block import BlockAttention
from rarefy.attention.cache import Cache
from rarefy.attention.dynamic.blasst import Blasst
from rarefy.attention.dynamic.double_sparsity import DoubleSparsity
from rarefy.attention.dynamic.fitted import Fitted
from rarefy.attention.dynamic.loki import Loki
from rarefy.attention.dynamic.random_tiles import RandomTiles
from rarefy.attention.dynamic.rules import TopP, tail_levels
from rarefy.attention.dynamic.sample import SampleAttention
from rarefy.attention.dynamic.sparge import SpargeAttention
from rarefy.attention.dynamic.vertical_slash import VerticalSlash
from rarefy.attention.quest import Quest
from rarefy.errors import BadInput
from rarefy.fit import calibrate
from rarefy.kernels.block_attention import block_attention_reference
from rarefy.store.methods import load, save

M = TypeVar("M", bound=Fitted)


def heads(B: int = 1, H: int = 4, G: int = 2, S: int = 40, D: int = 8, T: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    r = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, n, s, D, generator=r) for n, s in ((H, T or S), (G, S), (G, S)))  # type: ignore[return-value]


def fitted(method: M, *inputs: Tensor) -> M:
    method.observe(*inputs)
    method.finish()
    return method


def softmax_rows(q: Tensor, k: Tensor) -> Tensor:
    """Causal attention [H, S, S] of one sequence, row by row."""
    share, (H, S, D) = q.shape[1] // k.shape[1], q.shape[1:]
    out = torch.zeros(H, S, S)
    for h in range(H):
        for t in range(S):
            out[h, t, : t + 1] = (k[0, h // share, : t + 1] @ q[0, h, t] / math.sqrt(D)).softmax(0)
    return out


def keeps(scores: list[float], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])


# --------------------------------------------------------------------------------------------------- token scores


def test_double_sparsity_scores_with_the_channels_of_the_largest_products() -> None:
    q, k, v = heads()
    q, k = q * torch.tensor([1.0, 9, 1, 1, 1, 1, 4, 1]), k * torch.tensor([1.0, 2, 1, 30, 1, 1, 4, 1])
    method = fitted(DoubleSparsity(budget=0.3, channels=0.25), q, k, v)
    for g in range(2):
        product = [float(sum((q[0, h, :, c, None] * k[0, g, :, c]).abs().mean() for h in (2 * g, 2 * g + 1))) for c in range(8)]
        assert set(method.labels_GD[g].nonzero().flatten().tolist()) == keeps(product, 2)
    mask, at = method.choose(q, k, True), [m.nonzero().flatten() for m in method.labels_GD]
    for h in range(4):
        for t in range(40):
            score = [float(q[0, h, t, at[h // 2]] @ k[0, h // 2, s, at[h // 2]]) for s in range(t)] + [math.inf]
            assert set(mask[0, h, t].nonzero().flatten().tolist()) == keeps(score, max(1, round(0.3 * (t + 1))))


def test_loki_at_the_rank_of_the_keys_is_exact_top_k() -> None:
    r = torch.Generator().manual_seed(1)
    q, _, v = heads()
    k = torch.randn(1, 2, 40, 2, generator=r) @ torch.randn(2, 2, 8, generator=r)          # two directions a head
    method = fitted(Loki(budget=0.3, rank=0.25), q, k, v)
    torch.testing.assert_close(method.basis_GDD.mT @ method.basis_GDD, torch.eye(8).expand(2, 8, 8), atol=1e-5, rtol=1e-5)
    mask = method.choose(q, k, True)
    for h in range(4):
        for t in range(40):
            score = [float(q[0, h, t] @ k[0, h // 2, s]) for s in range(t)] + [math.inf]
            assert set(mask[0, h, t].nonzero().flatten().tolist()) == keeps(score, max(1, round(0.3 * (t + 1))))


@pytest.mark.parametrize("cls", [DoubleSparsity, Loki])
def test_calibrated_channels_find_more_of_the_top_keys_than_others(cls: type) -> None:
    scale = torch.linspace(0.1, 3, 8)[torch.randperm(8, generator=torch.Generator().manual_seed(3))]
    q, k, v = heads(S=128)
    q, k = q * scale, k * scale
    method = fitted(cls(0.1, 0.25), q, k, v)
    turned = copy.deepcopy(method)
    for name in ("labels_GD", "basis_GDD"):
        if hasattr(turned, name):
            getattr(turned, name).copy_(getattr(turned, name).flip(-1) if cls is Loki else 1 - getattr(turned, name))
    exact = fitted(cls(0.1, 1.0), q, k, v).choose(q, k, True)
    found, other = (float((m.choose(q, k, True) & exact).sum() / exact.sum()) for m in (method, turned))
    assert found > other + 0.2


@pytest.mark.parametrize("make", [lambda: Quest(budget=0.3, block=4), lambda: DoubleSparsity(0.3), lambda: Loki(0.3)])
def test_summaries_kept_in_a_cache_are_those_of_all_keys(make) -> None:  # type: ignore[no-untyped-def]
    """Only new keys are described at a step, and decoding chooses what prefill chooses."""
    q, k, v = heads(S=23)
    method: BlockAttention = make()
    if isinstance(method, Fitted):
        fitted(method, q, k, v)
    described: list[int] = []
    plain = method.describe
    method.describe = lambda x: (described.append(x.shape[2]), plain(x))[1]  # type: ignore[method-assign]
    cache, outs, start = Cache(), [], 0
    for stop in (9, *range(10, 24)):
        keys, values = cache.update(k[:, :, start:stop], v[:, :, start:stop], 0)
        outs.append(method.attend(q[:, :, start:stop], keys, values, scale=8**-0.5, cache=cache.layers[0]))
        start = stop
    assert max(described[1:]) <= method.block
    del method.describe
    torch.testing.assert_close(torch.cat(outs, 2), method(q, k, v), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- rules


def test_tail_levels_keep_the_smallest_set_that_reaches_p() -> None:
    mass = torch.rand(50, 12, generator=torch.Generator().manual_seed(0)).softmax(-1)
    level = tail_levels(mass)
    for p in (0.1, 0.5, 0.83, 0.99):
        mask = level < -math.log1p(-p) - 1e-6
        for row, kept in zip(mass, mask, strict=True):
            order, total, wanted = row.argsort(descending=True).tolist(), 0.0, set()
            while total < p - 1e-6:
                wanted.add(order[len(wanted)])
                total = float(row[sorted(wanted)].sum())
            assert set(kept.nonzero().flatten().tolist()) == wanted


class Exact(TopP):
    """Top-p over exact logits of single keys: what a new combination costs."""

    name = "attention/exact_top_p"

    def scores(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> Tensor:
        return q_BHTD @ k_BGSD.repeat_interleave(q_BHTD.shape[1] // k_BGSD.shape[1], 1).mT / q_BHTD.shape[-1] ** 0.5


def test_top_p_counts_the_own_key_first_and_bounds_the_error() -> None:
    q, k, v = heads(S=40)
    method, exact = Exact(0.5, 1, 1, dial=0.8), softmax_rows(2 * q, k)
    mask = method.choose(2 * q, k, True)[0]
    for h in range(4):
        for t in range(40):
            kept = set(mask[h, t].nonzero().flatten().tolist())
            others = sorted(range(t), key=lambda s: -float(exact[h, t, s]))
            wanted, total = {t}, float(exact[h, t, t])
            while total < 0.8 and others:
                wanted.add(s := others.pop(0))
                total += float(exact[h, t, s])
            assert kept == wanted
    error = (method(2 * q, k, v) - exact[None] @ v.repeat_interleave(2, 1)).norm(dim=-1)
    assert float(error.max()) <= 2 * 0.2 * float(v.norm(dim=-1).max())


@pytest.mark.parametrize("query_block", [1, 8])
@pytest.mark.parametrize("budget", [0.2, 0.5])
def test_a_fitted_dial_meets_the_budget_in_prefill_and_single_queries(budget: float, query_block: int) -> None:
    q, k, v = heads(B=4, S=128)
    for method in (Blasst(budget, 8, query_block), SpargeAttention(budget, 8, query_block, theta=-1.0)):
        fitted(method, q, k, v)(q, k, v)
        assert abs(method.measured_density() - budget) < 0.04
        method.query_block = 1
        method(q, k, v)
        assert abs(method.measured_density() - budget) < 0.04


def test_top_p_moves_the_budget_to_diffuse_heads() -> None:
    """Two heads peaked, two diffuse, equal mean density: the diffuse ones, which the same share for all serves worst, lose less.

    The error of all heads together does not fall: the peaked ones hold most of the output's norm and pay for it.
    """
    q, k, v = heads(H=4, G=4, S=256, D=16)
    q = q * torch.tensor([6.0, 6.0, 0.5, 0.5]).view(4, 1, 1)
    exact = softmax_rows(q, k) @ v[0]
    top_p, top_k = fitted(Exact(0.15, 1, 1), q, k, v), fitted(Loki(0.15, 1.0), q, k, v)
    more, less = ((m(q, k, v)[0] - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2)) for m in (top_p, top_k))
    assert abs(top_p.measured_density() - top_k.measured_density()) < 0.02
    assert float(more.max()) < 0.7 * float(less.max()) and float(more.mean()) < 0.8 * float(less.mean())
    kept = top_p.choose(q, k, True)[0].float().mean((1, 2))
    assert kept[:2].max() < 0.2 * kept[2:].min()


# ---------------------------------------------------------------------------------------------- lines and stripes


@pytest.mark.parametrize("T", [96, 50])
def test_vertical_slash_finds_planted_lines(T: int) -> None:
    S, D = 96, 128
    k = torch.zeros(1, 1, S, D)
    k[0, 0, 20, 0] = k[0, 0, 37, 0] = 40.0                             # two columns
    q = torch.zeros(1, 1, T, D)
    q[..., 0] = 1.0
    at = torch.arange(S)
    k[0, 0, at, 1 + at] += 40.0                                        # a diagonal 7 back
    where = torch.arange(S - T, S)
    q[0, 0, torch.arange(T), 1 + (where - 7) % S] = 1.0
    method = VerticalSlash(budget=0.08, last=16)
    column, slash = method.lines(q, k, True)
    assert set(column[0, 0].topk(2).indices.tolist()) == {20, 37} and int(slash[0, 0].argmax()) == 7
    mask = method.choose(q, k, True)[0, 0]
    for t in range(T):
        pos = S - T + t
        assert all(mask[t, s] for s in (20, 37, pos - 7) if 0 <= s <= pos)
    pairs = sum(S - T + t + 1 for t in range(T))
    assert 0.08 <= float(mask.sum()) / pairs < 0.08 + S / pairs


def test_vertical_slash_sums_are_the_papers() -> None:
    q, k, _ = heads(S=30)
    exact = softmax_rows(q, k)
    column, slash = VerticalSlash(last=6).lines(q, k, True)
    for h in range(4):
        for x in range(30):
            assert math.isclose(float(column[0, h, x]), float(exact[h, 24:, x].sum()), rel_tol=1e-4, abs_tol=1e-6)
            assert math.isclose(float(slash[0, h, x]), sum(float(exact[h, t, t - x]) for t in range(24, 30) if t >= x), rel_tol=1e-4, abs_tol=1e-6)


@pytest.mark.parametrize("method", [VerticalSlash(0.1), SampleAttention(0.1, dial=0.5)])
def test_methods_for_prefill_leave_decoding_dense(method: BlockAttention) -> None:
    q, k, v = heads(T=1)
    assert method.select(q, k, v).mask.all() and method(q, k, v).isfinite().all() and method.measured_density() == 1.0


def test_random_tiles_are_computed_with_the_probability_asked_for() -> None:
    q, k, v = heads(S=512)
    method = RandomTiles(budget=0.3, block=8)
    mask = method.choose(q, k, True)[0, :, 256:, :32].float()
    assert abs(float(mask.mean()) - 0.3) < 0.02 and mask.sum(-1).std() > 1.0
    expected = block_attention_reference(q, k, v, method.choose(q, k, True), block=8, query_block=1, scale=8**-0.5)
    torch.testing.assert_close(method(q, k, v), expected, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- fitting


class _Batch:
    def __init__(self, ids: Tensor, mask: Tensor | None) -> None:
        self.input_ids, self.attention_mask = ids, mask


def test_calibrate_shows_attention_real_tokens_of_the_model_before_it() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64)).eval()
    ids = torch.arange(40).view(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0                                                   # on the right: positions are those of the text alone
    plan = {f"layers.{i}.attn": Loki(0.5) for i in range(2)}
    alone = {f"layers.{i}.attn": Loki(0.5) for i in range(2)}
    calibrate(model, plan, [_Batch(ids, mask)], sequential=False)
    calibrate(model, alone, [_Batch(ids[:1], None), _Batch(ids[1:, :13], None)], sequential=False)
    for name, method in plan.items():
        assert method.ready and int(method._sums["count"]) == 33
        torch.testing.assert_close(method._sums["square"], alone[name]._sums["square"], rtol=1e-4, atol=1e-6)
    calibrate(model, plan, [_Batch(ids, None)])
    with pytest.raises(BadInput, match="linear layer or attention"):
        calibrate(model, {"layers.0.resid_post": Loki()}, [_Batch(ids, None)])


def test_a_fitted_method_serves_its_own_heads_alone(tmp_path) -> None:  # type: ignore[no-untyped-def]
    q, k, v = heads()
    method = fitted(Loki(0.3), q, k, v)
    with pytest.raises(BadInput, match=r"fitted to .*\(4, 2, 8\), not \(4, 2, 6\)"):
        method(q[..., :6], k[..., :6], v[..., :6])
    with pytest.raises(BadInput, match="saw .* before and now"):
        method.observe(q[..., :6], k[..., :6], v[..., :6])
    with pytest.raises(BadInput, match="give all three"):
        Loki().observe(q)
    save(method, tmp_path / "m")
    again = load(tmp_path / "m", Loki)
    assert torch.equal(again(q, k, v), method(q, k, v))
    again.finish()                                                     # nothing was seen since: nothing changes
    assert torch.equal(again(q, k, v), method(q, k, v))
