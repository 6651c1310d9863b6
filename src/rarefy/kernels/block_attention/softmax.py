"""Masked softmax with its log-sum-exp in plain torch, and the exact union of attention over disjoint sets of keys.

Shape letters: B = batch, H = heads, T = queries, K = keys of a query, D = head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import BadInput


def attend(q_TD: Tensor, k_KD: Tensor, v_KD: Tensor, keep_TK: Tensor, scale: float, bias_TK: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(out [..., T, D], lse [..., T]) of softmax(q k^T scale + bias over kept pairs) v; a query without keys gives 0 and -inf.

    Leading dimensions broadcast. Half precision is multiplied as it is and summed in float32. Gradients are finite also where
    no key is kept: the maximum is a constant to them and the logarithm is taken of sums above 0 only.
    """
    score = (q_TD @ k_KD.mT).to(torch.promote_types(q_TD.dtype, torch.float32)) * scale
    if bias_TK is not None:
        score = score + bias_TK
        keep_TK = keep_TK & (score > -torch.inf)
    score = score.masked_fill(~keep_TK, -torch.inf)
    top = score.detach().amax(-1, keepdim=True)
    top = torch.where(top > -torch.inf, top, 0.0)
    weight = torch.where(keep_TK, score, top).sub(top).exp() * keep_TK
    total = weight.sum(-1, keepdim=True)
    some = total > 0
    total = torch.where(some, total, 1.0)
    out = (weight / total).to(v_KD.dtype) @ v_KD
    return out, torch.where(some, top + total.log(), -torch.inf)[..., 0]


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) of attention over the union of disjoint sets of keys, from (out, lse) over each; exact, and associative.

    Args:
        outs: [..., T, D] each.
        lses: [..., T] each, -inf where a query had no key.

    Raises:
        BadInput: nothing to merge, or as many outs as lses are not there.
    """
    if not outs or len(outs) != len(lses):
        raise BadInput(f"{len(outs)} outputs and {len(lses)} log-sum-exps were given; each output needs its own")
    lse = torch.stack(list(lses))
    top = lse.detach().amax(0)
    top = torch.where(top > -torch.inf, top, 0.0)
    weight = torch.where(lse > -torch.inf, lse, top).sub(top).exp() * (lse > -torch.inf)
    total = weight.sum(0)
    some = total > 0
    total = torch.where(some, total, 1.0)
    share = weight / total
    out = sum((w[..., None] * o for w, o in zip(share[1:], outs[1:], strict=True)), share[0][..., None] * outs[0])
    return out.to(outs[0].dtype), torch.where(some, top + total.log(), -torch.inf)
