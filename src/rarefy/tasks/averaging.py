"""q-sparse averaging (Sanford, Hsu and Telgarsky 2023, "Representational Strengths and Limitations of Transformers", def. 4).

Every source position i carries a vector z_i; a question names q of the positions, and its answer is their mean. One
attention unit answers exactly (thm. 6): positions have almost orthogonal vectors u_i, and a question's query is the shortest
w with u_i . w = 1 for the named ones, w = U^T (U U^T)^-1 1; the others' products stay below it, so that a large factor in
front makes softmax uniform over the named ones and zero elsewhere. Nothing is trained. What a sparse method does to it is
what it does to aggregation: q keys all matter alike, wherever they stand, and each one left out costs 1 / q of the answer.

Shape letters: B = sequences, S = keys, N = sources, M = questions, Q = named positions, D = head width, Z = width of z.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput
from ..fidelity import Interval, ratio_interval
from ..method import positive

SHARP = 100.0
"""Logit of a named position. Of those not named the largest in some thousand draws is about 4 sqrt(q / D) of it, 0.7 for q = 8 and D = 256."""


@dataclass(frozen=True)
class Averaging:
    """One head's queries, keys and values that solve the task, with its answers."""

    q_BHTD: Tensor
    """[B, 1, M, D]: the questions, which stand behind the sources."""
    k_BGSD: Tensor
    """[B, 1, N + M, D]."""
    v_BGSD: Tensor
    answer_BMZ: Tensor
    """The means, of width D: values fill a head."""
    named_BMQ: Tensor
    """[B, M, Q] int64: the positions each question names."""
    scale: float = 1.0


def averaging(sources: int, named: int, batch: int, *, width: int = 256, questions: int = 16, seed: int = 0) -> Averaging:
    """Random instances with the closed-form queries and keys.

    Args:
        sources: N. named: q, positions a question names. width: D, of the order of named * log(sources) (thm. 6); with random
            vectors 30 * named for a few hundred.
        questions: M a sequence.

    Raises:
        BadInput: named not in [1, sources], or a width below it: q vectors of fewer dimensions are not independent.
    """
    for name, value in (("sources", sources), ("batch", batch), ("questions", questions)):
        positive(name, value)
    positive("named", named, sources)
    if width < named:
        raise BadInput(f"width={width} is below named={named}: no query can meet {named} positions alike; give a wider head")
    generator = torch.Generator().manual_seed(seed)
    u_BND = torch.randn(batch, sources, width, generator=generator, dtype=torch.float64).sign() / width**0.5
    z_BNZ = torch.randn(batch, sources, width, generator=generator)
    named_BMQ = torch.rand(batch, questions, sources, generator=generator).argsort(-1)[..., :named]
    row = torch.arange(batch)[:, None, None]
    U_BMQD = u_BND[row, named_BMQ]
    # Two positions may have been given one vector or dependent ones: the pseudo-inverse still meets the others.
    w_BMD = (torch.linalg.pinv(U_BMQD) @ torch.ones(named, 1, dtype=torch.float64))[..., 0]
    k_BSD = torch.cat([u_BND, torch.zeros(batch, questions, width, dtype=torch.float64)], 1).float()
    v_BSZ = torch.cat([z_BNZ, torch.zeros(batch, questions, width)], 1)
    answer_BMZ = z_BNZ[row, named_BMQ].mean(2)
    return Averaging((SHARP * w_BMD).float()[:, None], k_BSD[:, None], v_BSZ[:, None], answer_BMZ, named_BMQ)


def averaging_score(out_BHTD: Tensor, task: Averaging) -> Interval:
    """1 - |answer given - mean|^2 / |mean|^2, over questions, with an interval over sequences; 1 is exact.

    A question answered with something further from the mean than zero is counts as 0, which is what saying nothing scores.
    """
    error_BM = (out_BHTD[:, 0].cpu().double() - task.answer_BMZ).pow(2).sum(-1)
    share_BM = (1 - error_BM / task.answer_BMZ.double().pow(2).sum(-1)).clamp_min(0)
    return ratio_interval(share_BM.sum(1), torch.full((len(share_BM),), share_BM.shape[1]))
