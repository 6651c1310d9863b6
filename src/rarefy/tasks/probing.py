"""k-sparse probing: how much of a concept a few latents hold (Gurnee et al. 2023; Karvonen et al. 2025, SAEBench).

The k latents with the largest difference of mean code between rows with and without the concept are read by a logistic
probe; latents and probe are chosen on one half of the documents and judged on the other.

Shape letters: N = rows, D = width, F = latents, K = latents read, C = concepts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..fidelity import Interval
from ..method import positive
from .codes import Codes
from .logistic import accuracy, balanced, f1, fit_probes, right


@dataclass(frozen=True)
class Probing:
    """Probes of C concepts on rows they were not fitted on; classes weigh the same, chance is 1/2."""

    accuracy: Interval
    """Mean over concepts, its interval over documents."""
    accuracy_C: Tensor
    f1_C: Tensor
    latent_CK: Tensor
    """The latents read, strongest difference first; [C, 0] for a dense probe."""

    @property
    def f1(self) -> float:
        """Mean over concepts."""
        return float(self.f1_C.mean())


def mean_difference(codes: Codes, y_NC: Tensor) -> Tensor:
    """[F, C] mean code of rows with the concept less that of rows without."""
    s_NC = balanced(y_NC) * 2
    return codes.sums(torch.where(y_NC, s_NC, -s_NC))


def probe_codes(codes: Codes, y_NC: Tensor, side_N: Tensor, doc_N: Tensor, k: Sequence[int] = (1, 2, 5)) -> dict[int, Probing]:
    """Probing at each k.

    Args:
        y_NC: bool, which rows have which concept; both classes must be there on both sides.
        side_N: 0 choose and fit on, 1 judge on, anything else left out. doc_N: document of each row.

    Raises:
        BadInput: a concept without rows of both classes on a side; k beyond the number of latents.
    """
    for each in k:
        positive("k", each, codes.width)
    fit_R, judge_R = (_side(side_N, s) for s in (0, 1))
    top = mean_difference(codes.take(fit_R), y_NC[fit_R]).abs().topk(max(k), dim=0).indices.T
    unique, inverse = top.unique(return_inverse=True)
    read_CNK = codes.columns(unique).T[inverse].transpose(1, 2)
    out = {}
    for each in k:
        probes = fit_probes(read_CNK[:, fit_R, :each], y_NC[fit_R])
        out[each] = _judged(probes.logits(read_CNK[:, judge_R, :each]), y_NC[judge_R], doc_N[judge_R], top[:, :each])
    return out


def probe_rows(x_ND: Tensor, y_NC: Tensor, side_N: Tensor, doc_N: Tensor, **how: Any) -> Probing:
    """The dense probe on raw rows: what there is to be found. `how` is for `fit_probes`."""
    fit_R, judge_R = (_side(side_N, s) for s in (0, 1))
    probes = fit_probes(x_ND[fit_R], y_NC[fit_R], **how)
    none = torch.empty(y_NC.shape[1], 0, dtype=torch.long)
    return _judged(probes.logits(x_ND[judge_R]), y_NC[judge_R], doc_N[judge_R], none)


def _side(side_N: Tensor, side: int) -> Tensor:
    at_R = (side_N == side).nonzero()[:, 0]
    if not len(at_R):
        raise BadInput(f"no rows on side {side}; give documents to choose on (0) and to judge on (1)")
    return at_R


def _judged(logit_NC: Tensor, y_NC: Tensor, doc_N: Tensor, latent_CK: Tensor) -> Probing:
    s_NC = balanced(y_NC)
    return Probing(by_document((s_NC * right(logit_NC, y_NC)).sum(1), s_NC.sum(1), doc_N), accuracy(logit_NC, y_NC), f1(logit_NC, y_NC), latent_CK)


def by_document(total_N: Tensor, count_N: Tensor, doc_N: Tensor) -> Interval:
    """sum(total) / sum(count) with its interval over documents, as `fidelity.ratio_interval`; a document's count may be negative."""
    docs, at_N = doc_N.unique(return_inverse=True)
    total_C, count_C = (torch.zeros(len(docs), dtype=torch.float64).index_add_(0, at_N, v.double()) for v in (total_N, count_N))
    whole = float(count_C.sum())
    if whole == 0:
        raise BadInput("no rows to average over")
    mean, n = float(total_C.sum()) / whole, int((count_C != 0).sum())
    if n < 2:
        return Interval(mean, -math.inf, math.inf)
    half = 1.96 * math.sqrt(float((total_C - mean * count_C).pow(2).sum()) * n / (n - 1)) / abs(whole)
    return Interval(mean, mean - half, mean + half)
