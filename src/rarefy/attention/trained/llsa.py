"""LLSA (Zhou et al. 2025, arXiv 2512.16615): blocks are found top-down through means of means, and what is passed over is seen by its mean.

    level l = means of B^l tokens.  Coarsest level: each (pooled) query takes the top k of all keys; below: the top k of the children of those
    taken above.  out = softmax over {tokens of the blocks taken at level 1} and {every mean that was scored, its term times its token count}

With `levels` growing as log_B T a query scores and attends to O(k B log T) keys, so that T of them cost O(T log T). The paper's transformer is not
causal; here a causal query never passes over the blocks it stands in, and sees means only of blocks that ended before it. `coarse`: "all" is the
paper's, whose means overlap what is taken below them; "rest" leaves the means of blocks taken out, so that every key counts once and taking all is
dense attention; "none" attends to the tokens alone.

Shape letters as in base.py; R = rows that share a choice, C = candidates, X = tokens and means of all levels, K = places in a query's list.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import BadInput
from ...kernels.block_attention import token_attention
from ...method import positive
from ...selection import Selection
from .base import PairAttention
from .moba import block_means
from .seer import pooled_queries


class LLSA(PairAttention):
    """Blocks by a tree of means; nothing to train but the model itself (`Trained`).

    Args:
        top: blocks taken at each level (k). block: B. levels: of means; log_B(context) - 1 keeps the cost log-linear.
        shared: queries of a block choose together by their mean, as in the paper; False: each for itself, and decoding is prefill.
        coarse: "all", "rest" or "none", see above.
    """

    name = "attention/llsa"
    unit = "key block"
    fitted = "none"

    def __init__(self, top: int = 8, block: int = 16, levels: int = 2, shared: bool = True, coarse: str = "all") -> None:
        super().__init__()
        self.top, self.block, self.levels = positive("top", top), positive("block", block), positive("levels", levels)
        if coarse not in ("all", "rest", "none"):
            raise BadInput(f'coarse={coarse!r} must be "all", "rest" or "none"')
        if not isinstance(shared, bool):
            raise BadInput(f"shared={shared!r} must be True or False")
        self.shared, self.coarse = shared, coarse

    def refuse_other_sizes(self, q_BHTD: Tensor, k_BGSD: Tensor) -> None:
        """Without parameters any heads will do. Raise BadInput where they do not fit each other."""
        if q_BHTD.shape[1] % k_BGSD.shape[1]:
            raise BadInput(f"{q_BHTD.shape[1]} query heads are no multiple of {k_BGSD.shape[1]} key heads")

    @torch.no_grad()
    def choice(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """[B, H, T, K] tokens and means of each query, numbered as in `extended`; -1 is none."""
        T, S, share = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
        at_T, lists = torch.arange(S - T, S, device=q.device), []
        taken = row_T = at_T
        before, offset = 0, S + sum(-(-S // self.block**n) for n in range(1, self.levels + 1))
        for level in range(self.levels, 0, -1):
            size = self.block**level
            mean_BHND = block_means(k, size).repeat_interleave(share, 1)
            N, first = mean_BHND.shape[2], (S - T) // size
            offset -= N
            query = pooled_queries(q, S, size) if self.shared else q
            own_R = torch.arange(first, first + query.shape[2], device=q.device) if self.shared else at_T // size
            if level == self.levels:
                seen = torch.arange(N, device=q.device).expand(*query.shape[:3], N)
                score = query @ mean_BHND.mT
            else:
                row_R = own_R // self.block - before if self.shared else torch.arange(T, device=q.device)
                seen = self._children(taken[:, :, row_R], N)
                near = mean_BHND.gather(2, seen.clamp_min(0).flatten(2)[..., None].expand(-1, -1, -1, q.shape[3])).unflatten(2, seen.shape[2:])
                score = (near @ query[..., None])[..., 0]
            if causal:
                seen = torch.where(seen <= own_R[:, None], seen, -1)
                score = score.masked_fill(seen == own_R[:, None], torch.inf)
            score = score.masked_fill(seen < 0, -torch.inf)
            best, at = score.topk(min(self.top, score.shape[-1]), -1)
            taken = torch.where(best > -torch.inf, seen.gather(3, at), -1)
            row_T = at_T // size - first if self.shared else torch.arange(T, device=q.device)
            if causal:
                seen = torch.where(seen < own_R[:, None], seen, -1)
            if self.coarse == "rest":
                seen = torch.where(torch.zeros_like(seen, dtype=torch.bool).scatter(3, at, True), -1, seen)
            if self.coarse != "none":
                lists.append(torch.where(seen >= 0, seen + offset, -1)[:, :, row_T])
            before = first
        tokens = self._children(taken[:, :, row_T], S)
        return torch.cat([torch.where(tokens <= at_T[:, None], tokens, -1) if causal else tokens, *lists], -1)

    def _children(self, taken_BHRK: Tensor, count: int) -> Tensor:
        """[B, H, R, K * block] numbers one level below, -1 where there is none."""
        below = taken_BHRK[..., None] * self.block + torch.arange(self.block, device=taken_BHRK.device)
        return torch.where((taken_BHRK[..., None] >= 0) & (below < count), below, -1).flatten(3)

    def extended(self, x_BGSD: Tensor) -> Tensor:
        """[B, G, X, D] the tokens' and, behind them, the means of each level from the finest."""
        return torch.cat([x_BGSD, *(block_means(x_BGSD, self.block**n) for n in range(1, self.levels + 1))], 2)

    def counts(self, S: int, like: Tensor) -> Tensor:
        """[X] tokens that each stands for."""
        sizes = [self.block**n for n in range(self.levels + 1)]
        count = torch.cat([(S - torch.arange(0, S, n, device=like.device)).clamp_max(n) for n in sizes])
        return count.to(torch.promote_types(like.dtype, torch.float32))

    def mix(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """The listed keys only."""
        bias = self.counts(k.shape[2], q).log()[mask.clamp_min(0)]
        return token_attention(q, self.extended(k), self.extended(v), mask, scale=scale, bias_BHTK=bias)

    def naive(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """From the whole score matrix over tokens and means."""
        share = q.shape[1] // k.shape[1]
        k, v, n = self.extended(k).repeat_interleave(share, 1), self.extended(v).repeat_interleave(share, 1), self.counts(k.shape[2], q)
        score = (q @ k.mT * scale + n.log().to(q.dtype)).masked_fill(~_pairs(mask, k.shape[2]), -torch.inf)
        return score.softmax(-1) @ v

    def select(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, hidden_BTD: Tensor | None = None) -> Selection:
        """Tokens and means of causal attention, mask form [B, H, T, X]."""
        self._refuse(queries=q_BHTD, keys=k_BGSD, values=v_BGSD)
        index = self.choice(q_BHTD, k_BGSD, v_BGSD, None, q_BHTD.shape[3] ** -0.5, True)
        mask = _pairs(index, len(self.counts(k_BGSD.shape[2], k_BGSD)))
        return Selection(mask.shape[-1], mask.to(q_BHTD.dtype), mask_=mask)

    @torch.no_grad()
    def count(self, mask: Tensor, T: int, S: int, causal: bool) -> None:
        """Tokens and means attended to, of the tokens visible."""
        self._kept += float((mask >= 0).sum())
        self._seen += mask.shape[0] * mask.shape[1] * (T * S - T * (T - 1) / 2 if causal else T * S)

    def own_flops(self, heads: int, width: int, keys: float) -> float:
        """Scores of the candidates of each level, shared by a row's queries."""
        sizes = [self.block**n for n in range(1, self.levels + 1)]
        scored = [min(self.top * self.block, keys / n) for n in sizes[:-1]] + [keys / sizes[-1]]
        return sum(2 * heads * width * c / (n if self.shared else 1) for c, n in zip(scored, sizes, strict=True))


def _pairs(index_BHTK: Tensor, count: int) -> Tensor:
    """[B, H, T, X] bool of a list with -1 for none."""
    there = torch.zeros(*index_BHTK.shape[:3], count + 1, dtype=torch.bool, device=index_BHTK.device)
    return there.scatter(3, torch.where(index_BHTK < 0, count, index_BHTK), True)[..., :count]
