"""Queries, keys and values for tests of trained attention, and gradients along a fixed direction."""

import torch

SIZES = {"heads": 4, "key_heads": 2, "d_head": 6}


def qkv(T, S=None, batch=2, heads=4, key_heads=2, seed=0, grad=False):
    draw = torch.Generator().manual_seed(seed)
    S = S or T
    shapes = ((batch, heads, T, 6), (batch, key_heads, S, 6), (batch, key_heads, S, 6))
    return [torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=grad) for shape in shapes]


def gradients(out, leaves):
    lot = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    return torch.autograd.grad((out * lot).sum(), leaves)
