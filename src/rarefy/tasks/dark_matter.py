"""What a dictionary leaves over: the part of its error that the input predicts linearly, and the rest.

Engels et al. 2024, "Decomposing The Dark Matter of Sparse Autoencoders" (arXiv 2410.14670).

Shape letters: N = rows, D = width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput
from ..selection import check_finite


@dataclass(frozen=True)
class LinearMap:
    """rows @ weight + bias."""

    weight: Tensor
    """[D, E] float64."""
    bias: Tensor
    """[E] float64."""

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., E] float64."""
        return x.double() @ self.weight + self.bias


@dataclass(frozen=True)
class ErrorMaps:
    """What a linear map of the input knows of a dictionary's error."""

    to_error: LinearMap
    """From x to the linear part of the error: x_hat + to_error(x) is the dictionary without its linear error, x - to_error(x) the input
    with that error alone."""
    to_square: LinearMap
    """From x to the error's squared norm, [..., 1]."""


@dataclass(frozen=True)
class DarkMatter:
    """Shares of a dictionary's error, measured on rows that the maps were not fitted on."""

    linear: float
    """R^2 of the error vector predicted linearly from x: the linear error's share."""
    nonlinear: float
    """1 - linear."""
    norm: float
    """R^2 of the error's squared norm predicted linearly from x."""
    fvu: float
    """The error's share of the variance of x, on the same rows."""
    to_error: LinearMap
    """See ErrorMaps."""


def least_squares(x_ND: Tensor, y_NE: Tensor, ridge: float = 1e-6) -> LinearMap:
    """The affine map with the least squared error, in float64.

    Args:
        ridge: added to the covariance of x, as a share of its mean eigenvalue.
    """
    x, y = x_ND.double(), y_NE.double()
    mean_D, mean_E = x.mean(0), y.mean(0)
    x, y = x - mean_D, y - mean_E
    gram_DD = x.T @ x
    gram_DD.diagonal().add_(ridge * gram_DD.diagonal().mean().clamp_min(1e-300))
    weight_DE = torch.linalg.solve(gram_DD, x.T @ y)
    return LinearMap(weight_DE, mean_E - mean_D @ weight_DE)


def r_squared(true_NE: Tensor, said_NE: Tensor) -> float:
    """1 - sum of squared errors / sum of squared distances to the mean; 1 where there is no variance and no error."""
    true = true_NE.double()
    spread = float((true - true.mean(0)).pow(2).sum())
    error = float((true - said_NE).pow(2).sum())
    return 1 - error / spread if spread else float(not error)


def error_maps(x_ND: Tensor, x_hat_ND: Tensor, *, ridge: float = 1e-6) -> ErrorMaps:
    """Fit least-squares maps from x to the error vector and to its squared norm.

    Raises:
        BadInput: shapes that differ, values that are not finite, or fewer rows than D + 1.
    """
    if x_ND.shape != x_hat_ND.shape or x_ND.ndim != 2:
        raise BadInput(f"x {list(x_ND.shape)} and x_hat {list(x_hat_ND.shape)} must be one shape, [rows, width]")
    if len(x_ND) <= x_ND.shape[1]:
        raise BadInput(f"{len(x_ND)} rows to fit {x_ND.shape[1] + 1} coefficients a channel on; give more rows")
    check_finite(x_ND, "x")
    check_finite(x_hat_ND, "x_hat")
    error_ND = x_ND.double() - x_hat_ND.double()
    return ErrorMaps(least_squares(x_ND, error_ND, ridge), least_squares(x_ND, error_ND.pow(2).sum(1, keepdim=True), ridge))


def shares(maps: ErrorMaps, x_ND: Tensor, x_hat_ND: Tensor) -> DarkMatter:
    """Measure maps on rows that they were not fitted on. Raises BadInput for fewer than 2, or values that are not finite."""
    if x_ND.shape != x_hat_ND.shape or x_ND.ndim != 2 or len(x_ND) < 2:
        raise BadInput(f"x {list(x_ND.shape)} and x_hat {list(x_hat_ND.shape)} must be one shape, [rows, width], with 2 rows to measure on")
    check_finite(x_ND, "x")
    check_finite(x_hat_ND, "x_hat")
    error_ND = x_ND.double() - x_hat_ND.double()
    square_N1 = error_ND.pow(2).sum(1, keepdim=True)
    linear = r_squared(error_ND, maps.to_error(x_ND))
    spread = float((x_ND.double() - x_ND.double().mean(0)).pow(2).sum())
    fvu = float(square_N1.sum()) / spread if spread else 0.0
    return DarkMatter(linear, 1 - linear, r_squared(square_N1, maps.to_square(x_ND)), fvu, maps.to_error)


def dark_matter(x_ND: Tensor, x_hat_ND: Tensor, *, ridge: float = 1e-6, fit_share: float = 0.5) -> DarkMatter:
    """Fit the maps on some rows and measure them on the rest.

    Args:
        x_ND: rows, in an order that does not matter. x_hat_ND: what the dictionary makes of them.
        fit_share: of the rows, the first ones, that the maps are fitted on.

    Raises:
        BadInput: shapes that differ, values that are not finite, or fewer rows to fit on than D + 1 or to measure on than 2.
    """
    cut = round(len(x_ND) * fit_share)
    return shares(error_maps(x_ND[:cut], x_hat_ND[:cut], ridge=ridge), x_ND[cut:], x_hat_ND[cut:])
