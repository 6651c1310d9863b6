"""Causal attention to what is left of queries and keys, dropped or sorted; exact (SCFA, Pagliardini et al. 2023, arXiv 2306.01160).

Kept queries and keys stand close together, each with the position that it had and the bucket that it is in. A tile is visited where some
query of it is no earlier than some key and their buckets overlap, and inside it pairs are told apart one by one (sec. 3).

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width, L = places after packing, Q, N = blocks of them,
X = rows of sequences and heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import BadInput
from . import block_attention
from .mask import BlockMask

NOWHERE = -1


class Irregular:
    """Which places a packed sequence is made of and which of its tiles are visited; made once, used for any queries, keys and values.

    Args:
        bucket_BHT, bucket_BGS: whole numbers, -1 for what is dropped; pairs of one bucket see each other, causally. Query t stands at
            position S - T + t.
        block: places of a tile.

    Raises:
        BadInput: shapes that do not fit, buckets that are no whole numbers or below -1.
    """

    def __init__(self, bucket_BHT: Tensor, bucket_BGS: Tensor, *, block: int = 64) -> None:
        self._check(bucket_BHT, bucket_BGS)
        self.shape = (*bucket_BHT.shape, *bucket_BGS.shape[1:])
        B, H, T, G, S = self.shape
        self.block, self.share = block, H // G
        query, key = bucket_BHT.reshape(B * H, T), bucket_BGS.reshape(B * G, S)
        self.length = max(1, int((query >= 0).sum(1).max()), int((key >= 0).sum(1).max()))
        self.from_q, self.bucket_q = _packed(query, self.length)
        self.from_k, self.bucket_k = _packed(key, self.length)
        self.place_q = torch.where(self.bucket_q >= 0, self.from_q + S - T, NOWHERE)
        self.place_k = torch.where(self.bucket_k >= 0, self.from_k, NOWHERE)
        self.asked, surely = self._ranges()
        self.mask = self._finer(surely)

    @classmethod
    def of_kept(cls, keep_BHT: Tensor, keep_BGS: Tensor, *, block: int = 64) -> Irregular:
        """QK-sparse: those marked are kept, and see what is not later than they are."""
        for name, keep in (("queries", keep_BHT), ("keys", keep_BGS)):
            if keep.dtype != torch.bool:
                raise BadInput(f"the kept {name} must be marked by bool, not {keep.dtype}")
        return cls(keep_BHT.long() - 1, keep_BGS.long() - 1, block=block)

    @staticmethod
    def _check(query: Tensor, key: Tensor) -> None:
        if query.ndim != 3 or key.ndim != 3 or query.shape[0] != key.shape[0] or not key.shape[1] or query.shape[1] % key.shape[1]:
            raise BadInput(f"buckets of queries {list(query.shape)} do not fit those of keys {list(key.shape)}; give [B, H, T] and [B, G, S]")
        if not 1 <= query.shape[2] <= key.shape[2]:
            raise BadInput(f"{query.shape[2]} queries at the end of {key.shape[2]} keys: there must be at least one, and no more than keys")
        for name, one in (("queries", query), ("keys", key)):
            if one.is_floating_point() or one.dtype == torch.bool or int(one.min()) < -1:
                raise BadInput(f"buckets of {name} must be whole numbers from 0 on, -1 for what is dropped")

    def _allowed(self, i: Tensor, j: Tensor, head: Tensor) -> Tensor:
        group = head // self.share
        bucket = self.bucket_q[head, i]
        return (bucket == self.bucket_k[group, j]) & (bucket >= 0) & (self.place_k[group, j] <= self.place_q[head, i])

    def _ranges(self) -> tuple[Tensor, Tensor]:
        """[X, Q, N] tiles whose ranges of buckets and of positions leave a pair possible, and those in which every pair is allowed."""
        low_q, high_q, first_q, last_q = (x[:, :, None] for x in _ends(self.bucket_q, self.place_q, self.block))
        low_k, high_k, first_k, last_k = (x.repeat_interleave(self.share, 0)[:, None] for x in _ends(self.bucket_k, self.place_k, self.block))
        some = (high_q >= low_k) & (high_k >= low_q) & (first_k <= last_q)
        full_q, full_k = (_full(x, self.block) for x in (self.bucket_q, self.bucket_k))
        one = (low_q == high_q) & (low_k == high_k) & full_q[:, :, None] & full_k.repeat_interleave(self.share, 0)[:, None]
        return some, some & one & (last_k <= first_q)

    def _finer(self, surely_XQN: Tensor) -> BlockMask:
        """The mask: only tiles that ranges leave open are looked at pair by pair."""
        size = {"block": self.block, "query_block": self.block}
        open_XQN = self.asked & ~surely_XQN
        found = BlockMask.of(open_XQN[None], self._allowed, self.length, self.length, heads=len(open_XQN), **size)
        partial = None if found.partial is None else found.partial.masked_fill(surely_XQN, -1)
        return BlockMask(found.blocks | surely_XQN, partial, found.tiles, self.block, self.block)

    def tiles(self) -> int:
        """Tiles visited, all sequences and heads."""
        return int(self.mask.blocks.sum())

    def pairs(self) -> Tensor:
        """[B, H, T, S] bool: the induced mask, formed whole; the definition of what is attended to."""
        B, H, T, G, S = self.shape
        back_q, back_k = (_unpacked(bucket, source, size) for bucket, source, size in (
            (self.bucket_q, self.from_q, T), (self.bucket_k, self.from_k, S)))
        query, key = back_q.view(B, H, T, 1), back_k.view(B, G, 1, S).repeat_interleave(self.share, 1)
        at = torch.arange(S, device=key.device)
        return (query == key) & (query >= 0) & (at <= at[S - T :, None])

    def attend(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, scale: float, return_lse: bool = False) -> Any:
        """[B, H, T, D]; dropped queries and those without a key give zeros. With `return_lse` also lse [B, H, T]. Differentiable."""
        B, H, T, G, S = self.shape
        D = q_BHTD.shape[-1]
        if q_BHTD.shape[:3] != (B, H, T) or k_BGSD.shape[:3] != (B, G, S):
            raise BadInput(f"made for {B} sequences, {H} and {G} heads, {T} queries and {S} keys; given {list(q_BHTD.shape)}, {list(k_BGSD.shape)}")
        q = _taken(q_BHTD.reshape(B * H, T, D), self.from_q)[None]
        k, v = (_taken(x.reshape(B * G, S, D), self.from_k)[None] for x in (k_BGSD, v_BGSD))
        out, lse = block_attention(q, k, v, self.mask, block=self.block, query_block=self.block, scale=scale, causal=False, return_lse=True)
        # packing fills up by the last place of all, whose rows must not be written twice
        there = self.bucket_q >= 0
        row, column = there.nonzero().T
        full = out.new_zeros(B * H, T, D).index_put((row, self.from_q[there]), out[0, row, column])
        if not return_lse:
            return full.view(B, H, T, D)
        sums = lse.new_full((B * H, T), -torch.inf).index_put((row, self.from_q[there]), lse[0, row, column])
        return full.view(B, H, T, D), sums.view(B, H, T)


def _packed(bucket_XT: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """([X, L] where each place comes from, [X, L] its bucket or -1): by bucket, in a bucket by time, what is dropped left away."""
    key = torch.where(bucket_XT >= 0, bucket_XT, torch.iinfo(torch.long).max)
    order = key.argsort(dim=1, stable=True)[:, :length]
    order = torch.nn.functional.pad(order, (0, length - order.shape[1]))
    bucket = bucket_XT.long().gather(1, order)
    extra = torch.arange(length, device=order.device) >= (bucket_XT >= 0).sum(1, keepdim=True)
    return order, bucket.masked_fill(extra, -1)


def _ends(bucket_XL: Tensor, place_XL: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[X, blocks] least and largest bucket, first and last position of those that are there; ranges that meet none where nothing is."""
    far, fill = torch.iinfo(torch.long).max, -bucket_XL.shape[1] % block
    bucket, place = (torch.nn.functional.pad(x, (0, fill), value=-1).unflatten(1, (-1, block)) for x in (bucket_XL, place_XL))
    low, first = (torch.where(bucket >= 0, x, far).amin(2) for x in (bucket, place))
    return low, bucket.amax(2), first, torch.where(bucket >= 0, place, -1).amax(2)


def _full(bucket_XL: Tensor, block: int) -> Tensor:
    """[X, blocks] whether every place is taken."""
    return torch.nn.functional.pad(bucket_XL, (0, -bucket_XL.shape[1] % block), value=-1).unflatten(1, (-1, block)).amin(2) >= 0


def _unpacked(bucket_XL: Tensor, from_XL: Tensor, size: int) -> Tensor:
    out = bucket_XL.new_full((len(bucket_XL), size), -1)
    there = bucket_XL >= 0
    out[there.nonzero()[:, 0], from_XL[there]] = bucket_XL[there]
    return out


def _taken(x_XTD: Tensor, index_XL: Tensor) -> Tensor:
    return x_XTD.gather(1, index_XL[..., None].expand(-1, -1, x_XTD.shape[-1]))
