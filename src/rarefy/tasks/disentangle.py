"""One attribute changed, the others kept, by swapping codes between two rows (Huang et al. 2024, RAVEL; SAEBench).

    x' = x_base + sum over chosen f of (z_f(source) - z_f(base)) d_f

Cause: how often the attribute then reads as the source's. Isolation: how often every other attribute still reads as the
base's. Read-outs are linear probes of the rows; RAVEL asks the model instead, which needs prompts that ask. Pairs differ in
every attribute. Doing nothing scores (0 + 1) / 2, and so does swapping everything: chance is 1/2.

Shape letters: N = rows, D = width, F = latents, L = swapped latents, P = pairs, V = values of all attributes together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..fidelity import Interval
from .codes import Lens
from .logistic import Probes, fit_probes
from .probing import by_document, mean_difference

SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 14, 20)
"""Few: any basis that spans the rows separates attributes when enough of it may be swapped."""
PAIRS = 1000


@dataclass(frozen=True)
class Attribute:
    """A property of rows with several values."""

    name: str
    value_N: Tensor
    """[N] int64 in 0..values - 1, -1 where the row has none."""
    values: int


@dataclass(frozen=True)
class ReadOut:
    """Probes of several attributes and pairs of rows to swap between: the same for every dictionary."""

    attributes: list[Attribute]
    probes: Probes
    """One problem a value, attributes one after another."""
    logit_NV: Tensor
    base_P: list[Tensor]
    """[2] of [P] rows: base rows on side 0 and on side 1."""
    source_P: list[Tensor]
    accuracy: list[float]
    """Of each attribute's read-out on side 1."""

    def parts(self, logit: Tensor) -> list[Tensor]:
        """Logits of each attribute."""
        return list(logit.split([a.values for a in self.attributes], dim=-1))


def read_out(x_ND: Tensor, attributes: Sequence[Attribute], side_N: Tensor, *, pairs: int = PAIRS, seed: int = 0, **how: Any) -> ReadOut:
    """Fit one-against-the-rest probes on side 0 and draw pairs of rows, both of one side, that differ in every attribute.

    Only rows whose attributes all read right take part, so that what a swap does is not confused with what the probe misses.
    `how` is for `fit_probes`.

    Raises:
        BadInput: fewer than two attributes, a value without rows, or no such pairs.
    """
    if len(attributes) < 2:
        raise BadInput("disentanglement needs at least two attributes")
    value_NA = torch.stack([a.value_N for a in attributes], 1)
    whole_N = (value_NA >= 0).all(1)
    y_NV = torch.cat([a.value_N[:, None] == torch.arange(a.values) for a in attributes], 1)
    fit_N = whole_N & (side_N == 0)
    probes = fit_probes(x_ND[fit_N], y_NV[fit_N], **how)
    logit_NV = probes.logits(x_ND)
    made = ReadOut(list(attributes), probes, logit_NV, [], [], [])
    reads_NA = torch.stack([part.argmax(1) for part in made.parts(logit_NV)], 1)
    held_N = whole_N & (side_N == 1)
    made.accuracy.extend((reads_NA == value_NA)[held_N].float().mean(0).tolist())
    generator = torch.Generator().manual_seed(seed)
    for side in (0, 1):
        at_R = (whole_N & (side_N == side) & (reads_NA == value_NA).all(1)).nonzero()[:, 0]
        if not len(at_R):
            raise BadInput(f"no row on side {side} whose attributes all read right")
        base, source = (at_R[torch.randint(len(at_R), (40 * pairs,), generator=generator)] for _ in range(2))
        keep = (value_NA[base] != value_NA[source]).all(1).nonzero()[:pairs, 0]
        if not len(keep):
            raise BadInput("no two rows differ in every attribute; take fewer or other attributes")
        made.base_P.append(base[keep])
        made.source_P.append(source[keep])
    return made


@dataclass(frozen=True)
class Disentangled:
    """Scores on side 1, mean over attributes; sizes were chosen on side 0."""

    score: Interval
    """(cause + isolation) / 2, its interval over documents of the base rows."""
    cause: float
    isolation: float
    sizes: list[int]
    """Latents swapped for each attribute."""


