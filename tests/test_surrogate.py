"""Surrogate gradients against their defining integral: the gradient of an expectation, estimated with a kernel."""

import pytest
import torch

from rarefy.surrogate import jump_relu, step, straight_through

F, BANDWIDTH = 7, 0.3


def dense_grid(rows):
    """Pre-activations spread evenly over [-2, 2]: density 1/4, so that sums over rows are integrals."""
    return torch.linspace(-2, 2, rows, dtype=torch.float64)[:, None].expand(rows, F).clone()


def thetas():
    return torch.linspace(0.2, 1.4, F, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)])
def test_forward_is_the_exact_step(lead):
    pre, theta = torch.randn(*lead, F), torch.rand(F)
    assert torch.equal(jump_relu(pre, theta, 0.1), torch.where(pre > theta, pre, torch.zeros(())))
    assert torch.equal(step(pre, theta, 0.1), (pre > theta).float())


def test_at_the_threshold_nothing_passes():
    theta = torch.rand(F)
    assert not jump_relu(theta, theta, 0.1).any() and not step(theta, theta, 0.1).any()


def test_theta_gradient_of_jump_relu_is_that_of_the_expectation():
    # E[z 1(z > t)] over the density 1/4 is (4 - t^2) / 8, its derivative -t / 4
    rows, theta = 400_001, thetas()
    (jump_relu(dense_grid(rows), theta, BANDWIDTH).sum() / rows).backward()
    assert torch.allclose(theta.grad, -theta.detach() / 4, rtol=1e-3)


def test_theta_gradient_of_step_is_that_of_the_expectation():
    # E[1(z > t)] is (2 - t) / 4, its derivative -1 / 4
    rows, theta = 400_001, thetas()
    (step(dense_grid(rows), theta, BANDWIDTH).sum() / rows).backward()
    assert torch.allclose(theta.grad, torch.full((F,), -0.25, dtype=torch.float64), rtol=1e-3)


@pytest.mark.parametrize("function", [jump_relu, step])
@pytest.mark.parametrize("lead", [(9,), (3, 3), ()])
def test_leading_dims_add_up(function, lead):
    pre = torch.rand(*lead, F, dtype=torch.float64)
    lot = torch.randn(*lead, F, dtype=torch.float64)
    one, rows = thetas(), thetas()
    (function(pre, one, BANDWIDTH) * lot).sum().backward()
    for row, weight in zip(pre.reshape(-1, F), lot.reshape(-1, F), strict=True):
        (function(row, rows, BANDWIDTH) * weight).sum().backward()
    assert one.grad.shape == (F,)
    assert torch.allclose(one.grad, rows.grad)


def test_pre_gradient():
    pre = torch.tensor([0.1, 0.49, 0.51, 2.0], requires_grad=True)
    theta = torch.full((4,), 0.5)
    jump_relu(pre, theta, 0.1).sum().backward()
    assert pre.grad.tolist() == [0.0, 0.0, 1.0, 1.0]
    pre.grad = None
    out = step(pre, theta.requires_grad_(), 0.1).sum()
    assert torch.autograd.grad(out, pre, allow_unused=True)[0] is None or not pre.grad


def test_kernel_has_the_stated_width():
    theta = torch.full((4,), 1.0, requires_grad=True)
    pre = torch.tensor([1 - 0.051, 1 - 0.049, 1 + 0.049, 1 + 0.051])
    step(pre, theta, 0.1).sum().backward()
    assert theta.grad.tolist() == pytest.approx([0.0, -10.0, -10.0, 0.0])


def test_straight_through():
    hard, soft = torch.tensor([1.0, 0.0], requires_grad=True), torch.tensor([0.7, 0.4], requires_grad=True)
    out = straight_through(hard, soft)
    assert torch.allclose(out, hard)
    (out * torch.tensor([2.0, 3.0])).sum().backward()
    assert soft.grad.tolist() == [2.0, 3.0] and hard.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_kept(dtype):
    pre, theta = torch.randn(4, F, dtype=dtype, requires_grad=True), torch.rand(F, dtype=dtype, requires_grad=True)
    for function in (jump_relu, step):
        out = function(pre, theta, 0.5)
        assert out.dtype == dtype
        assert torch.autograd.grad(out.sum(), theta)[0].dtype == dtype
