"""A decoding step of a key-value cache as one call: the new token is taken in, entries are chosen, attended to and dropped.

A step over few entries takes some dozen microseconds, as much as a handful of calls of torch: written as a chain of them it costs as much as
dense attention over ten times the entries. Stores have room behind what they hold; the caller grows them and counts.

Shape letters: B = batch, H = query heads, G = key heads (H is a multiple of G), D = head width, M = room for entries, S = room for tokens,
N = room for pages, E = 2 D.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ...errors import BadInput
from .. import native
from .reference import evicting_reference, pages_reference

__all__ = ["chunks_step", "evicting_reference", "evicting_step", "pages_reference", "pages_step"]


def evicting_step(
    q_BH1D: Tensor, new_k_BG1D: Tensor, new_v_BG1D: Tensor, k_BGMD: Tensor, v_BGMD: Tensor, at_BGM: Tensor, sums_BGM: Tensor | None, *,
    held: int, place: int, first: int, recent: int, drop: bool, scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, 1, D], lse [B, H, 1]) over `held` entries and the new one, which is written behind them.

    With `drop` each head then loses the entry of lowest worth, never the new one: it changes places with the last, and the caller counts
    one entry fewer. What an entry is worth is its sum, or its place where there are no sums, and without bound at places below `first` and
    above `recent`; of equals the earliest goes.

    Args:
        k_BGMD, v_BGMD: room for more than `held` entries.
        at_BGM: int32 places of the entries; the new one's is `place`.
        sums_BGM: float32 probability that each entry got so far; what it gets now is added.

    Raises:
        BadInput: shapes that do not fit, no room for the new entry.
    """
    _check(q_BH1D, new_k_BG1D, new_v_BG1D, k_BGMD, v_BGMD, held)
    others = [at_BGM, *([] if sums_BGM is None else [sums_BGM])]
    if any(x.shape != k_BGMD.shape[:3] for x in others) or at_BGM.dtype != torch.int32 or others[-1].dtype not in (torch.int32, torch.float32):
        raise BadInput(f"places (int32) and sums (float32) must be {list(k_BGMD.shape[:3])}, not {[(x.dtype, list(x.shape)) for x in others]}")
    if not _compiled((q_BH1D, new_k_BG1D, new_v_BG1D), (k_BGMD, v_BGMD, *others)):
        return evicting_reference(
            q_BH1D, new_k_BG1D, new_v_BG1D, k_BGMD, v_BGMD, at_BGM, sums_BGM,
            held=held, place=place, first=first, recent=recent, drop=drop, scale=scale)
    from .cpu import evicting

    stores = (k_BGMD, v_BGMD, at_BGM, k_BGMD.new_empty(*k_BGMD.shape[:2], 0) if sums_BGM is None else sums_BGM)
    return _run(evicting, q_BH1D, new_k_BG1D, new_v_BG1D, stores, (held, place, first, recent, int(drop)), scale)


