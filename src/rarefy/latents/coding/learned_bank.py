"""A bank of log-Gabors learned from pictures by its few parameters (after Ladret et al. 2023, arXiv 2312.14685, whose learned
kernels are free pixels; here they stay log-Gabors, so that what became of their bandwidths can be read off).

    min over parameters p and codes z of  sum over pictures of  1/2 ||x - sum_k d_k(p) * z_k||^2 + weight ||z||_1

In turns: codes by FISTA from where they stood, then Adam on p at fixed codes. At the codes' optimum the derivative of the
objective in p is that at fixed codes (Danskin), so this is descent on the objective itself; the best bank seen is returned.

Shape letters: B = pictures, H, W = rows and columns, P = pairs of kernels, K = 2P kernels, S = pixels a side of a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from ...errors import BadInput
from ...method import positive
from ...selection import check_finite
from .convolutional import Bank, check_side, convolutional_codes

PARAMETERS = Bank._fields


class LearnedBank(NamedTuple):
    """What was learned, and how the objective fell."""

    bank: Bank
    codes: Tensor
    """[B, K, H, W] on that bank."""
    losses: list[float]
    """The objective a picture with codes solved for: of the bank given, then after every round."""


def objective(pictures_BHW: Tensor, codes_BKHW: Tensor, kernels_KSS: Tensor, weight: float) -> Tensor:
    """Mean over pictures of 1/2 ||x - sum_k d_k * z_k||^2 + weight ||z||_1; differentiable in the kernels."""
    made_BHW = conv2d(codes_BKHW, kernels_KSS.to(codes_BKHW).flip(1, 2)[None], padding=kernels_KSS.shape[1] // 2)[:, 0]
    return ((pictures_BHW - made_BHW).square().sum() / 2 + weight * codes_BKHW.abs().sum()) / len(pictures_BHW)


def learn_bank(
    pictures_BHW: Tensor, bank: Bank, side: int, weight: float, *, learned: Collection[str] = PARAMETERS, rounds: int = 40,
    steps: int = 5, lr: float = 0.04, tolerance: float = 1e-3, most: int = 30,
) -> LearnedBank:
    """Learn parameters of a bank.

    Args:
        pictures_BHW: to learn from. bank: to begin at. side: S, odd. weight: of the l1 norm, > 0.
        learned: which of orientation, bandwidth, frequency and octaves; the others stay.
        rounds: of codes and steps. steps: of Adam a round. lr: about how far a step moves the orientation in radians, the logit of
            2 f_0, and the logarithms of the others. tolerance, most: of FISTA, as for `convolutional_codes`.

    Raises:
        BadInput: shapes that do not fit, names unknown, values that are not finite or numbers out of range.
    """
    check_side(side)
    _check(bank, learned, weight)
    positive("rounds", rounds)
    positive("steps", steps)
    raw = {name: value.requires_grad_(name in learned) for name, value in zip(PARAMETERS, _raw(bank), strict=True)}
    optimiser = torch.optim.Adam([value for value in raw.values() if value.requires_grad], lr=lr)
    codes, losses, best = None, [], None
    for turn in range(rounds + 1):
        now = _read(*(value.detach().clone() for value in raw.values()))
        kernels = now.kernels(side)
        codes = convolutional_codes(pictures_BHW, kernels, weight, start=codes, tolerance=tolerance, most=most).codes
        losses.append(float(objective(pictures_BHW, codes, kernels, weight)))
        if best is None or losses[-1] < min(losses[:-1]):
            best = now, codes
        if turn < rounds:
            for _ in range(steps):
                optimiser.zero_grad()
                with torch.enable_grad():
                    objective(pictures_BHW, codes, _read(*raw.values()).kernels(side), weight).backward()
                optimiser.step()
    assert best is not None
    return LearnedBank(*best, losses)


def _check(bank: Bank, learned: Collection[str], weight: float) -> None:
    if not learned or not set(learned) <= set(PARAMETERS):
        raise BadInput(f"learned={list(learned)} must be some of {', '.join(PARAMETERS)}")
    if not 0 < weight < math.inf:
        raise BadInput(f"weight={weight} must be above 0: without a price on codes any bank that spans the pictures is as good as another")
    if {v.shape for v in bank} != {bank.orientation.shape} or bank.orientation.ndim != 1 or not len(bank.orientation):
        raise BadInput(f"a bank has parameters of shapes {[list(v.shape) for v in bank]}; need four alike [pairs], at least one pair")
    for name, value in zip(PARAMETERS, bank, strict=True):
        check_finite(value, name)
    if not bool((bank.bandwidth > 0).all() and (bank.octaves > 0).all() and (bank.frequency > 0).all() and (bank.frequency < 0.5).all()):
        raise BadInput("a bank's bandwidths and octaves must be above 0 and its frequencies in (0, 0.5)")


def _raw(bank: Bank) -> tuple[Tensor, ...]:
    """What Adam moves: free of bounds, float64, copies."""
    theta, width, frequency, octaves = (v.detach().double().clone() for v in bank)
    return theta.deg2rad(), width.log(), (2 * frequency).logit(), octaves.log()


def _read(theta: Tensor, width: Tensor, frequency: Tensor, octaves: Tensor) -> Bank:
    return Bank(theta.rad2deg(), width.exp(), frequency.sigmoid() / 2, octaves.exp())
