"""Mutual feature regularisation (MFR; Marks et al. 2024, "Enhancing Neural Network Interpretability with Feature-Aligned
Sparse Autoencoders", arXiv 2411.01220).

R TopK autoencoders of different seeds learn from the same rows, and pay for features that the others lack:
L = sum_r loss_r + alpha (1 - MMCS), MMCS the mean over pairs of dictionaries, both ways, of the mean over the features of one
of the greatest cosine with a feature of the other. The first dictionary is the one in use.

Departures: the paper first starts anew features that are too seldom active; here the AuxK loss of each autoencoder keeps
them alive.

Shape letters: C = features at a time, D = width, F = features, R = dictionaries.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..errors import BadInput
from ..method import Loss, not_negative
from .dictionary import Widths
from .topk import TopK

_MOST = 8
_AT_ONCE = 1024
"""Features whose cosines with all of another dictionary exist at a time."""


class MutualFeature(TopK):
    """TopK beside `parallel - 1` others that must find the same features.

    Args:
        parallel: dictionaries R, in 2..8. alpha: weight of the penalty, on squared error a channel. Others as for TopK.
    """

    name = "latents/mutual_feature"
    row_counters = ("idle_F", *(f"others.{i}.idle_F" for i in range(_MOST - 1)))

    def __init__(
        self, d_in: Widths, width: int, k: int = 32, d_out: Widths = 0, parallel: int = 2, alpha: float = 0.1, aux_alpha: float = 1 / 32,
        aux_k: int = 0, dead_after: int = 10_000_000, seed: int = 0,
    ) -> None:
        super().__init__(d_in, width, k, d_out, aux_alpha, aux_k, dead_after, seed)
        if type(parallel) is not int or not 2 <= parallel <= _MOST:
            raise BadInput(f"parallel={parallel!r} must be a whole number in 2..{_MOST}: dictionaries trained side by side")
        self.alpha = not_negative("alpha", alpha)
        seeds = (seed + 7919 * i for i in range(1, parallel))            # far from the seeds a user counts up
        self.others = nn.ModuleList([TopK(d_in, width, k, d_out, aux_alpha, aux_k, dead_after, s) for s in seeds])

    @property
    def dictionaries(self) -> list[TopK]:
        """All R, the one in use first."""
        return [self, *(other for other in self.others if isinstance(other, TopK))]

    @torch.no_grad()
    def initialise(self, x: Tensor, y: Tensor | None = None) -> None:
        """Scale and centre of every dictionary."""
        super().initialise(x, y)
        for other in self.dictionaries[1:]:
            other.initialise(x, y)

    def loss(self, x: Tensor, y: Tensor) -> Loss:
        """mse + aux of the dictionary in use, the losses of the others, and the penalty; diagnostics are of the first."""
        own = super().loss(x, y)
        others = sum((other.loss(x, y).total for other in self.dictionaries[1:]), y.new_zeros(()))
        pairs = list(itertools.combinations(self.dictionaries, 2))
        alike = sum((agreement(a.W_dec_FD, b.W_dec_FD) for a, b in pairs), y.new_zeros(())) / len(pairs)
        penalty = self.alpha * (1 - alike)
        return Loss(own.total + others + penalty, {**own.parts, "others": others, "agreement": penalty})

    def before_step(self) -> None:
        """As TopK, for every dictionary."""
        super().before_step()
        for other in self.dictionaries[1:]:
            other.before_step()

    def after_step(self, step: int) -> None:
        """As TopK, for every dictionary."""
        super().after_step(step)
        for other in self.dictionaries[1:]:
            other.after_step(step)


def agreement(a_FD: Tensor, b_FD: Tensor) -> Tensor:
    """Mean greatest cosine of the rows of each with those of the other, both ways: a scalar, 1 where they hold the same rows.

    Which row is nearest is found a piece at a time, without gradients; gradients are those of the F + F cosines found.
    """
    a_FD, b_FD = normalize(a_FD, dim=-1), normalize(b_FD, dim=-1)
    with torch.no_grad():
        of_a, best_F, of_b_F = [], torch.full((len(b_FD),), -torch.inf).to(b_FD), torch.zeros(len(b_FD), dtype=torch.long, device=b_FD.device)
        for start, a_CD in zip(range(0, len(a_FD), _AT_ONCE), a_FD.split(_AT_ONCE), strict=True):
            cosine_CF = a_CD @ b_FD.T
            of_a.append(cosine_CF.argmax(1))
            value_F, row_F = cosine_CF.max(0)
            better_F = value_F > best_F
            best_F, of_b_F = torch.where(better_F, value_F, best_F), torch.where(better_F, row_F + start, of_b_F)
    from_a, from_b = (a_FD * b_FD[torch.cat(of_a)]).sum(-1).mean(), (b_FD * a_FD[of_b_F]).sum(-1).mean()
    return (from_a + from_b) / 2
