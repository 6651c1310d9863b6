"""Taking a concept out by ablating the latents attributed to it (Marks et al. 2024; Karvonen et al. 2024, SCR and TPP).

A latent's attribution to a concept is the difference of its mean code with and without the concept, times what the latent
adds to the concept's probe: (mean z_f | c - mean z_f | not c) (d_f . w_c). The n latents with the greatest are set to their
mean, over rows that have the concept and rows that do not, weighed alike. (The papers set them to 0. That also moves every
row's logit to one side of the probe's threshold, which then hides what the probe still knows.)

Shape letters: N = rows, D = width, F = latents, L = chosen latents, C = concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..fidelity import Interval
from ..method import positive
from .codes import Lens
from .logistic import Probes, balanced, fit_probes, right
from .probing import by_document, mean_difference


def attribution(lens: Lens, probes: Probes, y_NC: Tensor) -> Tensor:
    """[F, C] what each latent contributes to telling each concept, by its probe."""
    return mean_difference(lens.codes, y_NC) * (lens.decoder_FD @ probes.weight_PC)


def without(lens: Lens, probes: Probes, logit_NC: Tensor, latent_L: Tensor, mean_L: Tensor) -> Tensor:
    """[N, C] the probes' logits with latents set to `mean_L` in every row."""
    return logit_NC - (lens.codes.columns(latent_L) - mean_L) @ (lens.decoder_FD[latent_L] @ probes.weight_PC)


# ------------------------------------------------------------------------------------------ targeted probe perturbation


@dataclass(frozen=True)
class Perturbation:
    """Targeted probe perturbation at one n."""

    score: Interval
    """Mean over concepts of: accuracy lost by its own probe less accuracy lost by the others' (balanced; at most 1/2)."""
    own_C: Tensor
    other_C: Tensor


def perturb(
    lens: Lens, x_ND: Tensor, y_NC: Tensor, probes: Probes, side_N: Tensor, doc_N: Tensor, n: Sequence[int] = (2, 10, 50),
) -> dict[int, Perturbation]:
    """Ablate each concept's latents; its own probe should fail and no other.

    Args:
        y_NC: at least two concepts. probes: theirs, fitted on side 0. side_N: 0 attribute on, 1 judge on.
    """
    if y_NC.shape[1] < 2:
        raise BadInput("perturbation compares one concept's probe with the others'; give at least two concepts")
    fit_R, judge_R = ((side_N == s).nonzero()[:, 0] for s in (0, 1))
    chosen = lens.take(fit_R)
    effect_FC, mean_FC = attribution(chosen, probes, y_NC[fit_R]), chosen.codes.sums(balanced(y_NC[fit_R]))
    held, y_RC, x_RD = lens.take(judge_R), y_NC[judge_R], x_ND[judge_R]
    s_RC, logit_RC = balanced(y_RC), probes.logits(x_RD)
    before_RC, out = right(logit_RC, y_RC), {}
    others = y_RC.shape[1] - 1
    for each in n:
        top_LC = effect_FC.topk(min(positive("n", each), lens.codes.width), dim=0).indices
        score_R, own, other = torch.zeros(len(judge_R)), [], []
        for c in range(others + 1):
            lost_RC = s_RC * (before_RC - right(without(held, probes, logit_RC, top_LC[:, c], mean_FC[top_LC[:, c], c]), y_RC))
            own_R, other_R = lost_RC[:, c], (lost_RC.sum(1) - lost_RC[:, c]) / others
            score_R += (own_R - other_R) / (others + 1)
            own.append(own_R.sum())
            other.append(other_R.sum())
        out[each] = Perturbation(by_document(score_R, s_RC.mean(1), doc_N[judge_R]), torch.stack(own), torch.stack(other))
    return out


# ------------------------------------------------------------------------------------------- spurious correlation removal


@dataclass(frozen=True)
class Confounded:
    """Two concepts made to co-occur, and the probes of that; the same for every dictionary."""

    wanted: str
    spurious: str
    y_N: Tensor
    """[N] bool: the wanted concept."""
    spurious_N: Tensor
    biased: Probes
    """Of the wanted concept, fitted only where both concepts or neither are there."""
    oracle: Probes
    """Of the wanted concept, fitted on all four combinations alike."""
    of_spurious: Probes


def _cells(a_N: Tensor, b_N: Tensor) -> Tensor:
    """[N] number of the combination of two bools."""
    return a_N.long() * 2 + b_N.long()


def _alike(cell_N: Tensor) -> Tensor:
    """[N, 1] weights with which the combinations that occur weigh the same."""
    count = torch.bincount(cell_N, minlength=4)
    return (1.0 / (count[cell_N] * (count > 0).sum()))[:, None].float()


