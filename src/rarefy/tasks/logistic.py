"""Logistic regression, many problems at once: the probe with which concepts are read out of rows and codes.

    min over w, b of  sum_n s_n log(1 + exp(-y_n (x_n . w + b))) + l2 / 2 |w|^2,  y in {-1, 1},  sum_n s_n = 1

on features brought to mean 0 and variance 1. Rows are weighted so that both classes of a problem weigh one half, whatever
their numbers: accuracy is then balanced accuracy, and 1/2 is chance for every concept, rare or common.

Shape letters: N = rows, P = features, C = problems.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..errors import BadInput
from ..selection import check_finite

L2 = 1e-3


@dataclass(frozen=True)
class Probes:
    """Linear read-outs in the features' own units: logit = x . weight + bias."""

    weight_PC: Tensor
    """[P, C] of shared features, [C, P] transposed from problems with features of their own."""
    bias_C: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """[N, C] for shared features [N, P] or own ones [C, N, P]."""
        if x.ndim == 2:
            return x @ self.weight_PC + self.bias_C
        return torch.einsum("cnp,pc->nc", x, self.weight_PC) + self.bias_C


def balanced(y_NC: Tensor) -> Tensor:
    """[N, C] weights: the rows of each class of a problem share one half. Raises BadInput where a class has no row."""
    yes_C = y_NC.sum(0)
    if (yes_C == 0).any() or (yes_C == len(y_NC)).any():
        bad = int(((yes_C == 0) | (yes_C == len(y_NC))).nonzero()[0])
        raise BadInput(f"problem {bad} has {int(yes_C[bad])} of {len(y_NC)} rows in its class; a probe needs rows in it and out of it")
    return torch.where(y_NC, 0.5 / yes_C, 0.5 / (len(y_NC) - yes_C)).float()


def fit_probes(x: Tensor, y_NC: Tensor, *, weight_NC: Tensor | None = None, l2: float = L2, most_steps: int = 200) -> Probes:
    """Probes of C problems by L-BFGS (Liu & Nocedal 1989) with a strong Wolfe line search, jointly: the objective is a sum.

    Args:
        x: [N, P] features that all problems share, or [C, N, P], each its own.
        y_NC: bool, in the class or not. weight_NC: weights of rows, each column summing to 1; default `balanced`.
        l2: weight of |w|^2 / 2, of features with variance 1; the bias is free.

    Raises:
        BadInput: shapes that do not fit, a class without rows, features that are not finite, l2 not positive.
    """
    if x.ndim not in (2, 3) or x.shape[-2] != len(y_NC) or (x.ndim == 3 and len(x) != y_NC.shape[1]):
        raise BadInput(f"features of shape {list(x.shape)} for {list(y_NC.shape)} labels; give [N, P], or [C, N, P] for each problem its own")
    if not l2 > 0:
        raise BadInput(f"l2={l2} must be above 0: without it separable classes have no best probe")
    check_finite(x, "features")
    s_NC = balanced(y_NC) if weight_NC is None else weight_NC
    sign_NC = torch.where(y_NC, 1.0, -1.0)
    mean, spread = x.mean(-2, keepdim=True), x.std(-2, unbiased=False, keepdim=True)
    # A feature that never moves keeps its scale; one that hardly does is no reason to divide by almost nothing.
    spread = torch.where(spread > 1e-6 * spread.amax(-1, keepdim=True).clamp_min(1e-30), spread, torch.ones_like(spread))
    z = (x - mean) / spread
    w_PC = torch.zeros(x.shape[-1], y_NC.shape[1], requires_grad=True)
    b_C = torch.zeros(y_NC.shape[1], requires_grad=True)
    descent = torch.optim.LBFGS(
        [w_PC, b_C], max_iter=most_steps, tolerance_grad=1e-6, tolerance_change=1e-10, history_size=10, line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        descent.zero_grad()
        logit_NC = Probes(w_PC, b_C).logits(z)
        total = (s_NC * softplus(-sign_NC * logit_NC)).sum() + l2 / 2 * w_PC.pow(2).sum()
        total.backward()
        return total

    with torch.enable_grad():
        descent.step(closure)
    scale_PC, mean_PC = (v[0][:, None] if x.ndim == 2 else v[:, 0].T for v in (spread, mean))
    weight_PC = w_PC.detach() / scale_PC
    return Probes(weight_PC, b_C.detach() - (mean_PC * weight_PC).sum(0))


def right(logit_NC: Tensor, y_NC: Tensor) -> Tensor:
    """[N, C] float: whether the sign of the logit is the class."""
    return ((logit_NC > 0) == y_NC).float()


def accuracy(logit_NC: Tensor, y_NC: Tensor) -> Tensor:
    """[C] balanced accuracy."""
    return (balanced(y_NC) * right(logit_NC, y_NC)).sum(0)


def f1(logit_NC: Tensor, y_NC: Tensor) -> Tensor:
    """[C] F1 were both classes equally frequent: 2 TPR / (1 + TPR + FPR)."""
    s_NC, on_NC = balanced(y_NC), logit_NC > 0
    hit_C, false_C = (2 * (s_NC * (on_NC & there)).sum(0) for there in (y_NC, ~y_NC))
    return 2 * hit_C / (1 + hit_C + false_C)
