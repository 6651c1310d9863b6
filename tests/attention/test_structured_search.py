"""Patterns chosen by calibration: the optimum, the influence of a pair, what is found where it was planted."""

import pytest
import torch
from structured_inputs import dense, each_query, qkv, softmax_over

from rarefy.attention.patterns import parse
from rarefy.attention.structured.moa import MoA, influence, profile, spread
from rarefy.attention.structured.searched import allot
from rarefy.attention.structured.vdit import EfficientVDiT, SparseVDiT
from rarefy.builtin.model import recall_model
from rarefy.site import replaced


def test_the_allotment_is_the_best_of_all():
    draw = torch.Generator().manual_seed(1)
    for budget in (0.2, 0.45, 0.7):
        error, cost = torch.rand(4, 5, generator=draw), torch.randint(1, 128, (4, 5), generator=draw) / 128
        ways = torch.cartesian_prod(*[torch.arange(5)] * 4)
        total = error.gather(1, ways.T).sum(0).masked_fill(cost.gather(1, ways.T).mean(0) > budget, torch.inf)
        assert torch.equal(allot(error, cost, budget), ways[total.argmin()])
    assert allot(torch.rand(2, 3), torch.tensor([[0.5, 0.4, 0.9]] * 2), 0.1).tolist() == [1, 1]


