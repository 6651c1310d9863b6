"""ZipVL (He et al. 2024, arXiv 2410.08584): the fewest tokens that hold a share of the attention, so many as the layer needs.

A few sampled queries say what attention each token receives, per query that sees it: early tokens are seen by more queries, and without
that division would win for it. Tokens are kept in that order until theirs is the share tau of all; all heads of the layer attend
to the same ones. Decoding steps are dense, as there. The choice looks back from the end of the prompt, so it is for prefill only.

The paper also keeps unimportant tokens in fewer bits in the cache; bits are a cache's affair here. It samples earlier queries at random, here they
are evenly spaced.
Shape letters as in scores.py; P = sampled queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...method import positive
from .by_lines import ByLines
from .rules import TopP, tail_levels
from .scores import logits


class ZipVL(ByLines, TopP):
    """One set of tokens a layer, by share of attention received; every query also sees its own key.

    Args:
        budget: share of visible pairs that `rarefy.calibrate` fits tau to.
        dial: tau in (0, 1), or 0 to fit it.
        probes: newest queries that are sampled, and as many before them.
    """

    name = "attention/zipvl"
    unit = "token"
    prefill_only = True

    def __init__(self, budget: float = 0.25, dial: float = 0.0, probes: int = 32) -> None:
        super().__init__(budget, 1, 1, dial)
        self.probes = positive("probes", probes)

    def received(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
        """[B, S] attention that each token receives of sampled queries, a query that sees it and head."""
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        earlier = max(0, T - self.probes)
        spaced = torch.arange(min(self.probes, earlier), device=q_BHTD.device) * earlier // max(1, min(self.probes, earlier))
        at_P = torch.cat((spaced, torch.arange(earlier, T, device=q_BHTD.device)))
        score = logits(q_BHTD[:, :, at_P], k_BGSD).to(torch.promote_types(q_BHTD.dtype, torch.float32))
        at_S = torch.arange(S, device=score.device)
        unseen_PS = at_S > (S - T + at_P)[:, None] if causal else at_S < at_S[:1].expand(len(at_P), 1)
        return score.masked_fill(unseen_PS, -torch.inf).softmax(-1).sum(2).mean(1) / (~unseen_PS).sum(0)

    def reached(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> tuple[Tensor, Tensor]:
        """Levels of tokens, the same for all heads and queries."""
        T, S, shape = q_BHTD.shape[2], k_BGSD.shape[2], q_BHTD.shape[:3]
        level_BS = tail_levels(self.received(q_BHTD, k_BGSD, causal))
        at_S, at_T = torch.arange(S, device=level_BS.device), torch.arange(S - T, S, device=level_BS.device)[:, None]
        level = level_BS[:, None, None].expand(*shape, S).masked_fill(at_S == at_T, -torch.inf)
        seen = at_S <= at_T if causal else torch.ones(T, S, dtype=torch.bool, device=level.device)
        return level, seen.expand(*shape, S)

    def lines_of(self, q_BHTD: Tensor, k_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens as columns, and the diagonal of own keys."""
        own_S = torch.arange(k_BGSD.shape[2], device=q_BHTD.device) == 0
        return (tail_levels(self.received(q_BHTD, k_BGSD, True)) <= self.at(1))[:, None], own_S[None, None]

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """The sampled queries' products with all keys, shared by the queries of a prompt as long as the keys."""
        return 2 * heads * width * min(2.0 * self.probes, keys)
