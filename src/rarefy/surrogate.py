"""Gradients through a step. Each is an autograd.Function whose forward is the exact step and whose backward is a
stated stand-in.

Shape letters: F = latents, ... = rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre, theta, bandwidth):
        ctx.save_for_backward(pre, theta)
        ctx.bandwidth = bandwidth
        return pre * (pre > theta)

    @staticmethod
    def backward(ctx, grad):
        pre, theta = ctx.saved_tensors
        near = ((pre - theta).abs() < ctx.bandwidth / 2).to(grad)      # rectangle kernel K(u) = 1[|u| < 1/2]
        grad_theta = (-(theta / ctx.bandwidth) * near * grad).flatten(0, -2).sum(0) if pre.ndim > 1 else -(theta / ctx.bandwidth) * near * grad
        return grad * (pre > theta), grad_theta, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre, theta, bandwidth):
        ctx.save_for_backward(pre, theta)
        ctx.bandwidth = bandwidth
        return (pre > theta).to(pre)

    @staticmethod
    def backward(ctx, grad):
        pre, theta = ctx.saved_tensors
        near = ((pre - theta).abs() < ctx.bandwidth / 2).to(grad)
        grad_theta = -(1 / ctx.bandwidth) * near * grad
        return None, grad_theta.flatten(0, -2).sum(0) if pre.ndim > 1 else grad_theta, None


def jump_relu(pre: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """pre * 1[pre > theta], [..., F]; d/dtheta by a rectangle kernel (Rajamanoharan et al. 2024, arXiv 2407.14435, eq. 11)."""
    return _JumpReLU.apply(pre, theta, bandwidth)


def step(pre: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """1[pre > theta], [..., F]; d/dtheta by a rectangle kernel, d/dpre zero (same paper, eq. 12)."""
    return _Step.apply(pre, theta, bandwidth)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """`hard` forward, the gradient of `soft` backward (Bengio et al. 2013)."""
    return soft + (hard - soft).detach()
