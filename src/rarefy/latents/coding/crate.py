"""CRATE, a transformer whose layers are steps of sparse rate reduction (Yu et al. 2023, "White-Box Transformers via Sparse
Rate Reduction", arXiv 2306.01129; sequel arXiv 2311.13110, whose numbering is used here only for R).

    R(Z)       = 1/2 logdet(I + d / (N eps^2) Z Z')                    coding rate of N tokens of width d (eq. 1)
    R^c(Z | U) = sum_k R(U_k' Z), with the width p of U_k for d        rate within K subspaces (eq. 4)
    MSSA(Z)    = sum_k U_k SSA_k,  SSA_k = (U_k' Z) softmax((U_k' Z)' (U_k' Z))    (eq. 10, 11): about a gradient step on R^c
    ISTA(Z)    = ReLU(Z + eta D' (Z - D Z) - eta lambda)               (eq. 17): one step of the non-negative lasso on D from Z

Tokens are rows here. As in the authors' model each block reads its input through a LayerNorm, scores are divided by sqrt(p), and
the factor p / (N eps^2) of eq. 11 is left to the scale of U.

Shape letters: B = sequences, T = tokens, D = width, K = heads, P = width of a head, F = width of a patch, C = classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...errors import BadInput
from ...method import not_negative, positive
from ...selection import check_finite


def _check(z_BTD: Tensor, epsilon: float) -> None:
    if z_BTD.ndim < 2 or not z_BTD.shape[-1] or not z_BTD.shape[-2]:
        raise BadInput(f"tokens have shape {list(z_BTD.shape)}; need [..., tokens, width] with at least one of each")
    if not not_negative("epsilon", epsilon):
        raise BadInput(f"epsilon={epsilon} must be > 0: the distortion up to which tokens are coded")


def coding_rate(z_BTD: Tensor, epsilon: float = 0.5) -> Tensor:
    """[...] nats to code T tokens [..., T, D] up to distortion epsilon (eq. 1), from the smaller of the two Gram matrices."""
    _check(z_BTD, epsilon)
    tokens, width = z_BTD.shape[-2:]
    gram = z_BTD @ z_BTD.mT if tokens <= width else z_BTD.mT @ z_BTD
    eye = torch.eye(min(tokens, width), dtype=z_BTD.dtype, device=z_BTD.device)
    return torch.linalg.slogdet(eye + width / (tokens * epsilon**2) * gram)[1] / 2


def subspace_rate(z_BTD: Tensor, basis_KDP: Tensor, epsilon: float = 0.5) -> Tensor:
    """[...] R^c: the rates of the tokens' projections on K bases, added up (eq. 4)."""
    return coding_rate(torch.einsum("...td,kdp->...ktp", z_BTD, basis_KDP), epsilon).sum(-1)


class MSSA(nn.Module):
    """Subspace self-attention: query, key and value are one projection, and the way back is its transpose.

    Args:
        d: width. heads: K, which divides d.
    """

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        if positive("d", d) % positive("heads", heads):
            raise BadInput(f"heads={heads} must divide d={d}")
        self.basis_KDP = nn.Parameter(torch.randn(heads, d, d // heads) / d**0.5)

    def forward(self, z_BTD: Tensor) -> Tensor:
        """[B, T, D] what is to be added to the tokens."""
        v_BKTP = torch.einsum("btd,kdp->bktp", z_BTD, self.basis_KDP)
        weight_BKTT = (v_BKTP @ v_BKTP.mT / v_BKTP.shape[-1] ** 0.5).softmax(-1)
        return torch.einsum("bktp,kdp->btd", weight_BKTT @ v_BKTP, self.basis_KDP)


class ISTA(nn.Module):
    """One proximal step towards the non-negative lasso codes of the tokens on a square dictionary, begun at the tokens.

    Args:
        d: width. step: eta. weight: lambda; 0.1 each in the authors' model.
    """

    def __init__(self, d: int, step: float = 0.1, weight: float = 0.1) -> None:
        super().__init__()
        self.step, self.weight = not_negative("step", step), not_negative("weight", weight)
        self.atoms_DD = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(positive("d", d), d)))
        """Atoms are rows: token = code @ atoms."""

    def forward(self, x_BTD: Tensor, code_BTD: Tensor | None = None) -> Tensor:
        """[B, T, D] the codes after one step from `code` (default: the tokens themselves)."""
        z = x_BTD if code_BTD is None else code_BTD
        return (z + self.step * (x_BTD - z @ self.atoms_DD) @ self.atoms_DD.T - self.step * self.weight).relu()


class Crate(nn.Module):
    """Classifier of sequences of patches.

    Args:
        patch: width F of a token's input. tokens: T. classes: C. d: width. layers, heads: as named. seed: of the parameters.
    """

    def __init__(self, patch: int, tokens: int, classes: int, d: int = 64, layers: int = 4, heads: int = 4, seed: int = 0) -> None:
        super().__init__()
        for name, value in (("patch", patch), ("tokens", tokens), ("classes", classes), ("layers", layers)):
            positive(name, value)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.patch, self.tokens = patch, tokens
            self.embed = nn.Linear(patch, d)
            self.place_TD = nn.Parameter(torch.randn(tokens, d) * 0.02)
            self.attend = nn.ModuleList(MSSA(d, heads) for _ in range(layers))
            self.sparsify = nn.ModuleList(ISTA(d) for _ in range(layers))
            self.before = nn.ModuleList(nn.LayerNorm(d) for _ in range(2 * layers))
            self.head = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, classes))

    def layers(self, x_BTF: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(after MSSA, after ISTA) of every layer, each [B, T, D]. Raises BadInput for another shape, NaN or inf."""
        if x_BTF.ndim != 3 or x_BTF.shape[1:] != (self.tokens, self.patch):
            raise BadInput(f"input has shape {list(x_BTF.shape)}; need [batch, {self.tokens}, {self.patch}]")
        check_finite(x_BTF, "input of Crate")
        z, out = self.embed(x_BTF) + self.place_TD, []
        for i, (attend, sparsify) in enumerate(zip(self.attend, self.sparsify, strict=True)):
            half = z + attend(self.before[2 * i](z))
            z = sparsify(self.before[2 * i + 1](half))
            out.append((half, z))
        return out

    def forward(self, x_BTF: Tensor) -> Tensor:
        """[B, C] logits, from the mean of the last layer's tokens."""
        return self.head(self.layers(x_BTF)[-1][1].mean(1))

    @torch.no_grad()
    def measured(self, x_BTF: Tensor, epsilon: float = 0.5) -> list[dict[str, float]]:
        """Per layer: R^c of the tokens after MSSA in that layer's subspaces, R of them, and the fraction not 0 after ISTA.

        Tokens are brought to length 1 before a rate is taken, which would otherwise tell of their scale.
        """
        out = []
        for attend, (half, z) in zip(self.attend, self.layers(x_BTF), strict=True):
            unit = nn.functional.normalize(half, dim=-1)
            rates = {"subspace_rate": subspace_rate(unit, attend.basis_KDP, epsilon), "rate": coding_rate(unit, epsilon)}  # type: ignore[arg-type]
            out.append({**{k: float(v.mean()) for k, v in rates.items()}, "nonzero": float((z > 0).float().mean())})
        return out
