"""Every measure of the planted suite on one dictionary, and what each means.

Shape letters: N = rows, D = width, F = true features, G = latents.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..latents.coding.pursuit import pursuit
from ..latents.topk import TopK
from ..tasks.dark_matter import dark_matter
from ..tasks.description import description_length
from ..tasks.geometry import fvu_by, geometry, norm_groups
from ..tasks.learned import Learned, perfect, read
from ..tasks.planted import recovery
from ..tasks.planted_absorption import absorption
from ..tasks.planted_kinds import Truth
from ..tasks.recovered import cosines, feature_f1, match_blocks, subspaces, uniqueness
from ..tasks.stability import stability

MEASURES = {
    "l0": "latents on a row",
    "fvu": "variance of held-out rows unexplained",
    "pursued": "fvu with the same directions and as many latents, codes by gradient pursuit",
    "mcc": "mean cosine of one-to-one matched directions",
    "mmcs": "mean over true directions of the nearest latent's cosine",
    "f1": "mean over true features of F1 of the matched latent above its threshold",
    "unique": "true features hit / living latents",
    "span": "share of true subspaces spanned by as many latents as they have dimensions",
    "absorbed": "rows with a child on which the parent's latent is silent and another writes it",
    "shared": "latents that another seed has too, by decoder and encoder",
    "bits": "description length: bits a row of codes and of what is left over, at 1 % of the variance",
    "linear": "share of the error vector that is linear in the input",
    "norm": "share of the error's squared norm that is linear in the input",
    "size": "mean strength written along a true direction over the true strength, where the feature is found: 1 is no shrinkage",
    "dead": "latents on in no row",
    "dense": "latents on in more than a tenth of the rows",
    "double": "living latents with another at a cosine above 0.95",
    "short": "FVU of the tenth of rows with the least norm",
    "long": "FVU of the tenth of rows with the greatest norm",
}
"""Name of a column -> what it means, in the order of the table."""
HIGH = {"mcc", "mmcs", "f1", "unique", "span", "shared"}
"""Columns in which more is better; in size nearer to 1, in l0 nearer to the true one, in dense neither, in the rest less."""


@torch.no_grad()
def measures(learned: Learned, truth: Truth, *, signed: bool) -> dict[str, float]:
    """All but `shared`, which takes several seeds; `absorbed` only where there are parents, `size` only where a feature was found.

    Args:
        learned: as read on the rows of `truth`. signed: whether a direction and its opposite are one feature. They are one latent, and
            so are taken as one, in a dictionary with negative activations.
    """
    signed = signed or learned.signed
    cosine_FG = cosines(learned.decoder, truth.dictionary, signed=signed)
    match_P = match_blocks(cosine_FG, truth.block)
    shape, dark = geometry(learned), dark_matter(truth.x, learned.x_hat)
    deciles = fvu_by(truth.x, learned.x_hat, norm_groups(truth.x)).nan_to_num()
    both = recovery(torch.cat([learned.decoder, -learned.decoder]) if signed else learned.decoder, truth.dictionary)
    out = {
        "l0": learned.codes.l0, "fvu": _fvu(truth.x, learned.x_hat), "pursued": _pursued(learned, truth.x),
        "mcc": _matched(cosine_FG), "mmcs": both.mmcs,
        "f1": float(feature_f1(learned.codes, truth.on, match_P).mean()), "unique": uniqueness(cosine_FG, learned.codes.fired > 0),
        "span": float(subspaces(learned.decoder, truth.dictionary, truth.block).mean()),
        "bits": description_length(learned, truth.x).total, "linear": dark.linear, "norm": dark.norm,
        "dead": shape.dead, "dense": shape.dense, "double": shape.duplicate, "short": float(deciles[0]), "long": float(deciles[-1]),
    }
    if (size := _size(learned, truth, cosine_FG)) is not None:
        out["size"] = size
    if bool((truth.parent >= 0).any()):
        out["absorbed"] = absorption(learned, truth).absorbed
    return out


def _fvu(x_ND: Tensor, x_hat_ND: Tensor) -> float:
    return float(fvu_by(x_ND, x_hat_ND, torch.zeros(len(x_ND), dtype=torch.long)))


def _pursued(learned: Learned, x_ND: Tensor) -> float:
    """FVU with codes solved for anew (Engels et al. 2024, sec. 6), at the dictionary's own L0 to the nearest whole number, at least 1."""
    alive_GD = learned.decoder[learned.decoder.norm(dim=1) > 0]
    if not len(alive_GD):
        return 1.0
    begin_D = (learned.x_hat - learned.codes.times(learned.decoder)).mean(0)
    k = min(max(1, round(learned.codes.l0)), len(alive_GD), alive_GD.shape[1])
    value_NK, index_NK = pursuit(x_ND - begin_D, alive_GD, k, by="gradient", positive=bool((learned.codes.value_M >= 0).all()))
    return _fvu(x_ND, begin_D + embedding_bag(index_NK, alive_GD, per_sample_weights=value_NK, mode="sum"))


def _matched(cosine_FG: Tensor) -> float:
    """`recovery(...).mcc` for cosines that may already be absolute."""
    match_F = match_blocks(cosine_FG, torch.arange(len(cosine_FG)))
    row_F = torch.arange(len(match_F))
    return float(torch.where(match_F >= 0, cosine_FG[row_F, match_F], 0.0).mean())


def _size(learned: Learned, truth: Truth, cosine_FG: Tensor) -> float | None:
    """Over features matched at a cosine of at least 0.9, the slope of written on true strength, both on; None where none is."""
    match_F = match_blocks(cosine_FG, torch.arange(len(cosine_FG)))
    dense_NG, written, true = learned.codes.matrix, 0.0, 0.0
    for f, g in enumerate(match_F.tolist()):
        if g < 0 or cosine_FG[f, g] < 0.9:
            continue
        wrote_N = dense_NG[:, g] * (learned.decoder[g] @ truth.dictionary[f])
        both_N = (wrote_N != 0) & (truth.codes[:, f] != 0)
        strength_N = truth.codes[both_N, f].double()
        written, true = written + float((wrote_N[both_N] * strength_N).sum()), true + float(strength_N.square().sum())
    return written / true if true else None


def shared(read_by_seed: list[Learned]) -> list[float]:
    """For each seed, the mean share of its latents that another has; empty for one seed."""
    count = len(read_by_seed)
    if count < 2:
        return []
    pair = {(i, j): stability(read_by_seed[i], read_by_seed[j]).shared for i in range(count) for j in range(i + 1, count)}
    return [sum(pair[min(i, j), max(i, j)] for j in range(count) if j != i) / (count - 1) for i in range(count)]


@torch.no_grad()
def fixed(name: str, x_ND: Tensor, truth: Truth, k: int) -> Learned:
    """A row of the table that is not trained.

    Args:
        name: "truth", the planted codes and directions; "pca" and "neurons", the k strongest of the principal components or of
            the raw coordinates, each sign a latent of its own. x_ND: rows that components are fitted on.
    """
    if name == "truth":
        return perfect(truth.codes, truth.dictionary)
    d = x_ND.shape[1]
    method = TopK(d, 2 * d, k=min(k, 2 * d)).eval()
    method.initialise(x_ND)
    centred = x_ND.double() - x_ND.double().mean(0)
    basis_DD = torch.linalg.eigh(centred.T @ centred).eigenvectors.T.float() if name == "pca" else torch.eye(d)
    both_GD = torch.cat([basis_DD, -basis_DD])
    method.W_enc_FD.copy_(both_GD)
    method.W_dec_FD.copy_(both_GD)
    return read(method, truth.x)
