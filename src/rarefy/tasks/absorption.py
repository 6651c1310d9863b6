"""Absorption: a concept's own latents fall silent where a more specific latent carries the concept (Chanin et al. 2024).

On rows of the concept that a linear probe gets right, absorbed means: every main latent of the concept is silent, and the
active latent with the greatest effect on the probe's logit points along the probe and is ahead of the second by a margin.
Main latents are those a k-sparse probe needs: k grows while F1 rises by more than `jump`. The effect of taking latent f
out of a row is z_f (d_f . w) exactly. The paper ablates on the model's spelling logit; here the logit is the probe's.

Shape letters: N = rows, D = width, F = latents, C = concepts, R = chosen rows, K = candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..errors import BadInput
from ..fidelity import Interval
from .codes import Codes, Lens
from .logistic import Probes, f1, fit_probes
from .probing import by_document, mean_difference

CANDIDATES = 5
_AT_ONCE = 512


@dataclass(frozen=True)
class Absorption:
    """Absorbed share of the rows of C concepts that the probe gets right."""

    rate: Interval
    """Over all concepts, each concept weighing the same; its interval over documents."""
    rate_C: Tensor
    silent_C: Tensor
    """Share of those rows on which the main latents are silent, absorbed or not."""
    main: list[list[int]]
    """Main latents of each concept; more than one is feature splitting."""

    @property
    def splits(self) -> float:
        """Mean number of main latents."""
        return sum(map(len, self.main)) / len(self.main)


def main_latents(codes: Codes, y_NC: Tensor, *, most: int = CANDIDATES, jump: float = 0.03) -> list[list[int]]:
    """Per concept the latents that its k-sparse probe needs: one more as long as F1 rises by more than `jump`, at most `most`.

    Candidates are the latents whose mean code is raised most by the concept.
    """
    most = min(most, codes.width)
    top_CK = mean_difference(codes, y_NC).topk(most, dim=0).indices.T
    unique, inverse = top_CK.unique(return_inverse=True)
    read_CNK = codes.columns(unique).T[inverse].transpose(1, 2)
    score_CK = torch.stack([f1(fit_probes(read_CNK[..., :k], y_NC).logits(read_CNK[..., :k]), y_NC) for k in range(1, most + 1)], 1)
    out = []
    for latents, scores in zip(top_CK.tolist(), score_CK.tolist(), strict=True):
        k = 1
        while k < most and scores[k] > scores[k - 1] + jump:
            k += 1
        out.append(latents[:k])
    return out


def absorption(
    lens: Lens, x_ND: Tensor, y_NC: Tensor, probes: Probes, side_N: Tensor, doc_N: Tensor, *, jump: float = 0.03, margin: float = 1.0,
    aligned: float | None = None,
) -> Absorption:
    """How often concepts are absorbed.

    Args:
        probes: dense probes of the C concepts on rows, fitted on side 0.
        side_N: 0 choose main latents on, 1 count on.
        margin: logits by which the absorbing latent leads the next one (1 in the paper).
        aligned: least cosine of its direction with the probe. Default 1.2 / sqrt(D): the paper's 0.025 at its width of 2,304, as
            many standard deviations of the cosine of random directions.

    Raises:
        BadInput: no row of any concept that its probe gets right on side 1.
    """
    least = 1.2 / lens.decoder_FD.shape[1] ** 0.5 if aligned is None else aligned
    main = main_latents(lens.codes.take((side_N == 0).nonzero()[:, 0]), y_NC[side_N == 0], jump=jump)
    right_NC = y_NC & (probes.logits(x_ND) > 0) & (side_N == 1)[:, None]
    count_C = right_NC.sum(0)
    if not count_C.any():
        raise BadInput("no row of any concept is one that its probe gets right; give more rows or other concepts")
    absorbed_NC, silent_NC = torch.zeros_like(right_NC), torch.zeros_like(right_NC)
    for c, own in enumerate(main):
        at_R = right_NC[:, c].nonzero()[:, 0]
        at_R = at_R[(lens.codes.columns(torch.tensor(own))[at_R] <= 0).all(1)]
        silent_NC[at_R, c] = True
        w_D = probes.weight_PC[:, c]
        effect_F, cosine_F = lens.decoder_FD @ w_D, cosine_similarity(lens.decoder_FD, w_D[None], dim=-1)
        for some in at_R.split(_AT_ONCE):
            absorbed_NC[some, c] = _dominated(lens.codes.rows(some), effect_F, cosine_F, margin, least)
    there = count_C > 0
    weight_C = torch.where(there, 1.0 / count_C.clamp_min(1), 0.0)
    rate = by_document((absorbed_NC * weight_C).sum(1), (right_NC * weight_C).sum(1), doc_N)
    rate_C, silent_C = (v.sum(0) / count_C.clamp_min(1) for v in (absorbed_NC, silent_NC))
    return Absorption(rate, rate_C, silent_C, main)


def _dominated(z_RF: Tensor, effect_F: Tensor, cosine_F: Tensor, margin: float, aligned: float) -> Tensor:
    """[R] bool: whether one active latent, aligned with the probe, is ahead of all others."""
    effect_RF = z_RF.clamp_min(0) * effect_F
    top_R2, at_R2 = effect_RF.topk(min(2, len(effect_F)), dim=1)
    second_R = top_R2[:, 1].clamp_min(0) if top_R2.shape[1] > 1 else torch.zeros(len(top_R2))
    return (top_R2[:, 0] - second_R >= margin) & (cosine_F[at_R2[:, 0]] >= aligned)
