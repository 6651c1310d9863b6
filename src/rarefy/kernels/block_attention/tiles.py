"""Attention by tiles: which compiled path serves a call, and the gradient that both paths share.

Shape letters as in __init__.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import gpu, native
from .gather import gather_blocks
from .mask import BlockMask

BLOCKS = (16, 32, 64, 128)
"""Sizes of blocks and query blocks that the tiles are made for."""
WIDEST = 256
"""Largest head width."""
HALVES = (torch.float32, torch.bfloat16, torch.float16)
"""What the GPU path multiplies; the CPU path takes the first two."""


def path(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, block: int, query_block: int, scale: float) -> Any:
    """The module whose forward and backward serve this call, or None: usual blocks, a head width up to 256, a scale above 0."""
    if block not in BLOCKS or query_block not in BLOCKS or q_BHTD.shape[-1] > WIDEST or scale <= 0:
        return None
    if gpu.serves(q_BHTD, k_BGSD, v_BGSD, dtypes=HALVES):
        from . import triton

        return triton
    if native.serves(q_BHTD, k_BGSD, v_BGSD, dtypes=HALVES[:2]):
        from . import cpu

        return cpu
    return None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, module, mask, scale, causal):  # type: ignore[no-untyped-def]
        out, lse = module.forward(q, k, v, mask, scale, causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.module, ctx.how = module, (mask, scale, causal)
        return out, lse

    @staticmethod
    def backward(ctx, grad, grad_lse):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():                         # to be differentiated again: the same steps, as torch knows them
            return *_again(ctx.saved_tensors[:3], (grad, grad_lse), *ctx.how), None, None, None, None
        return *ctx.module.backward(grad, grad_lse, *ctx.saved_tensors, *ctx.how), None, None, None, None


def _again(inputs: Sequence[Tensor], grads: Sequence[Tensor], mask: BlockMask, scale: float, causal: bool) -> list[Tensor | None]:
    """Gradients of q, k and v with a graph of their own."""
    q, k, v = inputs
    given = {"block": mask.block, "query_block": mask.query_block, "scale": scale, "causal": causal, "return_lse": True}
    found = iter(torch.autograd.grad(
        gather_blocks(q, k, v, mask, **given), [x for x in inputs if x.requires_grad], grads, create_graph=True))
    return [next(found) if x.requires_grad else None for x in inputs]


def attend(module: Any, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask: BlockMask, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """(out, lse) by the module that `path` gave, differentiable in q, k and v; twice by plain torch."""
    if torch.is_grad_enabled() and (q_BHTD.requires_grad or k_BGSD.requires_grad or v_BGSD.requires_grad):
        return _Attention.apply(q_BHTD, k_BGSD, v_BGSD, module, mask, scale, causal)  # type: ignore[return-value]
    return module.forward(q_BHTD, k_BGSD, v_BGSD, mask, scale, causal)
