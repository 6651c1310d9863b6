"""Feature absorption on planted parents and children (Chanin et al. 2024, arXiv 2409.14507), with the truth in the place of a probe.

A parent is absorbed on a row where it is on and its own latent is silent although another latent writes the parent's direction
in its stead. In the paper the parent is a letter, the probe a regression and the effect an ablation of the letter's logit; here
the direction is known, and what a latent writes along it is its effect.

Shape letters: N = rows, D = width, F = true features, G = latents, P = parents, R = rows of one parent with a child.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput
from .learned import Learned
from .planted_kinds import Truth
from .recovered import f1

WRITES = 0.5
"""Share of the parent's strength that one other latent must write along its direction to be said to absorb it."""


@dataclass(frozen=True)
class Absorption:
    """Means over parents, of rows on which the parent and one of its children are on."""

    absorbed: float
    """Share of rows on which the main latent is silent and another writes the parent."""
    missed: float
    """Share of rows on which the main latent is silent; more than `absorbed` where nothing else writes the parent."""
    main: Tensor
    """[P] the latent of each parent: the one whose firing agrees best (F1) with the parent's among those that write along it."""


def absorption(learned: Learned, truth: Truth, writes: float = WRITES) -> Absorption:
    """Measure it on the rows that `learned` was read on.

    Raises:
        BadInput: a kind of planted data without parents, or other rows than those read.
    """
    parents = [int(p) for p in truth.parent[truth.parent >= 0].unique()]
    if not parents:
        raise BadInput("no feature has a parent; use a planted kind with parents, hierarchical or contained")
    if learned.codes.n != len(truth.x):
        raise BadInput(f"{learned.codes.n} rows were read and {len(truth.x)} given; give the same")
    value_NG = learned.codes.matrix
    along_GF = learned.decoder @ truth.dictionary.T
    on_NG, on_NF = value_NG != 0, truth.codes != 0
    absorbed, missed, mains = [], [], []
    for p in parents:
        agree_G = f1(on_NG, on_NF[:, p : p + 1].expand_as(on_NG)) * ((along_GF[:, p] > 0) | learned.signed)
        main = int(agree_G.argmax())
        row_R = (on_NF[:, p] & on_NF[:, truth.parent == p].any(1)).nonzero()[:, 0]
        silent_R = ~on_NG[row_R, main]
        effect_RG = value_NG[row_R] * along_GF[:, p]
        effect_RG[:, main] = 0
        instead_R = effect_RG.amax(1) >= writes * truth.codes[row_R, p]
        absorbed.append((silent_R & instead_R).float().mean() if len(row_R) else torch.zeros(()))
        missed.append(silent_R.float().mean() if len(row_R) else torch.zeros(()))
        mains.append(main)
    return Absorption(float(torch.stack(absorbed).mean()), float(torch.stack(missed).mean()), torch.tensor(mains))