def disentangle(lens: Lens, made: ReadOut, side_N: Tensor, doc_N: Tensor, sizes: Sequence[int] = SIZES) -> Disentangled:
    """Swap each attribute's latents. They are those that contribute to its probes most and to the others' least:
    e_own^2 / sum of e over attributes, with e = |difference of mean code| |d_f . w| summed over an attribute's values."""
    order_AF = _ranked(lens, made, side_N)
    chosen, scores_P, causes, kept = [], [], [], []
    for a, order_F in enumerate(order_AF):
        tried = [s for s in sizes if s <= len(order_F)] or [len(order_F)]
        both = [_swap(lens, made, a, order_F[:size], 0) for size in tried]
        best = max(range(len(tried)), key=lambda i: float(both[i][0].mean() + both[i][1].mean()))
        cause_P, isolation_P = _swap(lens, made, a, order_F[: tried[best]], 1)
        chosen.append(tried[best])
        scores_P.append((cause_P + isolation_P) / 2)
        causes.append(float(cause_P.mean()))
        kept.append(float(isolation_P.mean()))
    score_P = torch.stack(scores_P).mean(0)
    many = len(order_AF)
    return Disentangled(by_document(score_P, torch.ones_like(score_P), doc_N[made.base_P[1]]), sum(causes) / many, sum(kept) / many, chosen)


def _ranked(lens: Lens, made: ReadOut, side_N: Tensor) -> list[Tensor]:
    """Latents of each attribute, best first."""
    at_R = ((side_N == 0) & torch.stack([a.value_N >= 0 for a in made.attributes]).all(0)).nonzero()[:, 0]
    y_RV = torch.cat([a.value_N[at_R, None] == torch.arange(a.values) for a in made.attributes], 1)
    effect_FV = (mean_difference(lens.codes.take(at_R), y_RV) * (lens.decoder_FD @ made.probes.weight_PC)).abs()
    effect_FA = torch.stack([part.sum(1) for part in made.parts(effect_FV)], 1)
    score_FA = effect_FA.square() / effect_FA.sum(1, keepdim=True).clamp_min(1e-30)
    return list(score_FA.argsort(0, descending=True).T)


def _swap(lens: Lens, made: ReadOut, a: int, latent_L: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """[P] cause and [P] isolation of attribute `a`."""
    z_NL = lens.codes.columns(latent_L)
    base_P, source_P = made.base_P[side], made.source_P[side]
    change_PV = (z_NL[source_P] - z_NL[base_P]) @ (lens.decoder_FD[latent_L] @ made.probes.weight_PC)
    return _read(made, made.logit_NV[base_P] + change_PV, a, base_P, source_P)


def _read(made: ReadOut, logit_PV: Tensor, a: int, base_P: Tensor, source_P: Tensor) -> tuple[Tensor, Tensor]:
    cause_P, same = torch.empty(0), []
    for b, (attribute, part) in enumerate(zip(made.attributes, made.parts(logit_PV), strict=True)):
        if b == a:
            cause_P = (part.argmax(1) == attribute.value_N[source_P]).float()
        else:
            same.append((part.argmax(1) == attribute.value_N[base_P]).float())
    return cause_P, torch.stack(same).mean(0)


def control(lens: Lens, made: ReadOut, doc_N: Tensor, swaps: int = 2) -> Interval:
    """Cause when at most `swaps` codes are changed a row, those that raise the source's value over the base's most (Makelov et al.
    2024: edits by few feature vectors). Mean over attributes, interval over documents of the base rows."""
    base_P, source_P = made.base_P[1], made.source_P[1]
    effect_FV = lens.decoder_FD @ made.probes.weight_PC
    causes: list[Tensor] = []
    begin = 0
    for a, attribute in enumerate(made.attributes):
        own_FV = effect_FV[:, begin : begin + attribute.values]
        begin += attribute.values
        parts = []
        for some_b, some_s in zip(base_P.split(200), source_P.split(200), strict=True):
            rows, at = torch.cat([some_b, some_s]).unique(return_inverse=True)
            z_RF = lens.codes.rows(rows)
            change_PF = z_RF[at[len(some_b) :]] - z_RF[at[: len(some_b)]]
            gain_PF = change_PF * (own_FV[:, attribute.value_N[some_s]] - own_FV[:, attribute.value_N[some_b]]).T
            keep_PF = torch.zeros_like(change_PF).scatter(1, gain_PF.topk(min(swaps, gain_PF.shape[1]), dim=1).indices, 1.0)
            logit_PV = made.logit_NV[some_b] + (change_PF * keep_PF * (gain_PF > 0)) @ effect_FV
            parts.append(_read(made, logit_PV, a, some_b, some_s)[0])
        causes.append(torch.cat(parts))
    cause_P = torch.stack(causes).mean(0)
    return by_document(cause_P, torch.ones_like(cause_P), doc_N[base_P])
