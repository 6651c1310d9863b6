"""Graph-regularised sparse non-negative matrix factorisation (SS-NMF; Zhu et al. 2014, "Structured Sparse Method for
Hyperspectral Unmixing", arXiv 1403.4682).

    min over z, D >= 0, rows of D of length 1:   1/2 ||x - z D||^2 + sparsity ||z||_1 + smoothness / 2 tr(z' L z)

with L = diag(W 1) - W the Laplacian of a graph over the rows of x, so that rows that are alike share their few codes. x are
pixels by bands, D the spectra of materials, z their abundances.

Multiplicative updates. Of the codes (as Cai et al. 2011 for the graph's part), under which the objective never rises:
z <- z * (x D' + smoothness W z) / (z D D' + sparsity + smoothness diag(W 1) z). Without a fixed length of D's rows the l1 norm
could be made small by scaling alone; the paper scales after each update, which may raise the objective. Here the update of D is
that of the objective as a function of D / ||D|| (Eggert & Korner 2004), with its exponent halved until it does not rise.

Shape letters: N = rows, D = width, F = atoms, E = directed edges.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...errors import BadInput
from ...method import not_negative, positive
from ...selection import check_finite

_TINY = 1e-12


class Graph(NamedTuple):
    """A symmetric graph over rows."""

    edges_2E: Tensor
    """int64, both directions of every edge."""
    weight_E: Tensor
    """> 0."""

    def sums(self, z_NF: Tensor) -> Tensor:
        """[N, F] W z."""
        out_NF = torch.zeros_like(z_NF)
        return out_NF.index_add_(0, self.edges_2E[0], self.weight_E[:, None].to(z_NF) * z_NF[self.edges_2E[1]])


class Factors(NamedTuple):
    """What x was factored into."""

    codes: Tensor
    """[N, F] >= 0."""
    atoms: Tensor
    """[F, D] >= 0, rows of length 1."""
    objective: Tensor
    """[steps + 1] before the first update and after each."""


def neighbours(x_ND: Tensor, k: int, width: float = 0.0) -> Graph:
    """The graph of each row's k nearest others, made symmetric, with weights exp(-||x_i - x_j||^2 / width^2); 1 for width 0.

    Raises:
        BadInput: k not in 1..N - 1, width below 0, or rows that are not finite.
    """
    if x_ND.ndim != 2 or len(x_ND) < 2:
        raise BadInput(f"rows have shape {list(x_ND.shape)}; need [rows, width] with at least two rows")
    check_finite(x_ND, "rows of the graph")
    positive("k", k, len(x_ND) - 1)
    not_negative("width", width)
    far_NN = torch.cdist(x_ND, x_ND)
    far_NN = torch.minimum(far_NN, far_NN.T)                 # symmetric to the last bit
    far_NN.fill_diagonal_(torch.inf)
    near_NN = torch.zeros_like(far_NN, dtype=torch.bool).scatter(1, far_NN.topk(k, 1, largest=False).indices, True)
    edges_2E = (near_NN | near_NN.T).nonzero().T
    far_E = far_NN[edges_2E[0], edges_2E[1]]
    return Graph(edges_2E, torch.exp(-(far_E / width).square()).clamp_min(_TINY) if width else torch.ones_like(far_E))


def objective(
    x_ND: Tensor, codes_NF: Tensor, atoms_FD: Tensor, sparsity: float, smoothness: float = 0.0, graph: Graph | None = None,
) -> Tensor:
    """The objective above, a scalar; the graph's part is smoothness / 4 * sum over directed edges of w_ij ||z_i - z_j||^2."""
    out = (x_ND - codes_NF @ atoms_FD).square().sum() / 2 + sparsity * codes_NF.sum()
    if graph is not None and smoothness:
        apart_E = (codes_NF[graph.edges_2E[0]] - codes_NF[graph.edges_2E[1]]).square().sum(-1)
        out = out + smoothness / 4 * (graph.weight_E.to(apart_E) * apart_E).sum()
    return out


@torch.no_grad()
def structured_nmf(
    x_ND: Tensor, width: int, *, sparsity: float = 0.0, smoothness: float = 0.0, graph: Graph | None = None, steps: int = 500,
    tolerance: float = 1e-7, seed: int = 0,
) -> Factors:
    """Factor rows [N, D] >= 0 into `width` atoms.

    Args:
        sparsity, smoothness: weights, >= 0. graph: over the rows; needed where smoothness > 0. steps: most updates of both.
        tolerance: stops where the objective falls by less than this fraction. seed: of the start, as in plain NMF uniform.

    Raises:
        BadInput: rows that are negative or not finite, an argument out of range, smoothness without a graph, or a graph over
            other rows.
    """
    if x_ND.ndim != 2 or not x_ND.numel() or bool((x_ND < 0).any()):
        raise BadInput(f"rows of shape {list(x_ND.shape)} must be [rows, width] of numbers >= 0")
    check_finite(x_ND, "rows to factor")
    for name, value in (("sparsity", sparsity), ("smoothness", smoothness), ("tolerance", tolerance)):
        not_negative(name, value)
    if smoothness and graph is None:
        raise BadInput(f"smoothness={smoothness} needs a graph; make one with neighbours(x, k)")
    if graph is not None and graph.edges_2E.numel() and int(graph.edges_2E.max()) >= len(x_ND):
        raise BadInput(f"the graph names row {int(graph.edges_2E.max())}, but there are {len(x_ND)}")
    generator = torch.Generator().manual_seed(seed)
    atoms_FD = normalize(torch.rand(positive("width", width), x_ND.shape[1], generator=generator).to(x_ND) + 0.01, dim=-1)
    codes_NF = torch.rand(len(x_ND), width, generator=generator).to(x_ND) * x_ND.mean() * x_ND.shape[1] ** 0.5
    use = graph if smoothness else None
    degree_N1 = use.sums(x_ND.new_ones(len(x_ND), 1)) if use else x_ND.new_zeros(1)

    def cost(codes: Tensor, atoms: Tensor) -> Tensor:
        return objective(x_ND, codes, atoms, sparsity, smoothness, use)

    history = [cost(codes_NF, atoms_FD)]
    for _ in range(positive("steps", steps)):
        more = x_ND @ atoms_FD.T + (smoothness * use.sums(codes_NF) if use else 0)
        less = codes_NF @ (atoms_FD @ atoms_FD.T) + sparsity + smoothness * degree_N1 * codes_NF
        codes_NF = codes_NF * more / less.clamp_min(_TINY)
        now = cost(codes_NF, atoms_FD)
        pull_FD, own_FD = codes_NF.T @ x_ND, codes_NF.T @ codes_NF @ atoms_FD
        along_F1, held_F1 = ((v * atoms_FD).sum(-1, keepdim=True) for v in (pull_FD, own_FD))
        ratio_FD = (pull_FD + held_F1 * atoms_FD) / (own_FD + along_F1 * atoms_FD).clamp_min(_TINY)
        for halvings in range(12):
            tried_FD = normalize(atoms_FD * ratio_FD.pow(0.5**halvings), dim=-1)
            value = cost(codes_NF, tried_FD)
            if value <= now:
                atoms_FD, now = tried_FD, value
                break
        history.append(now)
        if history[-2] - now <= tolerance * now:
            break
    return Factors(codes_NF, atoms_FD, torch.stack(history))
