"""NSA (Yuan et al. 2025, arXiv 2502.11089): compressed, selected and recent keys, three attentions mixed by gates of each query.

    compression  k~_i = phi([k_id + pos_0, ..., k_id+l-1 + pos_l-1]), v~_i likewise, phi an MLP; a query sees those that end before or at it
    selection    the compression softmax, shared out to the selection blocks that its windows overlap and summed over the heads of
                 a key head, picks blocks that are attended whole; the first and the `local` newest are forced
    window       the nearest `window` keys
    out          sum over branches of sigmoid(W_c hidden) * out_c

The paper's formula for the second sums windows before the selection block; here each is shared out to the blocks it overlaps, as its text and figure
say. Gates begin near 1/2, as in public code: drawn wide they are other numbers at each token, and a lookup takes several times the steps.
Departure: the branches read the layer's own keys and values, which is what a cache holds, in place of three sets of them.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width, E = hidden width, I = compressed keys,
L = keys compressed into one, N = selection blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ...errors import BadInput
from ...kernels.block_attention import BlockMask, block_attention
from ...kernels.block_attention.softmax import attend
from ...method import fraction, positive
from ..block import highest
from .base import PairAttention, drawn, masked_softmax, near_attention


class NSA(PairAttention):
    """Natively trained sparse attention; train it in its model (`Trained`).

    `select` gives the selection branch's blocks; `measured_density` counts the pairs of all branches, those of two of them twice: the work.

    Args:
        budget: fraction of the visible selection blocks kept, forced ones among them (the paper: 16 blocks).
        block: keys in a selection block. compress: keys compressed into one (l); stride: keys from one to the next (d); stride divides both.
        window: nearest keys of the third branch. local: newest blocks forced, the query's own among them; with them the first.
        top: fixed number of selection blocks, 0 for the budget's share. phi: "mlp" as in the paper, or "mean" as in public code.
    """

    name = "attention/nsa"
    unit = "key block"
    wants = ("hidden",)

    def __init__(
        self, hidden: int, heads: int, key_heads: int, d_head: int, budget: float = 0.25, block: int = 64, compress: int = 32, stride: int = 16,
        window: int = 512, local: int = 2, top: int = 0, phi: str = "mlp", seed: int = 0,
    ) -> None:
        super().__init__()
        draw = self.sized(heads, key_heads, d_head, seed)
        self._budget, self.window, self.local = fraction("budget", budget), positive("window", window), positive("local", local)
        self.block, self.compress, self.stride = positive("block", block), positive("compress", compress), positive("stride", stride)
        if not isinstance(top, int) or isinstance(top, bool) or top < 0:
            raise BadInput(f"top={top!r} must be a whole number >= 0: selection blocks of a query, 0 for the budget's share")
        if block % stride or compress % stride:
            raise BadInput(f"stride={stride} must divide block={block} and compress={compress}: compressed keys are shared out to whole blocks")
        if phi not in ("mlp", "mean"):
            raise BadInput(f'phi={phi!r} must be "mlp" or "mean"')
        self.top, self.phi, E, L, D = top, phi, positive("hidden", hidden), compress, d_head
        if phi == "mlp":
            self.place_2LD = drawn(draw, 2, L, D, std=0.02)
            self.down_2LDD = drawn(draw, 2, L * D, D, std=(L * D) ** -0.5)
            self.up_2DD = drawn(draw, 2, D, D, std=(2 / D) ** 0.5)
        self.gate_EHC = drawn(draw, E, heads * 3, std=0.02)
        self.bias_HC = nn.Parameter(torch.zeros(heads * 3))

    @property
    def budget(self) -> float:
        """Fraction of visible selection blocks kept."""
        return self._budget

    def compressed(self, x_BGSD: Tensor, which: int) -> Tensor:
        """[B, G, I, D] of keys (which=0) or values (1): an MLP over each window of `compress`, the place in it added first; or the mean."""
        if x_BGSD.shape[2] < self.compress:
            return x_BGSD[:, :, :0]
        windows = x_BGSD.unfold(2, self.compress, self.stride)
        if self.phi == "mean":
            return windows.mean(-1)
        return silu((windows.mT + self.place_2LD[which]).flatten(3) @ self.down_2LDD[which]) @ self.up_2DD[which]

    def _ended(self, T: int, S: int, count: int, causal: bool, device: torch.device) -> Tensor:
        """[T, I] bool: compressed keys whose last key is not later than the query."""
        last_I = torch.arange(count, device=device) * self.stride + self.compress - 1
        at_T = torch.arange(S - T, S, device=device)[:, None]
        return last_I <= (at_T if causal else torch.full_like(at_T, S))

    def shares(self, p_BHTI: Tensor, S: int) -> Tensor:
        """[B, G, T, N] importance of selection blocks: each compressed key's weight, once a stretch of `stride` keys that it covers there,
        summed over the heads of a key head."""
        N, reach, a_block = -(-S // self.block), self.compress // self.stride, self.block // self.stride
        stretch = p_BHTI.new_zeros(*p_BHTI.shape[:3], max(N * a_block, p_BHTI.shape[3] + reach - 1))
        for j in range(reach):
            stretch[..., j : j + p_BHTI.shape[3]] += p_BHTI
        return stretch[..., : N * a_block].unflatten(3, (N, a_block)).sum(4).unflatten(1, (self.key_heads, -1)).sum(2)

    @torch.no_grad()
    def choice(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """[B, H, T, N] bool: selection blocks of each query, the same for the heads of a key head."""
        T, S = q.shape[2], k.shape[2]
        small = self.compressed(k, 0).repeat_interleave(self.heads // self.key_heads, 1)
        seen = self._ended(T, S, small.shape[2], causal, q.device)
        logit = (q @ small.mT * scale).masked_fill(~seen, -torch.inf)
        score = self.shares(torch.where(seen, logit.softmax(-1), 0.0) if small.shape[2] else logit, S)
        n = torch.arange(score.shape[3], device=q.device)
        own = (torch.arange(S - T, S, device=q.device) // self.block)[:, None]
        own = own if causal else torch.full_like(own, len(n) - 1)
        forced = (n == 0) | (n > own - self.local)
        score = score.masked_fill(forced, torch.inf).masked_fill(n > own, -torch.inf)
        keep = [max(1, min(v, self.top) if self.top else round(self._budget * v)) for v in (own[:, 0] + 1).tolist()]
        kept = highest(score, torch.tensor(keep, device=q.device)[:, None]) & (score > -torch.inf) | (score == torch.inf)
        return kept.repeat_interleave(self.heads // self.key_heads, 1)

    def gates(self, hidden: Tensor) -> Tensor:
        """[3, B, H, T, 1]."""
        return (hidden @ self.gate_EHC + self.bias_HC).sigmoid().unflatten(2, (self.heads, 3)).permute(3, 0, 2, 1)[..., None]

    def selected(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        """The selection branch."""
        return block_attention(q, k, v, mask, block=self.block, query_block=1, scale=scale, causal=causal)

    def mix(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """Gated sum of the branches; each gives zeros where a query sees nothing."""
        assert hidden is not None
        T, S, share = q.shape[2], k.shape[2], self.heads // self.key_heads
        small_k, small_v = (self.compressed(x, i).repeat_interleave(share, 1) for i, x in enumerate((k, v)))
        seen = self._ended(T, S, small_k.shape[2], causal, q.device)
        coarse = attend(q, small_k, small_v, seen, scale)[0] if small_k.shape[2] else torch.zeros_like(q)
        near = near_attention(q, k, v, self.window, block=self.block, scale=scale, causal=causal)
        outs = torch.stack([coarse, self.selected(mask, q, k, v, scale, causal), near])
        return (self.gates(hidden) * outs).sum(0)

    def naive(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """The same from three whole score matrices."""
        assert hidden is not None
        T, S, share = q.shape[2], k.shape[2], self.heads // self.key_heads
        at_T, at_S = torch.arange(S - T, S, device=q.device)[:, None], torch.arange(S, device=q.device)
        see = at_S <= at_T if causal else torch.ones(T, S, dtype=torch.bool, device=q.device)
        small_k, small_v = (self.compressed(x, i) for i, x in enumerate((k, v)))
        pairs = [
            (small_k, small_v, self._ended(T, S, small_k.shape[2], causal, q.device)), (k, v, mask[..., at_S // self.block] & see),
            (k, v, ((at_T - at_S).abs() < self.window) & see),
        ]
        outs = torch.stack([masked_softmax(q, a, m.expand(*q.shape[:2], -1, -1), scale) @ b.repeat_interleave(share, 1) for a, b, m in pairs])
        return (self.gates(hidden) * outs).sum(0)

    @torch.no_grad()
    def count(self, mask: Tensor, T: int, S: int, causal: bool) -> None:
        """Pairs of all three branches, counted."""
        small = self._ended(T, S, (S - self.compress) // self.stride + 1 if S >= self.compress else 0, causal, mask.device).sum()
        at_T = torch.arange(S - T, S, device=mask.device)
        near = (at_T + 1).clamp_max(self.window) if causal else (at_T + 1).clamp_max(self.window) + (S - 1 - at_T).clamp_max(self.window - 1)
        visible = BlockMask(mask, None, None, self.block, 1).visible(T, S, causal)
        self._kept += float((mask * visible).sum()) + mask.shape[0] * mask.shape[1] * float(small + near.sum())
        self._seen += float(visible.sum()) * mask.shape[0] * mask.shape[1]

    def own_flops(self, heads: int, width: int, keys: float) -> float:
        """Gates and compressed keys, a query."""
        return 6 * heads * self.gate_EHC.shape[0] + 4 * heads * width * keys / self.stride