def pages_step(
    q_BH1D: Tensor, new_k_BG1D: Tensor, new_v_BG1D: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, meta_BGNE: Tensor, *, held: int, page: int,
    keep: int, scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, 1, D], lse [B, H, 1]) over the `keep` pages of highest bound of each query head, the last page among them.

    The new key and value are written behind `held` tokens and taken into the bound of their page (see block_attention.page_meta); of equal
    bounds the first pages are read.

    Raises:
        BadInput: shapes that do not fit, no room for the new token, more pages asked for than there are.
    """
    _check(q_BH1D, new_k_BG1D, new_v_BG1D, k_BGSD, v_BGSD, held)
    N = held // page + 1
    if meta_BGNE.shape[:2] != k_BGSD.shape[:2] or meta_BGNE.shape[2] < N or meta_BGNE.shape[3] != 2 * k_BGSD.shape[3] or not 1 <= keep <= N:
        raise BadInput(f"bounds {list(meta_BGNE.shape)} and keep={keep} do not fit {held + 1} tokens {list(k_BGSD.shape)} in pages of {page}")
    if not _compiled((q_BH1D, new_k_BG1D, new_v_BG1D), (k_BGSD, v_BGSD, meta_BGNE)):
        return pages_reference(q_BH1D, new_k_BG1D, new_v_BG1D, k_BGSD, v_BGSD, meta_BGNE, held=held, page=page, keep=keep, scale=scale)
    from .cpu import pages

    return _run(pages, q_BH1D, new_k_BG1D, new_v_BG1D, (k_BGSD, v_BGSD, meta_BGNE), (held, page, keep), scale)


def chunks_step(
    q_BH1D: Tensor, new_k_BG1D: Tensor, new_v_BG1D: Tensor, k_BGMD: Tensor, v_BGMD: Tensor, at_BGM: Tensor, landmark_BGND: Tensor,
    far_BGN: Tensor, factor_B1SF: Tensor, basis_BFE: Tensor, values_BGSD: Tensor, rotary: tuple[Tensor, Tensor] | None, *, held: int, place: int,
    keep: int, chunk: int, scale: float,
) -> tuple[Tensor, Tensor] | None:
    """(out [B, H, 1, D], lse [B, H, 1]) over `held` entries, the new one written behind them, and the `keep` chunks of each key head whose
    landmarks have most probability; None where compiled loops do not serve, with nothing written.

    Key s of a chunk is factor[s] times the head's columns of `basis` (E = G D here, F the rank), turned by cos[s] and sin[s]; its value is values[s].

    Args:
        far_BGN: bool, the chunks that may be chosen, `keep` at least in each head.
        rotary: (cos, sin) [B, S, U] of the tokens in chunks, or None.

    Raises:
        BadInput: shapes that do not fit, no room for the new entry.
    """
    _check(q_BH1D, new_k_BG1D, new_v_BG1D, k_BGMD, v_BGMD, held)
    B, G, _, D = k_BGMD.shape
    cos, sin = rotary or (k_BGMD.new_empty(B, values_BGSD.shape[2], 0),) * 2
    fits = landmark_BGND.shape == (*far_BGN.shape, D) and factor_B1SF.shape[3] == basis_BFE.shape[1] and basis_BFE.shape[2] == G * D
    if not fits or values_BGSD.shape[2] < far_BGN.shape[2] * chunk or cos.shape != sin.shape or cos.shape[1] < far_BGN.shape[2] * chunk:
        raise BadInput(f"landmarks {list(landmark_BGND.shape)}, factors {list(factor_B1SF.shape)}, basis {list(basis_BFE.shape)} and values "
                       f"{list(values_BGSD.shape)} do not fit {far_BGN.shape[2]} chunks of {chunk}")
    numbers = (k_BGMD, v_BGMD, landmark_BGND, factor_B1SF, basis_BFE, values_BGSD, cos, sin)
    if not _compiled((q_BH1D, new_k_BG1D, new_v_BG1D), (*numbers, at_BGM)) or not far_BGN.is_contiguous():
        return None
    from .chunks import chunks

    stores = (k_BGMD, v_BGMD, at_BGM, landmark_BGND, far_BGN, *numbers[3:])
    return _run(chunks, q_BH1D, new_k_BG1D, new_v_BG1D, stores, (held, place, keep, chunk), scale)


def _check(q: Tensor, new_k: Tensor, new_v: Tensor, k: Tensor, v: Tensor, held: int) -> None:
    B, G, room, D = k.shape
    if k.shape != v.shape or q.shape[0] != B or q.shape[2:] != (1, D) or not G or q.shape[1] % G or not new_k.shape == new_v.shape == (B, G, 1, D):
        raise BadInput(f"query {list(q.shape)}, new key {list(new_k.shape)} and stores {list(k.shape)}, {list(v.shape)} do not fit one another")
    if not 0 <= held < room:
        raise BadInput(f"{held} entries are held in room for {room}: there must be room for one more")


def _compiled(new: tuple[Tensor, ...], stores: tuple[Tensor, ...]) -> bool:
    numbers = [x for x in stores if x.dtype != torch.int32]
    return native.serves(*new, *numbers, dtypes=(torch.float32,)) and all(x.is_contiguous() and x.device.type == "cpu" for x in stores)


def _run(
    kernel: Callable[..., object], q: Tensor, new_k: Tensor, new_v: Tensor, stores: tuple[Tensor, ...], sizes: tuple[int, ...], scale: float
) -> tuple[Tensor, Tensor]:
    B, H, _, D = q.shape
    new = [x.detach().contiguous().numpy() for x in (q, new_k, new_v)]
    out, lse = np.empty((B, H, D), np.float32), np.empty((B, H), np.float32)
    native.spread(
        kernel, B * new_k.shape[1], *new, *[x.numpy() for x in stores], sizes, np.float32(scale * math.log2(math.e)), out, lse, least=1)
    return torch.from_numpy(out)[:, :, None], torch.from_numpy(lse)[:, :, None]
