"""Description length: how many bits a row takes to send through a dictionary.

Ayonrinde, Pearce & Sharkey 2024, "Interpretability as Compression" (arXiv 2410.11179). Activations are quantised to the
coarsest bins that keep the reconstruction within a tolerance; a latent costs the entropy of (off, or its bin) a row. What
the dictionary leaves over is charged too, at what a Gaussian of its covariance costs down to the same tolerance (reverse
water-filling, Cover & Thomas 2006, theorem 10.3.3), so that dictionaries of different errors are compared at one loss.

Shape letters: N = rows, D = width, G = latents, M = activations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput
from .codes import Codes
from .learned import Learned

TOLERANCE = 0.01
"""Of the variance of the rows: what quantising may add to the squared error, and down to what the rest is described."""
_HALVINGS = 24


@dataclass(frozen=True)
class Description:
    """Bits a row."""

    codes: float
    """Sum over latents of the entropy of what each says."""
    rest: float
    """For the error, down to the tolerance."""
    step: float
    """Bin of an activation times its decoder row's length, in the rows' units."""
    counted: float
    """The rule of thumb: L0 * (log2 of the width + bits for the bins in use)."""

    @property
    def total(self) -> float:
        """codes + rest."""
        return self.codes + self.rest


def description_length(learned: Learned, x_ND: Tensor, tolerance: float = TOLERANCE) -> Description:
    """Bits a row of sending x through a dictionary.

    Args:
        x_ND: rows that `learned` was read on, many more than bins are used. tolerance: in (0, 1), of the mean variance of a channel.

    Raises:
        BadInput: other rows than those read, rows that do not vary, or a tolerance out of range.
    """
    if x_ND.shape != learned.x_hat.shape:
        raise BadInput(f"x {list(x_ND.shape)} must be the rows that were read, {list(learned.x_hat.shape)}")
    if not 0 < tolerance < 1:
        raise BadInput(f"tolerance={tolerance} must be in (0, 1): a share of the variance")
    variance = float((x_ND.double() - x_ND.double().mean(0)).pow(2).mean())
    if not variance:
        raise BadInput("x does not vary: there is nothing to describe")
    allowed = tolerance * variance
    step, bin_M, x_hat_ND = _coarsest(learned, x_ND, allowed)
    error_ND = x_ND.double() - x_hat_ND
    error_ND = error_ND - error_ND.mean(0)
    eigen_D = torch.linalg.eigvalsh(error_ND.T @ error_ND / len(x_ND))
    rest = float((eigen_D / allowed).clamp_min(1).log2().sum()) / 2
    used = bin_M[bin_M != 0].unique()
    counted = int((bin_M != 0).sum()) / len(x_ND) * (math.log2(max(1, learned.width)) + math.log2(max(1, len(used))))
    return Description(entropy(learned.codes, bin_M), rest, step, counted)


def _coarsest(learned: Learned, x_ND: Tensor, allowed: float) -> tuple[float, Tensor, Tensor]:
    """(step, bin of each activation, rows rebuilt from bins): the largest step that adds at most `allowed` to the mean squared error."""
    codes, on, x = learned.codes, learned.codes.by_row, x_ND.double()
    decoder_GD = learned.decoder.double()
    length_M = decoder_GD.norm(dim=-1).clamp_min(1e-12)[on.latent_M]
    size_M = on.value_M.double() * length_M
    before = float((x - learned.x_hat.double()).pow(2).mean())

    def rebuilt(step: float) -> tuple[Tensor, Tensor]:
        bin_M = (size_M / step).round()
        change_M = bin_M * step / length_M - on.value_M.double()
        moved = Codes(codes.n, codes.width, on.row_M, on.latent_M, change_M).times(decoder_GD)
        return bin_M.long(), learned.x_hat.double() + moved

    def fits(step: float) -> bool:
        return float((x - rebuilt(step)[1]).pow(2).mean()) - before <= allowed

    high = 2 * float(size_M.abs().max()) + 1e-12 if len(size_M) else 1.0
    low = high
    while not fits(low):
        high, low = low, low / 2
    for _ in range(_HALVINGS if high > low else 0):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, *rebuilt(low)


def entropy(codes: Codes, bin_M: Tensor) -> float:
    """Bits a row: sum over latents of the entropy of its bin, bin 0 being off. Bins in the order of `codes.by_row`."""
    keep_M = bin_M != 0
    latent_M, bin_M = codes.by_row.latent_M[keep_M], bin_M[keep_M]
    if not len(bin_M):
        return 0.0
    low, span = int(bin_M.min()), int(bin_M.max() - bin_M.min()) + 1
    count = (latent_M * span + bin_M - low).unique(return_counts=True)[1].double()
    off_G = codes.n - torch.bincount(latent_M, minlength=codes.width).double()
    share = torch.cat([count, off_G]) / codes.n
    return float(-torch.special.xlogy(share, share).sum()) / math.log(2)
