"""What a dictionary made of rows, in the form that judges read: who fired where and how strongly, directions, reconstructions.

Shape letters: N = rows, D = width, G = latents, M = activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..method import Sparse
from ..selection import check_finite
from .codes import Codes


@dataclass(frozen=True)
class Learned:
    """A dictionary on rows; everything in the rows' own units."""

    codes: Codes
    """In index form."""
    decoder: Tensor
    """[G, D] float32; x_hat - codes @ decoder is the same for every row."""
    encoder: Tensor
    """[G, D] float32 directions that latents are read with; the decoder's where there are no others."""
    x_hat: Tensor
    """[N, D] float32."""

    @property
    def width(self) -> int:
        """Latents, G."""
        return len(self.decoder)

    @property
    def signed(self) -> bool:
        """Whether activations may be negative, so that a direction and its opposite are one latent."""
        return bool((self.codes.value_M < 0).any())


def decoder_of(method: Sparse, d: int) -> Tensor:
    """[G, D] a dictionary's decoder, in its own units. Raises BadInput where there is no such matrix."""
    decoder = getattr(method, "W_dec_FD", None)
    if not isinstance(decoder, Tensor) or decoder.ndim != 2 or decoder.shape[1] != d:
        raise BadInput(f"{method.name} has no decoder W_dec_FD of width {d}; only dictionaries of the rows themselves can be judged so")
    return decoder.detach()


@torch.no_grad()
def read(method: Sparse, x_ND: Tensor, at_once: int = 2048) -> Learned:
    """Run a dictionary on rows.

    Args:
        method: an autoencoder whose decoder is `W_dec_FD`, in eval mode; encoder `W_enc_FD` if it reads with one.
        x_ND: rows. at_once: rows a pass.

    Raises:
        BadInput: no rows, rows that are not finite, or a method without a decoder matrix of the rows' width.
    """
    if x_ND.ndim != 2 or not len(x_ND):
        raise BadInput(f"rows have shape {list(x_ND.shape)}; need [rows, width] with at least one row")
    check_finite(x_ND, "rows to judge on")
    made: Any = method
    decoder = decoder_of(method, x_ND.shape[1])
    parts, outs = [], []
    for start in range(0, len(x_ND), at_once):
        x = x_ND[start : start + at_once]
        row_M, latent_M, value_M = made.select(x).pairs()
        parts.append((row_M + start, latent_M, value_M.float()))
        outs.append(made(x).float())
    row_M, latent_M, value_M = (torch.cat(part) for part in zip(*parts, strict=True))
    decoder = decoder.float() / getattr(made, "scale_out", torch.ones(()))
    encoder = getattr(made, "W_enc_FD", None)
    encoder = decoder if not isinstance(encoder, Tensor) else encoder.detach().float()
    return Learned(Codes(len(x_ND), len(decoder), row_M, latent_M, value_M), decoder, encoder, torch.cat(outs))


def perfect(codes_NG: Tensor, decoder_GD: Tensor) -> Learned:
    """Given codes and directions as if they had been learned: the skyline of a table on planted data."""
    return Learned(Codes.of(codes_NG), decoder_GD, decoder_GD, codes_NG @ decoder_GD)
