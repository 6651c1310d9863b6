"""How much of a known state latents hold: the board of a game, square by square.

Coverage and reconstruction are those of Karvonen et al. 2024 (arXiv 2408.00113, sec. 3): a latent above a threshold is taken as a
classifier of a label. Latents and thresholds are chosen on some rows and measured on others.

Shape letters: N = rows, G = latents, C = labels, H = thresholds, M = activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput
from .codes import Codes
from .logistic import fit_probes
from .recovered import f1

SHARES = tuple(i / 10 for i in range(10))
"""Thresholds, as shares of a latent's largest activation on the rows chosen on."""
PRECISE = 0.95
"""Precision from which a latent may speak in the reconstruction."""
_AT_ONCE = 8192


@dataclass(frozen=True)
class Held:
    """What latents tell of C labels, measured on rows that nothing was chosen on."""

    coverage: float
    """Mean over labels of the F1 of the best single latent above its best threshold."""
    reconstruction: float
    """Mean over rows of the F1 of the labels that precise latents vote for; 0 for a row of which nothing is said."""
    auroc: float
    """Mean over labels of the area under the curve of the latent chosen for coverage, its activation as the score."""
    f1_C: Tensor
    latent_C: Tensor


def held_state(codes: Codes, labels_NC: Tensor, choose_N: Tensor) -> Held:
    """Judge codes of rows against labels.

    Args:
        codes: signed codes count by their absolute value.
        labels_NC: bool. choose_N: bool, rows on which latents and thresholds are chosen; the others are measured on.

    Raises:
        BadInput: shapes that differ, or nothing to choose or to measure on.
    """
    if labels_NC.ndim != 2 or len(labels_NC) != codes.n or choose_N.shape != (codes.n,):
        raise BadInput(f"{codes.n} rows of codes, labels {list(labels_NC.shape)} and choose {list(choose_N.shape)} do not fit together")
    if choose_N.all() or not choose_N.any():
        raise BadInput("choose needs rows of both kinds: some to choose latents on and some to measure them on")
    row_M, latent_M, value_M, _ = codes.by_row
    chosen = choose_N[row_M]
    most_G = torch.zeros(codes.width).scatter_reduce_(0, latent_M[chosen], value_M[chosen].abs(), "amax")
    true_HGC, fired_HG = _counts(codes, labels_NC, choose_N, most_G)
    f1_HGC = 2 * true_HGC / (fired_HG[..., None] + labels_NC[choose_N].sum(0)).clamp_min(1)
    flat_C = f1_HGC.flatten(0, 1).argmax(0)
    share_C, latent_C = torch.tensor(SHARES)[flat_C // codes.width], flat_C % codes.width
    value_NC = codes.columns(latent_C).abs()[~choose_N]
    truth_NC = labels_NC[~choose_N]
    f1_C = f1((value_NC > share_C * most_G[latent_C]) & (value_NC > 0), truth_NC).float()
    precise_HGC = (true_HGC >= PRECISE * fired_HG[..., None]) & (true_HGC >= 10)
    said_NC = _votes(codes, precise_HGC, most_G)[~choose_N]
    return Held(float(f1_C.mean()), float(f1(said_NC.T, truth_NC.T).mean()), float(auroc(value_NC, truth_NC).mean()), f1_C, latent_C)


def _pieces(codes: Codes) -> list[tuple[int, Tensor]]:
    """(first row, [n, G] absolute activations) of a piece of rows at a time."""
    row_M, latent_M, value_M, begin_N = codes.by_row
    edges = begin_N[torch.arange(0, codes.n + _AT_ONCE, _AT_ONCE).clamp(max=codes.n)]
    out = []
    for i, (a, b) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        first = i * _AT_ONCE
        dense = torch.zeros(min(_AT_ONCE, codes.n - first), codes.width)
        out.append((first, dense.index_put_((row_M[a:b] - first, latent_M[a:b]), value_M[a:b].abs())))
    return out


def _counts(codes: Codes, labels_NC: Tensor, choose_N: Tensor, most_G: Tensor) -> tuple[Tensor, Tensor]:
    """([H, G, C] rows where latent and label are on, [H, G] rows where the latent is on), of the rows chosen on."""
    true_HGC = torch.zeros(len(SHARES), codes.width, labels_NC.shape[1])
    fired_HG = torch.zeros(len(SHARES), codes.width)
    for first, value_nG in _pieces(codes):
        here = choose_N[first : first + len(value_nG)]
        value_nG, label_nC = value_nG[here], labels_NC[first : first + len(here)][here].float()
        for h, share in enumerate(SHARES):
            on_nG = ((value_nG > share * most_G) & (value_nG > 0)).float()
            true_HGC[h] += on_nG.T @ label_nC
            fired_HG[h] += on_nG.sum(0)
    return true_HGC, fired_HG


def _votes(codes: Codes, precise_HGC: Tensor, most_G: Tensor) -> Tensor:
    """[N, C] bool: a latent that is precise for the label at some threshold is above it."""
    said = []
    for _, value_nG in _pieces(codes):
        vote_nC = torch.zeros(len(value_nG), precise_HGC.shape[-1], dtype=torch.bool)
        for share, precise_GC in zip(SHARES, precise_HGC, strict=True):
            on_nG = ((value_nG > share * most_G) & (value_nG > 0)).float()
            vote_nC |= (on_nG @ precise_GC.float()) > 0
        said.append(vote_nC)
    return torch.cat(said)


def auroc(score_NC: Tensor, truth_NC: Tensor) -> Tensor:
    """[C] area under the ROC curve (Mann-Whitney, ties count half); NaN for a label that all rows have, or none."""
    out = []
    for score_N, truth_N in zip(score_NC.T.contiguous(), truth_NC.T, strict=True):
        ordered = score_N.sort().values
        rank_N = (torch.searchsorted(ordered, score_N) + torch.searchsorted(ordered, score_N, right=True) + 1).double() / 2
        yes = int(truth_N.sum())
        no = len(truth_N) - yes
        out.append((rank_N[truth_N].sum() - yes * (yes + 1) / 2) / (yes * no) if yes and no else torch.tensor(torch.nan, dtype=torch.float64))
    return torch.stack(out).float()


def probed(x_ND: Tensor, labels_NC: Tensor, choose_N: Tensor) -> float:
    """Mean over labels of the balanced accuracy of a linear probe, fitted on the chosen rows: what latents could hold at best."""
    probes = fit_probes(x_ND[choose_N], labels_NC[choose_N])
    said_NC, truth_NC = probes.logits(x_ND[~choose_N]) > 0, labels_NC[~choose_N]
    found_C = (said_NC & truth_NC).sum(0) / truth_NC.sum(0).clamp_min(1)
    refused_C = (~said_NC & ~truth_NC).sum(0) / (~truth_NC).sum(0).clamp_min(1)
    return float((found_C + refused_C).mean() / 2)
