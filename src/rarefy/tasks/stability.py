"""Whether two dictionaries trained on the same data found the same latents (Paulo & Belrose 2025, arXiv 2501.16615).

Shape letters: G, H = latents of the two, D = width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput
from .learned import Learned
from .planted import assign
from .recovered import cosines

SHARED = 0.7
"""Cosine above which two latents are the same."""


@dataclass(frozen=True)
class Stability:
    """Agreement of two dictionaries."""

    shared: float
    """Share of the smaller one's latents whose partner is the same by decoder and by encoder, with both cosines above the cutoff."""
    decoder: float
    """Mean decoder cosine under the decoders' own match."""
    partner: Tensor
    """[G] latent of the second that each of the first is shared with; -1 for none."""


def stability(a: Learned, b: Learned, cutoff: float = SHARED) -> Stability:
    """Match latents by Hungarian assignment on cosines of decoder rows and again on those of encoder rows.

    Dead latents take part: they are latents that no seed shares. Of two dictionaries with negative activations absolute cosines count.

    Raises:
        BadInput: dictionaries of different widths of rows, or a cutoff outside [-1, 1].
    """
    if a.decoder.shape[1] != b.decoder.shape[1]:
        raise BadInput(f"dictionaries of rows {a.decoder.shape[1]} and {b.decoder.shape[1]} wide cannot be matched")
    if not -1 <= cutoff <= 1:
        raise BadInput(f"cutoff={cutoff} must be a cosine, in [-1, 1]")
    signed = a.signed and b.signed
    by_dec_GH, by_enc_GH = cosines(b.decoder, a.decoder, signed=signed), cosines(b.encoder, a.encoder, signed=signed)
    match_G = assign(by_dec_GH)
    same_G = match_G if a.encoder is a.decoder and b.encoder is b.decoder else assign(by_enc_GH)
    row_G = torch.arange(len(match_G))
    there_G = match_G >= 0
    cosine_G = torch.where(there_G, by_dec_GH[row_G, match_G], 0.0)
    shared_G = there_G & (match_G == same_G) & (cosine_G > cutoff) & (by_enc_GH[row_G, match_G] > cutoff)
    least = min(a.width, b.width)
    return Stability(int(shared_G.sum()) / least, float(cosine_G.sum()) / least, torch.where(shared_G, match_G, -1))
