"""What the decoder of a crosscoder says of its sites (Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing").

A crosscoder is any dictionary made with several widths: `TopK([d, d], ...)`. Each of its latents writes at every site; how
long its rows are there says where it lives: over layers, or in one model, the other, or both.

Shape letters: F = latents, S = sites.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadInput
from .dictionary import Dictionary

ONLY = 0.3
"""A latent belongs to one of two models where the other's share of its decoder norms is below this."""


@torch.no_grad()
def relative_norms(method: Dictionary) -> Tensor:
    """[F, S] share of each latent's decoder norm at each site, in units in which every site's mean square is 1; rows sum to 1.

    For two models column 1 is the relative norm of the paper: 0 for a latent of the first alone, 1/2 shared, 1 of the second alone.

    Raises:
        BadInput: the dictionary writes at one site only.
    """
    if len(method.parts_out) < 2:
        raise BadInput(f"this {method.name} writes at one site; relative norms are of a crosscoder, such as TopK([d, d], width)")
    norms_FS = method.decoder_norms().detach()
    return norms_FS / norms_FS.sum(-1, keepdim=True).clamp_min(1e-12)


def of_models(method: Dictionary, only: float = ONLY) -> dict[str, Tensor]:
    """{"first", "shared", "second": latents [any]} of a crosscoder of two models, by relative norm: < only, between, > 1 - only.

    Raises:
        BadInput: not two sites of equal number in two models, or `only` out of (0, 1/2].
    """
    if not 0 < only <= 0.5:
        raise BadInput(f"only={only} must be in (0, 0.5]: the share below which a model has no part in a latent")
    share_FS = relative_norms(method)
    if share_FS.shape[1] % 2:
        raise BadInput(f"{share_FS.shape[1]} sites are not those of two models; give each model the same sites")
    second_F = share_FS[:, share_FS.shape[1] // 2 :].sum(-1)
    places = {"first": second_F < only, "shared": (second_F >= only) & (second_F <= 1 - only), "second": second_F > 1 - only}
    return {name: there_F.nonzero()[:, 0] for name, there_F in places.items()}


def histogram(method: Dictionary, bins: int = 20) -> Tensor:
    """[bins] latents by relative norm of the second half of the sites, in equal bins of [0, 1]."""
    share_FS = relative_norms(method)
    return torch.histc(share_FS[:, share_FS.shape[1] // 2 :].sum(-1).float().cpu(), bins, 0.0, 1.0).long()
