"""Sinkhorn balancing of a matrix in the log domain, causal or not (Tay et al. 2020, arXiv 2002.11296).

Shape letters: N = blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NEVER = -1e30
"""Logarithm of nothing that can be subtracted from itself."""


def balanced(logit: Tensor, rounds: int, causal: bool) -> Tensor:
    """[..., N, N] P of logits, balanced in float32 at least: rows sum to one, columns near it.

    Causal: strictly lower, and row i depends on rows up to i alone.
    """
    log_P = logit.float() if logit.element_size() < 4 else logit
    allowed = torch.ones(log_P.shape[-2:], dtype=torch.bool, device=log_P.device)
    allowed = allowed.tril(-1) if causal else allowed
    log_P = log_P.masked_fill(~allowed, _NEVER)
    if not rounds:
        log_P = (log_P - log_P.logsumexp(-1, keepdim=True)).masked_fill(~allowed, _NEVER)
    for _ in range(rounds):
        log_P = log_P - (log_P.logcumsumexp(-2) if causal else log_P.logsumexp(-2, keepdim=True))
        log_P = log_P.masked_fill(~allowed, _NEVER)
        log_P = (log_P - log_P.logsumexp(-1, keepdim=True)).masked_fill(~allowed, _NEVER)
    return log_P.exp().to(logit.dtype)
