"""How much of a planted dictionary a learned one has found: features as classifiers, uniqueness, subspaces.

Cosines and their one-to-one match are in `planted.recovery`.

Shape letters: N = rows, D = width, F = true features, G = learned latents, P = true features of one or more dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import BadInput
from .codes import Codes
from .planted import assign

_AT_ONCE = 256
"""Features whose thresholds are looked for at a time."""
_NEW = 0.1
"""Part of a direction that must lie outside those taken already for it to count as another dimension."""


def cosines(learned_GD: Tensor, true_FD: Tensor, *, signed: bool = False) -> Tensor:
    """[F, G] cosines; absolute ones where a direction and its opposite are one feature."""
    cosine_FG = normalize(true_FD.double(), dim=-1) @ normalize(learned_GD.double(), dim=-1).T
    return cosine_FG.abs() if signed else cosine_FG


def feature_f1(codes: Codes, on_NF: Tensor, match_F: Tensor) -> Tensor:
    """[F] F1 of "the matched latent is above its threshold" against "the feature is on".

    The threshold is the best one on the even rows, the F1 that on the odd rows. A feature without partner has 0.

    Args:
        codes: activations; absolute values count. on_NF: bool. match_F: latent of each feature, -1 for none.
    """
    if on_NF.shape != (codes.n, len(match_F)) or codes.n < 2:
        raise BadInput(f"on {list(on_NF.shape)} must be [{codes.n}, {len(match_F)}], with at least two rows")
    out_F = torch.zeros(len(match_F), dtype=torch.float64)
    for at in torch.arange(len(match_F)).split(_AT_ONCE):
        value_NC = codes.columns(match_F[at]).abs()
        tau_C = _best_threshold(value_NC[::2], on_NF[::2, at])
        out_F[at] = f1(value_NC[1::2] > tau_C, on_NF[1::2, at])
    return out_F


def f1(said_NC: Tensor, true_NC: Tensor) -> Tensor:
    """[C] of bool columns; 0 where there is nothing to find and nothing said."""
    hit_C = (said_NC & true_NC).sum(0).double()
    return 2 * hit_C / (said_NC.sum(0) + true_NC.sum(0)).clamp_min(1)


def _best_threshold(value_NC: Tensor, true_NC: Tensor) -> Tensor:
    """[C] value above which F1 is greatest; among rows of one value all or none are taken."""
    sorted_NC, order_NC = value_NC.sort(0, descending=True)
    hit_NC = true_NC.gather(0, order_NC).cumsum(0).double()
    count_N1 = torch.arange(1, len(value_NC) + 1)[:, None]
    f1_NC = 2 * hit_NC / (count_N1 + true_NC.sum(0)).clamp_min(1)
    next_NC = torch.cat([sorted_NC[1:], torch.zeros(1, value_NC.shape[1])])
    edge_NC = (sorted_NC > next_NC)                         # the last of its value, and on
    best_C = torch.where(edge_NC, f1_NC, -1.0).argmax(0)
    both_2C = torch.stack([sorted_NC.gather(0, best_C[None])[0], next_NC.gather(0, best_C[None])[0]])
    return torch.where(edge_NC.any(0), both_2C.mean(0), torch.inf)


def uniqueness(cosine_FG: Tensor, alive_G: Tensor) -> float:
    """Share of living latents that are, among those nearest to the same feature, the one counted: features hit / latents alive.

    1 where every latent is nearest to a feature of its own; 0 where none is alive.
    """
    nearest = cosine_FG[:, alive_G].argmax(0)
    return len(nearest.unique()) / len(nearest) if len(nearest) else 0.0


def subspaces(learned_GD: Tensor, dictionary_FD: Tensor, block_F: Tensor) -> Tensor:
    """[P] how much of each feature's subspace a few latents span: mean squared cosine of the principal angles, in [0, 1].

    For a subspace of m dimensions, m latents are taken greedily, each by how much of its part outside those already taken
    lies in the subspace (parts below a tenth of its length do not count). For m = 1 it is the best squared cosine.
    """
    unit_GD = normalize(learned_GD.double(), dim=-1)
    out = []
    for block in range(int(block_F.max()) + 1):
        basis_DM = torch.linalg.qr(dictionary_FD[block_F == block].double().T).Q
        taken_DK = unit_GD.new_zeros(len(basis_DM), 0)
        covered = 0.0
        for _ in range(basis_DM.shape[1]):
            rest_GD = unit_GD - (unit_GD @ taken_DK) @ taken_DK.T
            length_G = rest_GD.norm(dim=-1)
            inside_G = torch.where(length_G > _NEW, (rest_GD @ basis_DM).norm(dim=-1) / length_G.clamp_min(_NEW), 0.0)
            best = int(inside_G.argmax())
            if not inside_G[best]:
                break
            covered += float(inside_G[best]) ** 2
            taken_DK = torch.cat([taken_DK, (rest_GD[best] / length_G[best])[:, None]], 1)
        out.append(covered / basis_DM.shape[1])
    return torch.tensor(out, dtype=torch.float64)


def match_blocks(cosine_FG: Tensor, block_F: Tensor) -> Tensor:
    """[P] one-to-one match of latents to features by cosine, for features of several dimensions by the best of them; -1 for none."""
    return assign(torch.stack([cosine_FG[block_F == block].amax(0) for block in range(int(block_F.max()) + 1)]))
