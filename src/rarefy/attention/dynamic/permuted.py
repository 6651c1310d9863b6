"""PBS-Attn (Wang et al. 2025, arXiv 2510.21270): keys put into an order in which those that matter share blocks.

Attention does not depend on the order of keys. Within each segment keys are sorted by their mean attention from the newest block of queries; then
query blocks and sorted key blocks are pooled to their means, and each query block keeps the fewest key blocks of earlier segments whose softmax
among those reaches the dial, beside the block that holds the first token and its own segment, which stays in order, so that causality holds.

The authors' code lets the newest queries look ahead within their own block when it sorts; here they do not.

Shape letters as in scores.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import BadInput
from ...kernels.block_attention import BlockMask, block_attention, blocks_of, merge
from ...method import positive
from ..heads import per_head
from .rules import TopP
from .scores import key_means, mean, probabilities


class PermutedBlocks(TopP):
    """Blocks of sorted keys by pooled softmax; for prefill, decoding steps are dense.

    Args:
        budget: share of visible pairs that `rarefy.calibrate` fits the dial to.
        dial: mass that the kept blocks reach, in (0, 1) (0.9 in the paper), or 0 to fit it.
        segment: keys sorted among each other, a multiple of `block` and `query_block`.
        permute: False keeps keys in order, for comparison.
    """

    name = "attention/permuted_blocks"
    wants = ("cache",)
    prefill_only = True

    def __init__(
        self, budget: float = 0.25, block: int = 64, query_block: int = 64, dial: float = 0.0, segment: int = 256, permute: bool = True,
    ) -> None:
        super().__init__(budget, block, query_block, dial)
        self.segment, self.permute = positive("segment", segment), permute
        if segment % block or segment % query_block:
            raise BadInput(f"segment={segment} must be a multiple of block={block} and of query_block={query_block}")

    def order(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
        """[B, H, S] which key stands where; segments that are not full stay as they are."""
        S = k_BGSD.shape[2]
        whole = S // self.segment * self.segment
        at = torch.arange(S, device=q_BHTD.device).expand(*q_BHTD.shape[:2], S)
        if not (whole and self.permute and q_BHTD.numel()):
            return at
        mass = probabilities(q_BHTD[:, :, -self.block :], k_BGSD, causal).mean(2)[..., :whole].unflatten(-1, (-1, self.segment))
        inside = mass.argsort(dim=-1, descending=True, stable=True)
        start = torch.arange(0, whole, self.segment, device=at.device)[:, None]
        return torch.cat(((inside + start).flatten(-2), at[..., whole:]), -1)

    def own(self, T: int, S: int, rows: int, device: torch.device) -> Tensor:
        """[Q, N] bool: key blocks of a query block's segment."""
        Q, N = blocks_of(T, S, self.block, rows)
        row_Q, n = (S - T) // rows + torch.arange(Q, device=device)[:, None], torch.arange(N, device=device)
        return n * self.block // self.segment == row_Q * rows // self.segment

    def in_order(self, x_BGSD: Tensor, order_BHS: Tensor) -> Tensor:
        """[B, H, S, D] keys or values in their order, by query head."""
        return per_head(x_BGSD, order_BHS.shape[1]).gather(2, order_BHS[..., None].expand(-1, -1, -1, x_BGSD.shape[3]))

    def reached(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> tuple[Tensor, Tensor]:
        """Levels of the blocks of sorted keys."""
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        own, query = self.own(T, S, rows, q_BHTD.device), mean(q_BHTD, S, rows) * q_BHTD.shape[3] ** -0.5
        order = self.order(q_BHTD, k_BGSD, causal)
        raw = query @ key_means(self.in_order(k_BGSD, order), self.block).mT
        score, _ = self.bounded(raw, T, S, rows, causal)
        seen = score > -torch.inf
        first_BHN = pad(order == 0, (0, -S % self.block)).unflatten(-1, (-1, self.block)).any(-1)
        level = self.levels(raw.masked_fill(~seen | own, -torch.inf), torch.zeros_like(seen))
        return level.masked_fill((own | first_BHN[:, :, None]) & seen, -torch.inf), seen

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        T, S, rows = q.shape[2], k.shape[2], self._rows(q.shape[2])
        if not q.numel() or (T == 1 and S > 1):
            return super()._attend(q, k, v, scale, causal)
        self._shape, unit = (q.shape[1], q.shape[3], S, T), scale * q.shape[3] ** 0.5
        turned = q if abs(unit - 1) < 1e-12 else q * unit
        mask, own = self._chosen(turned, k, v, causal), self.own(T, S, rows, q.device)
        self._count(mask, T, S, causal)
        order, how = self.order(turned.detach(), k.detach(), causal), {"block": self.block, "query_block": rows, "scale": scale, "return_lse": True}
        far = block_attention(q, self.in_order(k, order), self.in_order(v, order), mask & ~own, causal=False, **how)
        near = block_attention(q, k, v, mask & own, causal=causal, **how)
        return merge(*zip(far, near, strict=True))[0]

    def reference(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
        """Dense scores; the pairs of sorted blocks are carried back to where their keys stand."""
        T, S, H = q_BHTD.shape[2], k_BGSD.shape[2], q_BHTD.shape[1]
        if not q_BHTD.numel() or (T == 1 and S > 1):
            return super().reference(q_BHTD, k_BGSD, v_BGSD)
        rows = self._rows(T)
        mask, own = self._chosen(q_BHTD, k_BGSD, v_BGSD, True), self.own(T, S, rows, q_BHTD.device)
        order = self.order(q_BHTD, k_BGSD, True)[:, :, None].expand(-1, -1, T, -1)
        far = BlockMask(mask & ~own, None, None, self.block, rows).pairs(T, S, False)
        keep = torch.zeros_like(far).scatter(3, order, far) | BlockMask(mask & own, None, None, self.block, rows).pairs(T, S, True)
        score = q_BHTD @ per_head(k_BGSD, H).mT * q_BHTD.shape[3] ** -0.5
        return score.masked_fill(~keep, -torch.inf).softmax(-1) @ per_head(v_BGSD, H)

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """Pooled products, and those of the newest block with all keys, spread over a prompt."""
        return 2 * heads * width * (keys / self.block / self.query_block + min(self.block, keys))
