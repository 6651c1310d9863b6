"""gather_linear against its definition and against plain loops, over sizes, types, layouts and gradients."""

from __future__ import annotations

import pytest
import torch

from rarefy import compiled
from rarefy.errors import BadInput
from rarefy.kernels import gather_linear as package
from rarefy.kernels.gather_linear import gather_linear, gather_linear_reference, gathers

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def problem(rows, inputs, outputs, density, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=g).to(dtype)
    keep = torch.rand(rows, inputs, generator=g) < density
    weight = (torch.randn(inputs, outputs, generator=g) / inputs**0.5).to(dtype)
    return x, keep, weight, torch.randn(outputs, generator=g).to(dtype)


def by_loops(x, keep, weight, bias):
    out = torch.zeros(x.shape[0], weight.shape[1], dtype=torch.float64)
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            if keep[b, i]:
                out[b] += x[b, i].double() * weight[i].double()
    return out + (0 if bias is None else bias.double())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows,inputs,outputs", [(1, 1, 1), (1, 63, 111), (3, 111, 63), (1, 64, 4099), (20, 63, 5)])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_equals_loops(rows, inputs, outputs, density, dtype):
    x, keep, weight, bias = problem(rows, inputs, outputs, density, dtype)
    for b in (bias, None):
        want = by_loops(x, keep, weight, b)
        for product in (gather_linear, gather_linear_reference):
            got = product(x, keep, weight, b)
            assert got.dtype == dtype and got.shape == want.shape
            torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype] * 4, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("in_place", [True, False])
def test_unkept_values_and_weights_are_never_read(monkeypatch, in_place):
    if not in_place:
        monkeypatch.setattr(package, "available", lambda *a: False)
    x, keep, weight, bias = problem(1, 111, 63, 0.3)
    want = gather_linear(x, keep, weight, bias)
    x[~keep], weight[~keep[0]] = float("nan"), float("nan")
    assert torch.equal(gather_linear(x, keep, weight, bias), want)
    assert torch.isfinite(gather_linear_reference(x, keep, weight.nan_to_num(), bias)).all()


def test_layouts():
    x, keep, weight, bias = problem(2, 40, 30, 0.3)
    want = by_loops(x, keep, weight, bias)
    strided = torch.zeros(2, 80)[:, ::2]
    strided.copy_(x)
    columns = weight.t().contiguous().t()
    wide = torch.zeros(40, 60)
    wide[:, :30] = weight
    cases = [(strided, weight, bias), (x, columns, bias), (x, wide[:, :30], bias), (x, weight, bias.repeat_interleave(2)[::2])]
    for xs, w, b in cases:
        torch.testing.assert_close(gather_linear(xs, keep, w, b).double(), want, atol=1e-4, rtol=1e-5)
    one = x[:1].expand(2, -1)
    torch.testing.assert_close(
        gather_linear(one, keep[:1].expand(2, -1), weight, bias).double(),
        by_loops(one, keep[:1].expand(2, -1), weight, bias), atol=1e-4, rtol=1e-5,
    )


@pytest.mark.parametrize("rows", [1, 3, 12])
def test_gradients(rows):
    x, keep, weight, bias = problem(rows, 9, 7, 0.2, torch.float64)
    for t in (x, weight, bias):
        t.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, w, b: gather_linear(a, keep, w, b), (x, weight, bias))
    gather_linear(x, keep, weight, bias).sum().backward()
    assert (x.grad[~keep] == 0).all()


def test_inputs_unchanged():
    x, keep, weight, bias = problem(1, 50, 40, 0.3)
    before = [t.clone() for t in (x, keep, weight, bias)]
    gather_linear(x, keep, weight, bias)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, keep, weight, bias), strict=True))


@pytest.mark.skipif(not compiled.available(), reason="numba is not installed")
def test_dispatch_rule(monkeypatch):
    assert gathers(1, 10, 100) and not gathers(1, 100, 100) and not gathers(100, 100, 100) and not gathers(0, 0, 100)
    calls = []
    real = package.sparse_row
    monkeypatch.setattr(package, "sparse_row", lambda *a: calls.append(1) or real(*a))
    x, keep, weight, bias = problem(1, 50, 40, 0.3)
    gather_linear(x, keep, weight, bias)
    assert calls == [1]
    gather_linear(x, torch.ones_like(keep), weight, bias)
    gather_linear(x, keep, weight.requires_grad_(), bias)
    assert calls == [1]
    with torch.no_grad():
        gather_linear(x, keep, weight, bias)
    assert calls == [1, 1]
    with torch.inference_mode():
        gather_linear(x, keep, weight, bias)
    assert calls == [1, 1, 1]


def test_shapes_that_do_not_fit():
    x, keep, weight, bias = problem(1, 50, 40, 0.3)
    with pytest.raises(BadInput, match="do not fit"):
        gather_linear(x, keep[:, :3], weight, bias)
    with pytest.raises(BadInput, match="do not fit"):
        gather_linear(x, keep, weight.t(), bias)