@pytest.mark.parametrize("with_gradient", [True, False])
def test_influence_is_what_masking_a_pair_does(with_gradient):
    q, k, v = qkv(9, batch=1)
    lot = torch.randn(q.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    got = influence(q, k, v, lot if with_gradient else None, 0.4)
    for h, i, j in ((0, 8, 3), (1, 5, 5), (3, 2, 0), (2, 7, 8)):
        score = (k[0, h // 2] @ q[0, h, i] * 0.4)[: i + 1]
        outs = []
        for masked in (score, score.masked_fill(torch.arange(i + 1) == j, -torch.inf)):
            outs.append(masked.softmax(0) @ v[0, h // 2, : i + 1])
        change = outs[1] - outs[0]
        want = (lot[0, h, i] * change).sum() if with_gradient else change.square().sum()
        torch.testing.assert_close(got[0, h, i, j], want, rtol=1e-9, atol=1e-12)


def planted(draw):
    """q, k, v whose heads look at: the own key, key 16 before, multiples of 16, anywhere."""
    T, D = 96, 96
    at, eye = torch.arange(T), torch.eye(T)
    q = torch.stack([eye, eye[(at - 16).clamp_min(0)], torch.ones(T, D), torch.randn(T, D, generator=draw)])[None]
    k = torch.stack([eye, eye, (at % 16 == 0).float()[:, None].expand(T, D), torch.randn(T, D, generator=draw)])[None]
    return q * torch.tensor([300.0, 300.0, 3.0, 3.0])[:, None, None], k, torch.randn(1, 4, T, D, generator=draw)


def test_the_search_finds_planted_patterns():
    q, k, v = planted(torch.Generator().manual_seed(0))
    options = "full(); own(); lag(16) | own() | sinks(1); every(16) | own()"
    method = SparseVDiT(0.4, options, 16, 16)
    method.observe(q, k, v)
    method.finish()
    assert method.choice_H.tolist() == [1, 2, 3, 0]
    out = method(q, k, v)
    assert (out - dense(q, k, v)).norm() < 0.02 * out.norm()
    want = sum(parse(text.strip()).density(96) for text in options.split(";")) / 4
    assert method.measured_density() == pytest.approx(want) and want < 0.4


@pytest.mark.parametrize(("tolerance", "kept"), [(0.0, "full()"), (1e9, "window(2)")])
def test_a_layers_mask_is_the_sparsest_within_its_tolerance(tolerance, kept):
    q, k, v = qkv(31)
    method = EfficientVDiT(tolerance, "full(); window(9); window(2)", 8, 8)
    method.observe(q, k, v)
    method.finish()
    assert {str(method.options[int(n)]) for n in method.choice_H} == {kept}


def test_a_layers_error_is_that_of_its_outputs():
    q, k, v = qkv(31)
    method = EfficientVDiT(0.5, "full(); window(9); window(2)", 8, 8)
    method.observe(q, k, v)
    method.finish()
    near = each_query(q, k, v, softmax_over(lambda at, head: list(range(max(0, at - 8), at + 1))))
    whole = dense(q, k, v)
    assert float(method.harm_HR[:, 1].sum()) == pytest.approx(float((near - whole).square().sum() / whole.square().sum()), rel=1e-4)


def test_moas_spans_grow_with_the_sequence():
    method = MoA(1.0, 2, options="elastic(3, 0.25); elastic(2, 0)", block=8, query_block=8)
    method.observe(*qkv(24))
    method.finish()
    assert method.choice_H.tolist() == [0] * 4
    for length in (24, 48):
        q, k, v = qkv(length)
        span = 3 + length // 4
        want = each_query(q, k, v, softmax_over(lambda at, head, span=span: [j for j in range(at + 1) if j > at - span or j < 2]))
        torch.testing.assert_close(method(q, k, v), want)


def test_moas_profile_is_the_models_own_gradient():
    model = recall_model()
    ids = torch.randint(0, 192, (2, 40), generator=torch.Generator().manual_seed(0))
    rules = "elastic(4, 0); elastic(8, 0.25); full()"
    plan = {f"layers.{n}.attn": MoA(0.3, 1, options=rules, block=8, query_block=8) for n in range(model.config.num_hidden_layers)}
    profile(model, plan, [ids])
    spread(plan.values(), 0.3)
    shares = torch.cat([m.share_HR.gather(1, m.choice_H.long()[:, None]) for m in plan.values()])
    assert shares.mean() <= 0.3 and all(p.grad is None for p in model.parameters())
    # The sum over pairs is the derivative of the loss along the whole change of a layer's output that masking them one by one makes.
    method = plan["layers.1.attn"]
    assert (method.harm_HR[:, 2] == 0).all() and (method.harm_HR[:, :2] != 0).all()

    class Moved(torch.nn.Module):
        def attend(self, q, k, v, *, scale, causal=True, padding_BS=None, layer=0):
            H, share = q.shape[1], q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
            weight = (q @ k.mT * scale).masked_fill(~torch.ones(40, 40, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
            drop = ~method.options[0].mask(40, 40)
            out, odds = weight @ v, weight / (1 - weight).clamp_min(1e-6) * drop
            change = odds.sum(-1, keepdim=True) * out - odds @ v
            return out + self.size * change * (torch.arange(H) == 1)[:, None, None]

    moved, losses = Moved(), []
    labels = model(ids).logits.argmax(-1).flatten()
    for moved.size in (1e-3, -1e-3):
        with replaced(model, {"layers.1.attn": moved}), torch.no_grad():
            losses.append(float(torch.nn.functional.cross_entropy(model(ids).logits.double().flatten(0, 1), labels, reduction="sum")))
    slope = (losses[0] - losses[1]) / 2e-3
    assert float(method.harm_HR[1, 0]) * 2 * 40 * 41 / 2 == pytest.approx(slope, rel=0.05)


def test_moa_without_signs_adds_sizes():
    q, k, v = qkv(12, batch=2)
    lot = torch.randn(q.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    one, drop = influence(q, k, v, lot, 6**-0.5), ~parse("window(3)").mask(12, 12)
    for signed, pairs in ((True, one), (False, one.abs())):
        method = MoA(1.0, 0, signed, "full(); window(3)", 8, 8).double()
        method.observe(q, k, v, lot)
        method.finish()
        torch.testing.assert_close(method.harm_HR[:, 1], (pairs * drop).sum((0, 2, 3)) / (2 * 78))