def confound(x_ND: Tensor, y_NC: Tensor, pairs: Sequence[tuple[int, int]], names: Sequence[str], side_N: Tensor, **how: Any) -> list[Confounded]:
    """Probes of each pair (wanted, spurious) of concepts, fitted on side 0, all in one go.

    Args:
        names: of the C concepts. how: for `fit_probes`.

    Raises:
        BadInput: the four combinations of a pair do not all occur on side 0.
    """
    at_R = (side_N == 0).nonzero()[:, 0]
    y_RC = y_NC[at_R]
    labels, weights = [], []
    for a, b in pairs:
        wanted_R, spurious_R = y_RC[:, a], y_RC[:, b]
        cell_R = _cells(wanted_R, spurious_R)
        if int((torch.bincount(cell_R, minlength=4) > 0).sum()) < 4:
            raise BadInput(f"{names[a]} and {names[b]} do not occur in all four combinations; choose concepts that can be told apart")
        same_R, alike_R1 = wanted_R == spurious_R, _alike(cell_R)
        one_sided_R = same_R * torch.where(wanted_R, 0.5 / (same_R & wanted_R).sum(), 0.5 / (same_R & ~wanted_R).sum())
        labels += [wanted_R, wanted_R, spurious_R]
        weights += [one_sided_R, alike_R1[:, 0], alike_R1[:, 0]]
    if not pairs:
        return []
    fitted = fit_probes(x_ND[at_R], torch.stack(labels, 1), weight_NC=torch.stack(weights, 1), **how)
    out = []
    for i, (a, b) in enumerate(pairs):
        probes = (Probes(fitted.weight_PC[:, [j]], fitted.bias_C[[j]]) for j in range(3 * i, 3 * i + 3))
        out.append(Confounded(names[a], names[b], y_NC[:, a], y_NC[:, b], *probes))
    return out


@dataclass(frozen=True)
class Removal:
    """Spurious correlation removal at one n, over several confounded pairs."""

    score: Interval
    """Accuracy regained / accuracy that an unbiased probe has more than the biased one (both summed over pairs); at best about 1."""
    base_P: Tensor
    ablated_P: Tensor
    oracle_P: Tensor
    """[pairs] accuracies where the four combinations weigh the same."""


def remove(
    lens: Lens, x_ND: Tensor, pairs: Sequence[Confounded], side_N: Tensor, doc_N: Tensor, n: Sequence[int] = (2, 10, 50),
) -> dict[int, Removal]:
    """Ablate the latents attributed to the spurious concept and see how far the biased probe recovers.

    Args:
        pairs: at least one, with all four combinations on side 1 too.
    """
    if not pairs:
        raise BadInput("no pairs of concepts to tell apart; give at least one of `confound`")
    fit_R, judge_R = ((side_N == s).nonzero()[:, 0] for s in (0, 1))
    chosen, held, x_RD = lens.take(fit_R), lens.take(judge_R), x_ND[judge_R]
    gained: dict[int, Tensor] = {each: torch.zeros(len(judge_R)) for each in n}
    possible_R, base, oracle = torch.zeros(len(judge_R)), [], []
    ablated: dict[int, list[Tensor]] = {each: [] for each in n}
    for pair in pairs:
        # Between rows alike in the wanted concept, so that latents of the wanted one are not attributed to the spurious one.
        s_R = _alike(_cells(pair.y_N[fit_R], pair.spurious_N[fit_R]))[:, 0]
        signed_R2 = torch.stack([torch.where(pair.spurious_N[fit_R], 2.0, -2.0) * s_R, s_R], 1)
        difference_F, mean_F = chosen.codes.sums(signed_R2).T
        effect_F = difference_F * (lens.decoder_FD @ pair.of_spurious.weight_PC)[:, 0]
        y_R1 = pair.y_N[judge_R, None]
        w_R = _alike(_cells(y_R1[:, 0], pair.spurious_N[judge_R]))[:, 0]
        logit_R1 = pair.biased.logits(x_RD)
        before_R, best_R = right(logit_R1, y_R1)[:, 0], right(pair.oracle.logits(x_RD), y_R1)[:, 0]
        possible_R += w_R * (best_R - before_R)
        base.append((w_R * before_R).sum())
        oracle.append((w_R * best_R).sum())
        for each in n:
            top_L = effect_F.topk(min(positive("n", each), lens.codes.width)).indices
            after_R = right(without(held, pair.biased, logit_R1, top_L, mean_F[top_L]), y_R1)[:, 0]
            gained[each] += w_R * (after_R - before_R)
            ablated[each].append((w_R * after_R).sum())
    stack = torch.stack
    return {e: Removal(by_document(gained[e], possible_R, doc_N[judge_R]), stack(base), stack(ablated[e]), stack(oracle)) for e in n}


def confounded_pairs(y_NC: Tensor, side_N: Tensor, most: int = 8, least: int = 40) -> list[tuple[int, int]]:
    """Pairs of concepts whose four combinations all have `least` rows or more on both sides, those with most rows first.

    Each concept is used in at most two pairs, so that a few frequent ones do not fill the list.
    """
    found: list[tuple[int, int, int]] = []
    counts = []
    for side in (0, 1):
        y = y_NC[side_N == side].float()
        both, one, n = y.T @ y, y.sum(0), len(y)
        counts.append(torch.stack([both, one[:, None] - both, one[None] - both, n - one[:, None] - one[None] + both]).amin(0))
    least_CC = torch.minimum(*counts)
    for a in range(len(least_CC)):
        for b in range(len(least_CC)):
            if a != b and least_CC[a, b] >= least:
                found.append((-int(least_CC[a, b]), a, b))
    used, out = [0] * len(least_CC), []
    for _, a, b in sorted(found):
        if len(out) < most and used[a] < 2 and used[b] < 2 and (b, a) not in out:
            out.append((a, b))
            used[a] += 1
            used[b] += 1
    return out
