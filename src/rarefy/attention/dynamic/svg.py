"""Sparse VideoGen (Xi et al. 2025, arXiv 2502.01776): each head of a video model looks along space or along time; a few queries tell which.

Tokens come frame by frame. A spatial head is served by the keys of the same frame and of those near it, a temporal one by the keys at the same
place of every frame and at places near it; both also see the first frame. For a few sampled queries attention is computed three ways,
dense, spatial and temporal, and the head takes the pattern with the smaller squared error, anew at every call.

The paper permutes a temporal head's tokens to lie place by place, so that its kernel sees blocks; here pairs are listed and nothing is moved.
It samples queries at random, here they are evenly spaced, so that a choice can be repeated. Its code measures distance in blocks of 128 tokens and
has prompts in words, which see and are seen by all; here distance is in whole frames and places, and the first frame is what all see.
Shape letters as in scores.py; P = sampled queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...method import not_negative, positive
from ..block import TokenAttention
from ..trained.base import masked_softmax
from .scores import later


class SparseVideo(TokenAttention):
    """Spatial or temporal pattern by head, by their errors on sampled queries. Density follows from the patterns.

    Args:
        frame: tokens of a frame.
        frames: how many frames to either side a spatial head sees beside its own.
        places: how many places to either side a temporal head sees beside its own.
        samples: queries that decide.
    """

    name = "attention/sparse_video"

    def __init__(self, frame: int, frames: int = 1, places: int = 1, samples: int = 64) -> None:
        super().__init__(1.0)
        self.frame, self.samples = positive("frame", frame), positive("samples", samples)
        self.frames, self.places = int(not_negative("frames", frames)), int(not_negative("places", places))

    def patterns(self, T: int, S: int, causal: bool, like: Tensor) -> tuple[Tensor, Tensor]:
        """(spatial, temporal) [T, S] bool."""
        at_S, at_T = torch.arange(S, device=like.device), torch.arange(S - T, S, device=like.device)[:, None]
        first = at_S < self.frame
        spatial = first | ((at_T // self.frame - at_S // self.frame).abs() <= self.frames)
        temporal = first | ((at_T % self.frame - at_S % self.frame).abs() <= self.places)
        unseen = later(T, S, like) if causal else torch.zeros(T, S, dtype=torch.bool, device=like.device)
        return spatial & ~unseen, temporal & ~unseen

    def errors(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, causal: bool) -> Tensor:
        """[2, B, H] mean squared errors of the spatial and the temporal pattern on the sampled queries."""
        T, S, H = q_BHTD.shape[2], k_BGSD.shape[2], q_BHTD.shape[1]
        count = min(self.samples, T)
        at_P = (torch.arange(count, device=q_BHTD.device) + 1) * T // count - 1
        v, scale = v_BGSD.repeat_interleave(H // v_BGSD.shape[1], 1), q_BHTD.shape[3] ** -0.5
        found: list[Tensor] = []
        seen = ~later(T, S, q_BHTD) if causal else torch.ones(T, S, dtype=torch.bool, device=at_P.device)
        for pattern in (seen, *self.patterns(T, S, causal, q_BHTD)):
            found.append(masked_softmax(q_BHTD[:, :, at_P], k_BGSD, pattern[at_P], scale) @ v)
        return torch.stack([(sparse - found[0]).square().mean((2, 3)) for sparse in found[1:]])

    def _chosen(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor | None, causal: bool) -> Tensor:
        spatial, temporal = self.patterns(q_BHTD.shape[2], k_BGSD.shape[2], causal, q_BHTD)
        values = k_BGSD if v_BGSD is None else v_BGSD                                  # without values, those that can be had
        error = self.errors(q_BHTD.detach(), k_BGSD.detach(), values.detach(), causal)
        return torch.where((error[0] <= error[1])[..., None, None], spatial, temporal)

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """At most three dense attentions of the sampled queries, spread over the queries of a call."""
        T = self._shape[3] if self._shape else 1
        return 12 * heads * width * keys * min(self.samples, T) / T
