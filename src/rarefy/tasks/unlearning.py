"""Forgetting one part of what a model knows by clamping latents that fire there and hardly elsewhere (Farrell et al. 2024).

Here: one package of source code. What is lost is the increase of cross-entropy on the package's files; the damage is the
increase on all others.

Shape letters: B = windows, T = tokens, N = rows, D = width, F = latents, L = chosen latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..errors import BadInput
from ..fidelity import Interval, ratio_interval
from ..site import replaced
from .codes import Codes, Lens

Encode = Callable[[Tensor], Codes]


def chosen_latents(codes: Codes, forget_N: Tensor, keep_N: Tensor, *, most: int = 20, rare: float = 0.01, often: float = 0.001) -> Tensor:
    """[L] latents that fire on at most a share `rare` of the rows to keep and, among those, most often on the rows to forget.

    Only those that fire on at least a share `often` of the rows to forget, and more often there; so that L may be 0.

    Raises:
        BadInput: no rows to forget or none to keep.
    """
    if not forget_N.any() or not keep_N.any():
        raise BadInput(f"{int(forget_N.sum())} rows to forget and {int(keep_N.sum())} to keep; both are needed")
    share_F2 = codes.fires.sums(torch.stack([forget_N / forget_N.sum(), keep_N / keep_N.sum()], 1).float())
    forget_F, keep_F = share_F2.T
    fit_F = (keep_F <= rare) & (forget_F >= often) & (forget_F > keep_F)
    best = torch.where(fit_F, forget_F, -1.0).topk(min(most, codes.width)).indices
    return best[fit_F[best]]


@dataclass
class Clamp:
    """What `replaced` puts at the site: where a chosen latent fires, its code becomes -strength times its mean firing code.

    Args:
        encode: rows -> codes. strength: 0 ablates. mean_L: mean code of each latent where it fires.
        skip: positions at the start of a window that pass through.
    """

    encode: Encode
    direction_LD: Tensor
    latent_L: Tensor
    mean_L: Tensor
    strength: float
    skip: int = 1

    def __call__(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> the same shape."""
        x_ND = x_BTD[:, self.skip :].flatten(0, 1)
        z_NL = self.encode(x_ND).columns(self.latent_L)
        wanted_NL = torch.where(z_NL > 0, -self.strength * self.mean_L, z_NL)
        new_ND = x_ND + ((wanted_NL - z_NL) @ self.direction_LD).to(x_ND.dtype)
        return torch.cat([x_BTD[:, : self.skip], new_ND.view_as(x_BTD[:, self.skip :])], 1)


def clamp(lens: Lens, encode: Encode, latent_L: Tensor, strength: float, skip: int = 1) -> Clamp:
    """A Clamp of latents of a lens, their mean firing codes taken from its rows."""
    z_NL = lens.codes.columns(latent_L)
    on_NL = z_NL > 0
    mean_L = (z_NL * on_NL).sum(0) / on_NL.sum(0).clamp_min(1)
    return Clamp(encode, lens.decoder_FD[latent_L], latent_L, mean_L, strength, skip)


@torch.no_grad()
def losses(model: nn.Module, batches: Sequence[Any], plan: Mapping[str, Any], documents: int) -> tuple[Tensor, Tensor]:
    """([documents] sum of cross-entropy, [documents] tokens) with `plan` in the model; a document's first token is not predicted."""
    total_C, count_C = torch.zeros(documents, dtype=torch.float64), torch.zeros(documents, dtype=torch.float64)
    for batch in batches:
        with replaced(model, dict(plan)):
            logits_BTV = model(input_ids=batch.input_ids, use_cache=False).logits
        same = batch.doc[:, 1:] == batch.doc[:, :-1]
        doc_N = batch.doc[:, 1:][same]
        ce_N = cross_entropy(logits_BTV[:, :-1][same].float(), batch.input_ids[:, 1:][same], reduction="none")
        total_C.index_add_(0, doc_N, ce_N.double())
        count_C.index_add_(0, doc_N, torch.ones(len(doc_N), dtype=torch.float64))
    return total_C, count_C


@dataclass(frozen=True)
class Forgotten:
    """Increase of cross-entropy, nats a token, over documents that latents were not chosen on."""

    forget: Interval
    keep: Interval
    latents: int
    strength: float

    @property
    def selective(self) -> float:
        """What is lost where it should be, less the damage elsewhere."""
        return self.forget.mean - self.keep.mean


def forgotten(
    before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], forget_C: Tensor, keep_C: Tensor, latents: int, strength: float,
) -> Forgotten:
    """From `losses` without and with a Clamp. forget_C, keep_C: [documents] bool."""
    change_C, count_C = after[0] - before[0], before[1]
    forget, keep = (ratio_interval(change_C[there], count_C[there]) for there in (forget_C, keep_C))
    return Forgotten(forget, keep, latents, strength)
