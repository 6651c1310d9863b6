"""SwinBERT's learned mask (Lin et al. 2021, arXiv 2111.13196): one matrix of pairs for all heads, trained beside the model and pushed to zero.

    M = sigmoid(P), 1 on the diagonal; weights_ij in proportion to M_ij exp(q_i k_j); loss + lambda mean(M)
and after training M > 1/2. While `training` the mask is soft; in eval mode it is binary and only its pairs are computed. Masks move to other
lengths by interpolation (`resized`). Add `penalty()` of every layer to the loss of the model that it stands in.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width, L = positions of the mask, N = blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from ...errors import BadInput, Unsupported
from ...kernels.block_attention import BlockMask, block_attention
from ...method import Loss, not_negative, positive
from ..heads import per_head
from .base import Structured


class SwinBERT(Structured):
    """Attention under a learned mask of positions.

    Args:
        size: positions; longer sequences are refused.
        weight: lambda of the penalty.
        block: what the kernel works on at a time.
        seed: of the mask's beginning, which is about half open.

    Raises:
        BadInput: a sequence longer than the mask.
    """

    name = "attention/swinbert"
    fitted = "trained"

    def __init__(self, size: int = 512, weight: float = 1.0, block: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.size, self.block = positive("size", size), positive("block", block)
        self.weight = not_negative("weight", weight)
        self.logit_LL = nn.Parameter(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))
        self._cut: tuple[object, BlockMask] | None = None

    def mask(self, T: int, S: int) -> Tensor:
        """[T, S] in (0, 1] while training, 0 or 1 outside; 1 on the diagonal."""
        if S > self.size:
            raise BadInput(f"{self.name} has a mask of {self.size} positions and is given {S}; make one with resized({S})")
        part = self.logit_LL[S - T : S, :S]
        soft = part.sigmoid() if self.training else (part > 0).to(part.dtype)
        own = torch.arange(S - T, S, device=part.device)[:, None] == torch.arange(S, device=part.device)
        return torch.where(own, torch.ones_like(soft), soft)

    def penalty(self) -> Tensor:
        """lambda mean(sigmoid(P)): a scalar to add to the loss."""
        return self.weight * self.logit_LL.sigmoid().mean()

    def loss(self, x: Tensor, y: Tensor) -> Loss:
        """Unsupported: the mask learns from the loss of the model that it stands in."""
        raise Unsupported(f"{self.name} learns inside its model: put it in, add penalty() to the model's loss and step both")

    def resized(self, size: int) -> SwinBERT:
        """The same mask stretched or shrunk to other positions, bilinearly."""
        other = SwinBERT(positive("size", size), self.weight, self.block)
        with torch.no_grad():
            stretched = interpolate(self.logit_LL[None, None], (size, size), mode="bilinear", align_corners=True)
            other.to(self.logit_LL).logit_LL.copy_(stretched[0, 0])
        return other.train(self.training)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        """Dense while the mask is soft, by its pairs once it is binary."""
        T, S, rows = q.shape[2], k.shape[2], 1 if q.shape[2] == 1 else self.block
        if self.training:
            return self.weights(q, k, scale, causal).to(v.dtype) @ per_head(v, q.shape[1])
        keep = pad(self.mask(T, S).detach() > 0, (0, -S % self.block, (S - T) % rows, -S % rows))
        N, Q = keep.shape[1] // self.block, keep.shape[0] // rows
        blocks = keep.view(Q, rows, N, self.block).any(3).any(1)
        first = (S - T) // rows * rows
        return block_attention(
            q, k, v, blocks[None, None], block=self.block, query_block=rows, scale=scale, causal=causal, allowed=lambda i, j: keep[i - first, j])

    def weights(self, q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
        """M exp(score) over its sum."""
        T, S = q.shape[2], k.shape[2]
        score = q @ per_head(k, q.shape[1]).mT * scale + self.mask(T, S).to(q.dtype).log()
        later = torch.arange(S, device=q.device) > torch.arange(S - T, S, device=q.device)[:, None]
        return (score.masked_fill(later, -torch.inf) if causal else score).softmax(-1)

    @torch.no_grad()
    def worked(self, T: int, S: int, causal: bool) -> float:
        """Pairs of the binary mask; all of them while it is soft."""
        keep = self.mask(T, S) > 0
        return float((keep.tril(S - T) if causal else keep).sum())
