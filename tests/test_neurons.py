"""Input-sparse linear layers against naive formulas, known quantiles, and the layers they replace."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from rarefy.errors import BadInput, Unsupported
from rarefy.neurons import histogram
from rarefy.neurons.random import RandomNeurons
from rarefy.neurons.teal import Teal
from rarefy.neurons.wina import Wina

MAKERS = {
    "random": (RandomNeurons, {}), "teal": (Teal, {}), "wina": (Wina, {}), "wina-threshold": (Wina, {"mode": "threshold"}),
}


def linear(d_in=63, d_out=5, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(d_in, d_out)


def conv1d(d_in=63, d_out=5, seed=0):
    torch.manual_seed(seed)
    layer = Conv1D(d_out, d_in)
    nn.init.normal_(layer.weight)
    return layer


def rows(n=40, d=63, seed=1):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.1, 3, d)


def fitted(key, module, x=None, **arguments):
    cls, extra = MAKERS[key]
    method = cls.for_module(module, **extra, **arguments)
    if method.fitted == "calibrated":
        method.observe(rows(400, method.d_in) if x is None else x)
        method.finish()
    return method.eval()


@pytest.mark.parametrize("make", [linear, conv1d])
@pytest.mark.parametrize("key", MAKERS)
@pytest.mark.parametrize("d_in,d_out", [(1, 1), (63, 111), (111, 63)])
def test_laws(key, make, d_in, d_out):
    module, x = make(d_in, d_out), rows(12, d_in)
    before = module.weight.detach().clone()
    masks = []
    for budget in (0.1, 0.5, 0.9, 1.0):
        method = fitted(key, module, budget=budget)
        for part in (x, x[:1], x[:3], x[None, :4], x[0]):
            got = method(part)
            assert got.shape == (*part.shape[:-1], d_out)
            torch.testing.assert_close(got, method.reference(part), atol=3e-5, rtol=1e-5)
            naive = torch.where(method.select(part).mask, part, torch.zeros(())) @ method.columns_IO + method.bias_O
            torch.testing.assert_close(got, naive, atol=3e-5, rtol=1e-5)
        assert torch.equal(method.select(x).mask[2:3], method.select(x[2:3]).mask)
        masks.append(method.select(x).mask)
        clone = MAKERS[key][0](**method.arguments)
        clone.load_state_dict(method.state_dict())
        assert torch.equal(clone(x), method(x)) and torch.equal(clone(x[:1]), method(x[:1]))
        assert method(x[:0]).shape == (0, d_out)
    assert all((low <= high).all() for low, high in itertools.pairwise(masks))
    assert masks[-1].all()
    torch.testing.assert_close(method(x), module(x), atol=3e-5, rtol=1e-5)
    assert torch.equal(before, module.weight)


@pytest.mark.parametrize("budget", [0.02, 0.25, 0.5, 0.9])
def test_teal_threshold_is_the_quantile(budget):
    x = rows(500)
    method = fitted("teal", linear(), x, budget=budget)
    exact = x.abs().flatten().double().quantile(1 - budget)
    assert float(method.tau) == pytest.approx(float(exact), rel=1 / 256)
    assert method.select(x).density == pytest.approx(budget, abs=2e-3)
    assert method.select(rows(2000, seed=9)).density == pytest.approx(budget, abs=0.01)
    assert torch.equal(method.select(x).mask, x.abs().double() > method.tau)


@pytest.mark.parametrize("budget", [0.1, 0.5])
def test_wina_is_top_k_of_its_score(budget):
    module, x = linear(), rows(20)
    method = fitted("wina", module, budget=budget)
    score = x.abs() * module.weight.detach().pow(2).sum(0).sqrt()
    keep = round(budget * 63)
    for b in range(20):
        wanted = sorted(range(63), key=lambda i, b=b: -float(score[b, i]))[:keep]
        assert set(method.select(x).mask[b].nonzero().flatten().tolist()) == set(wanted)


def test_wina_threshold_meets_the_budget():
    x = rows(500)
    method = fitted("wina-threshold", linear(), x, budget=0.3)
    assert method.select(x).density == pytest.approx(0.3, abs=2e-3)


def test_wina_errs_less_than_random():
    module, x = linear(111, 63), rows(200, 111)
    error = {key: (fitted(key, module, x, budget=0.4)(x) - module(x)).pow(2).mean() for key in MAKERS}
    assert error["wina"] < error["random"] / 2 and error["teal"] < error["random"] / 2


@pytest.mark.parametrize("key", ["teal", "wina"])
def test_permuting_inputs_permutes_the_selection(key):
    module, x = linear(), rows(100)
    order = torch.randperm(63)
    moved = linear()
    moved.weight.data = module.weight.data[:, order]
    a, b = fitted(key, module, x, budget=0.4), fitted(key, moved, x[:, order], budget=0.4)
    assert torch.equal(a.select(x).mask[:, order], b.select(x[:, order]).mask)


@pytest.mark.parametrize("key", ["teal", "wina-threshold"])
def test_calibration(key):
    cls, extra = MAKERS[key]
    module, x = linear(), rows(300)
    whole, split = cls.for_module(module, budget=0.3, **extra), cls.for_module(module, budget=0.3, **extra)
    with pytest.raises(BadInput, match="not calibrated"):
        whole(x)
    with pytest.raises(BadInput, match="no calibration rows"):
        whole.finish()
    whole.observe(x)
    for part in (x[:0], x[200:], x[:1], x[1:200]):
        split.observe(part)
    before = split.count_Q.clone()
    bad = x.clone()
    bad[3, 4] = float("inf")
    for call in (split.observe, whole.observe):
        with pytest.raises(BadInput, match=r"inf at \[3, 4\]"):
            call(bad)
    assert torch.equal(before, split.count_Q)
    whole.finish()
    split.finish()
    assert torch.equal(whole.tau, split.tau)
    split.finish()
    assert torch.equal(whole.tau, split.tau)
    with pytest.raises(BadInput, match=r"input of neurons.*\[3, 4\]"):
        whole(bad)
    with pytest.raises(BadInput, match=r"\[\.\.\., 63\]"):
        whole(x[:, :4])
    loaded = cls(**whole.arguments)
    loaded.load_state_dict(whole.state_dict())
    loaded.finish()
    assert torch.equal(loaded.tau, whole.tau)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("key", MAKERS)
def test_dtypes(key, dtype):
    module = linear().to(dtype)
    method = fitted(key, module, rows(200).to(dtype), budget=0.5)
    for n in (1, 20):
        x = rows(n).to(dtype)
        y = method(x)
        assert y.dtype == dtype
        masked = x.double() * method.select(x).mask
        torch.testing.assert_close(y.double(), masked @ module.weight.double().t() + module.bias.double(), atol=0.1, rtol=0.02)
    assert method.select(rows(200).to(dtype)).density == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("key", MAKERS)
def test_gradients(key):
    method = fitted(key, linear(9, 4).double(), rows(100, 9).double(), budget=0.3)
    for n in (1, 12):
        x = rows(n, 9).double().requires_grad_()
        assert torch.autograd.gradcheck(method, (x,))
        method(x).sum().backward()
        assert (x.grad[~method.select(x).mask] == 0).all()


@pytest.mark.parametrize("key", MAKERS)
def test_nothing_is_changed(key):
    method, x = fitted(key, linear(), budget=0.3), rows(3)
    before, state, generator = x.clone(), {k: v.clone() for k, v in method.state_dict().items()}, torch.get_rng_state()
    method(x)
    method(x[:1])
    method.select(x)
    assert torch.equal(before, x) and torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in method.state_dict().items())


def test_cost():
    method = fitted("teal", linear(64, 32), budget=0.25)
    assert method.cost().flops == 2 * 16 * 32 and method.cost().bytes == 16 * 32 * 4
    assert method.cost(1.0) == method.dense_cost()
    assert fitted("wina", linear(64, 32), budget=0.25).cost().bytes == method.cost().bytes + 64 * 4
    from rarefy.cost import counted_flops

    module = linear(64, 32)
    assert method.dense_cost().flops == counted_flops(lambda: module(rows(1, 64)))


@pytest.mark.parametrize("arguments,words", [
    ({"budget": 0.0}, r"budget=0.0.*\(0, 1\]"), ({"budget": 2}, "budget=2"), ({"d_in": 0}, "d_in=0"), ({"d_out": 1.5}, "d_out=1.5"),
])
@pytest.mark.parametrize("cls", [RandomNeurons, Teal, Wina])
def test_bad_arguments(cls, arguments, words):
    with pytest.raises(BadInput, match=words):
        cls(**{"d_in": 8, "d_out": 4, **arguments})


def test_refusals():
    with pytest.raises(BadInput, match="mode='top'"):
        Wina(8, 4, mode="top")
    with pytest.raises(BadInput, match="seed="):
        RandomNeurons(8, 4, seed=1.5)
    with pytest.raises(Unsupported, match="topk.*not calibrated"):
        Wina(8, 4).observe(rows(2, 8))
    with pytest.raises(Unsupported, match="Embedding"):
        Teal.for_module(nn.Embedding(3, 4))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=200), st.floats(0, 1), st.floats(0, 1))
def test_histogram_quantile(values, q, p):
    count = torch.zeros(histogram.BINS, dtype=torch.int64)
    histogram.add_to(count, torch.tensor(values))
    got, ordered = histogram.quantile(count, q), sorted(values)
    rank = q * len(values)
    low, high = ordered[max(0, int(rank) - 1)], ordered[min(len(values) - 1, int(rank) + 1)]
    assert low * (1 - 2**-7) - 1e-37 <= got <= high * (1 + 2**-7) + 1e-37
    assert histogram.quantile(count, min(p, q)) <= histogram.quantile(count, max(p, q))


def test_histogram_takes_any_float():
    count = torch.zeros(histogram.BINS, dtype=torch.int64)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        histogram.add_to(count, torch.tensor([0.0, torch.finfo(dtype).tiny, 1.0, torch.finfo(dtype).max], dtype=dtype))
    assert int(count.sum()) == 16
    assert histogram.quantile(count, 1.0) == pytest.approx(torch.finfo(torch.float32).max, rel=1e-2)
