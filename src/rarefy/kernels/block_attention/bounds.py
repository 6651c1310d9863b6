"""Decoding: the largest logit that each page can give, and the pages with the largest.

sum_d max(q_d m_d, q_d M_d) with m, M the channel-wise minimum and maximum of a page's keys (QUEST, Tang et al. 2024, arXiv 2406.10774,
sec. 3.3) is one product of [max(q, 0) | min(q, 0)] with [M | m], which the caller may keep from step to step (`page_meta`).
Shape letters as in __init__.py; E = 2 D, K = pages kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import BadInput
from .. import native
from .decode import available, bits

MANY = 2048
"""Pages from which on digits find the highest sooner than torch's topk does."""


def page_meta(k_BGSD: Tensor, block: int, half: bool = False) -> Tensor:
    """[B, G, N, 2 D]: channel-wise maximum, then minimum, of the keys of each page; the last page may be short.

    A page's row depends on its keys alone: a cache that grew needs `page_meta` of its last page's keys only.

    Args:
        half: as bfloat16, maxima rounded up and minima down: a bound stays a bound, and half the bytes are read.
    """
    whole = k_BGSD.shape[2] // block * block
    parts = [x for x in (k_BGSD[:, :, :whole].unflatten(2, (-1, block)), k_BGSD[:, :, whole:].unsqueeze(2)) if x.shape[2] and x.shape[3]]
    if not parts:
        return k_BGSD.new_empty(*k_BGSD.shape[:2], 0, 2 * k_BGSD.shape[3], dtype=torch.bfloat16 if half else None)
    high, low = torch.cat([x.amax(3) for x in parts], 2), torch.cat([x.amin(3) for x in parts], 2)
    return torch.cat([_above(high), -_above(-low)] if half else [high, low], -1)


def _above(x: Tensor) -> Tensor:
    """The least bfloat16 that is not below x."""
    near = x.to(torch.bfloat16)
    return torch.where(near.to(x.dtype) < x, near.nextafter(torch.full_like(near, torch.inf)), near)


def page_scores(q_BH1D: Tensor, k_BGSD: Tensor, block: int, meta_BGNE: Tensor | None = None) -> Tensor:
    """[B, H, 1, N] for one query a head, float32 (float64 of float64).

    Args:
        meta_BGNE: `page_meta` of the keys, if the caller keeps it.

    Raises:
        BadInput: metadata of another shape.
    """
    B, H, _, D = q_BH1D.shape
    G, N = k_BGSD.shape[1], -(-k_BGSD.shape[2] // block)
    meta = page_meta(k_BGSD.detach(), block) if meta_BGNE is None else meta_BGNE
    if meta.shape != (B, G, N, 2 * D):
        raise BadInput(f"page metadata has shape {list(meta.shape)}; {k_BGSD.shape[2]} keys in pages of {block} need {[B, G, N, 2 * D]}")
    q = q_BH1D.detach().reshape(B * G, H // G, D)
    if available(meta) and q.device.type == "cpu":
        from .loops import bounds

        out = torch.empty(B * G, H // G, N)
        native.spread(bounds, B * G, q.float().contiguous().numpy(), bits(meta.contiguous()).reshape(B * G, N, 2 * D), out.numpy(), least=1)
    else:
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.cat([q.clamp_min(0), q.clamp_max(0)], -1).to(wide) @ meta.reshape(B * G, N, 2 * D).to(wide).mT
    return out.view(B, H, 1, N)


def highest(score: Tensor, keep: Tensor) -> Tensor:
    """[..., N] bool: the `keep` [..., 1] highest scores of each row, 1 .. N, of equal ones those with the lower index. Scores without NaN."""
    if not score.numel():
        return torch.zeros_like(score, dtype=torch.bool)
    if native.serves(score, dtypes=(torch.float32,)):
        from .loops import highest as run

        N, out = score.shape[-1], torch.empty(score.shape, dtype=torch.bool)
        rows = score.detach().contiguous().view(torch.int32).reshape(-1, N)
        native.spread(run, len(rows), rows.numpy(), keep.expand(*score.shape[:-1], 1).flatten().long().numpy(), out.view(-1, N).numpy(), least=16)
        return out
    order = score.topk(int(keep.max()), dim=-1).values
    least = order.gather(-1, (keep - 1).expand(*score.shape[:-1], 1))
    above, level = score > least, score == least
    return above | level & (level.cumsum(-1) <= keep - above.sum(-1, keepdim=True))


def top_pages(scores_BH1N: Tensor, keep: int) -> Tensor:
    """[B, H, 1, N] bool: the `keep` pages of highest score, of equals the first; all where there are no more. Scores without NaN."""
    N = scores_BH1N.shape[-1]
    if keep >= N or not scores_BH1N.numel():
        return torch.ones_like(scores_BH1N, dtype=torch.bool)
    if N >= MANY and native.serves(scores_BH1N, dtypes=(torch.float32,)):
        return highest(scores_BH1N, torch.tensor([keep]))
    least = scores_BH1N.topk(keep, -1, sorted=False).values.amin(-1, keepdim=True)
    if native.serves(scores_BH1N, dtypes=(torch.float32,)):
        from .loops import mark

        out = torch.empty(scores_BH1N.shape, dtype=torch.bool)
        native.spread(mark, out.numel() // N, native.array(scores_BH1N).reshape(-1, N), least.flatten().numpy(), keep, out.view(-1, N).numpy())
        return out
    above, level = scores_BH1N > least, scores_BH1N == least
    return above | level & (level.cumsum(-1) <= keep - above.sum(-1, keepdim=True))
