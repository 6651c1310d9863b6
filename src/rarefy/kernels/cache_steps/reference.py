"""Plain torch: everywhere, any dtype, nothing read back from the device. Shape letters as in __init__.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..block_attention.softmax import attend


def whole(q_BH1D: Tensor, k_BGMD: Tensor, v_BGMD: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(out [B, H, 1, D], lse [B, H, 1], probabilities [B, G, R, M] float32) of one query a head over all entries."""
    G = k_BGMD.shape[1]
    logit = (q_BH1D[:, :, 0].unflatten(1, (G, -1)) @ k_BGMD.mT).to(torch.promote_types(q_BH1D.dtype, torch.float32)) * scale
    lse = logit.logsumexp(-1, keepdim=True)
    p = (logit - lse).exp()
    return (p.to(v_BGMD.dtype) @ v_BGMD).flatten(1, 2)[:, :, None], lse.flatten(1, 2), p


def evicting_reference(
    q_BH1D: Tensor, new_k_BG1D: Tensor, new_v_BG1D: Tensor, k_BGMD: Tensor, v_BGMD: Tensor, at_BGM: Tensor, sums_BGM: Tensor | None, *,
    held: int, place: int, first: int, recent: int, drop: bool, scale: float,
) -> tuple[Tensor, Tensor]:
    """See evicting_step."""
    k_BGMD[:, :, held], v_BGMD[:, :, held], at_BGM[:, :, held] = new_k_BG1D[:, :, 0], new_v_BG1D[:, :, 0], place
    out, lse, p = whole(q_BH1D, k_BGMD[:, :, : held + 1], v_BGMD[:, :, : held + 1], scale)
    if sums_BGM is not None:
        sums_BGM[:, :, held] = 0.0
        sums_BGM[:, :, : held + 1] += p.sum(2)
    if drop:
        at = at_BGM[:, :, :held]
        worth = (at if sums_BGM is None else sums_BGM[:, :, :held]).float().masked_fill((at < first) | (at > recent), torch.inf)
        least = worth == worth.amin(-1, keepdim=True)
        victim = at.masked_fill(~least, torch.iinfo(at.dtype).max).argmin(-1)
        for x in (k_BGMD, v_BGMD, at_BGM, *([] if sums_BGM is None else [sums_BGM])):
            where = victim.view(*victim.shape, 1, *[1] * (x.ndim - 3)).expand(*victim.shape, 1, *x.shape[3:])
            last, gone = x[:, :, held : held + 1].clone(), x.gather(2, where)
            x.scatter_(2, where, last)
            x[:, :, held : held + 1] = gone
    return out, lse


def pages_reference(
    q_BH1D: Tensor, new_k_BG1D: Tensor, new_v_BG1D: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, meta_BGNE: Tensor, *, held: int, page: int,
    keep: int, scale: float,
) -> tuple[Tensor, Tensor]:
    """See pages_step."""
    N, G, D = held // page + 1, k_BGSD.shape[1], k_BGSD.shape[3]
    new = new_k_BG1D[:, :, 0]
    k_BGSD[:, :, held], v_BGSD[:, :, held] = new, new_v_BG1D[:, :, 0]
    row = meta_BGNE[:, :, N - 1]
    row.copy_(torch.cat([new, new] if held % page == 0 else [row[..., :D].maximum(new), row[..., D:].minimum(new)], -1))
    q = q_BH1D.unflatten(1, (G, -1))[..., 0, :]
    wide = torch.promote_types(q.dtype, torch.float32)
    bound = torch.cat([q.clamp_min(0), q.clamp_max(0)], -1).to(wide) @ meta_BGNE[:, :, :N].to(wide).mT          # [B, G, R, N]
    bound[..., -1] = torch.inf
    least = bound.topk(keep, -1).values[..., -1:]
    above, level = bound > least, bound == least
    chosen = above | level & (level.cumsum(-1) <= keep - above.sum(-1, keepdim=True))
    read = chosen.repeat_interleave(page, -1)[..., : held + 1]
    out, lse = attend(q[:, :, :, None], k_BGSD[:, :, None, : held + 1], v_BGSD[:, :, None, : held + 1], read[..., None, :], scale)
    return out.flatten(1, 2), lse.flatten(1, 2)
