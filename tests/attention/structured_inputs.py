"""Inputs and definitions that the tests of structured attention share."""

import torch


def qkv(T, S=None, batch=2, seed=0, heads=4, width=6, grad=False):
    draw = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, T, width), (batch, 2, S or T, width), (batch, 2, S or T, width))
    return [torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=grad) for shape in shapes]


def dense(q, k, v, causal=True):
    S, T = k.shape[2], q.shape[2]
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T) if causal else None
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def each_query(q, k, v, row):
    """row(q [D], k [S, D], v [S, D], position, head) of every query."""
    B, H, T, _ = q.shape
    share, S = H // k.shape[1], k.shape[2]
    rows = [row(q[b, h, t], k[b, h // share], v[b, h // share], S - T + t, h) for b in range(B) for h in range(H) for t in range(T)]
    return torch.stack(rows).view(q.shape)


def softmax_over(keys_of):
    def row(q, k, v, at, head):
        keys = keys_of(at, head)
        return (k[keys] @ q / len(q) ** 0.5).softmax(0) @ v[keys]

    return row
