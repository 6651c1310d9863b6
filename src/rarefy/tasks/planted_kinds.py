"""Kinds of planted data: what papers on dictionaries say their method is for, each with its ground truth.

Rows are codes @ dictionary + noise in every kind, strengths uniform in [0.5, 1.5] unless said otherwise; kinds differ in
which codes occur together, in their signs, and in how directions lie. `l0` is the mean number of codes a row in all.

Shape letters: N = rows, D = width, F = true features, P = parents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import BadInput
from .planted import Planted, check_sizes, make, seeded

CHILDREN = 3
"""Children of each parent; a feature is a parent or a child."""
ALONE = 0.25
"""Share of a parent's rows on which none of its children is on; on the others exactly one is."""
LEVEL_CORRELATION = 0.5
"""Share of a direction's square that all directions of its level have in common (hierarchical)."""


@dataclass(frozen=True)
class Truth(Planted):
    """Planted rows with their structure."""

    parent: Tensor
    """[F] int64: the feature that is on whenever this one is; -1 for none."""
    block: Tensor
    """[F] int64: features of one number are coordinates of one multi-dimensional feature."""
    signal: Tensor
    """[N, D] rows without noise."""

    def rows(self, start: int, stop: int) -> Truth:
        """The same dictionary with some of the rows."""
        cut = slice(start, stop)
        return Truth(self.x[cut], self.codes[cut], self.dictionary, self.parent, self.block, self.signal[cut])

    @property
    def on(self) -> Tensor:
        """[N, blocks] bool: which features, of one or more dimensions, a row has."""
        flat = (self.codes != 0).long()
        count = int(self.block.max()) + 1
        return torch.zeros(len(flat), count, dtype=torch.long).index_add_(1, self.block, flat) > 0


@dataclass(frozen=True)
class Kind:
    """One kind of planted data."""

    about: str
    draw: Callable[[int, int, int, float, float, int], Truth]
    """(n, d, features, l0, noise, seed) -> rows."""
    signed: bool = False
    """Whether a direction and its opposite are one feature."""
    noise: float = 0.05
    """Root mean square of the noise over that of the signal."""


def plant(kind: str, n: int, d: int, features: int, l0: float, *, noise: float | None = None, seed: int = 0) -> Truth:
    """Draw rows of a kind of KINDS.

    Args:
        n: rows. d: width. features: F; a multiple of 4 for parents with children, of 2 for circles. l0: mean codes a row.
        noise: root mean square of the noise over that of the signal; None takes the kind's own.

    Raises:
        BadInput: an unknown kind, or a size out of range.
    """
    if kind not in KINDS:
        raise BadInput(f"no kind {kind!r} of planted data; there are {', '.join(KINDS)}")
    level = KINDS[kind].noise if noise is None else noise
    check_sizes(n, d, features, l0, level)
    return KINDS[kind].draw(n, d, features, l0, level, seed)


def _truth(codes_NF: Tensor, dictionary_FD: Tensor, noise: float, generator: torch.Generator, parent: Tensor | None = None,
           block: Tensor | None = None) -> Truth:
    features = len(dictionary_FD)
    signal_ND = codes_NF @ dictionary_FD
    x_ND = signal_ND
    if noise:
        x_ND = signal_ND + noise * signal_ND.square().mean().sqrt() * torch.randn(signal_ND.shape, generator=generator)
    parent = torch.full((features,), -1) if parent is None else parent
    return Truth(x_ND, codes_NF, dictionary_FD, parent, torch.arange(features) if block is None else block, signal_ND)


def _plain(correlation: float = 0.0, skew: float = 0.0) -> Callable[[int, int, int, float, float, int], Truth]:
    def draw(n: int, d: int, features: int, l0: float, noise: float, seed: int) -> Truth:
        p = make(n, d, features, l0, noise=noise, correlation=correlation, skew=skew, seed=seed)
        return Truth(p.x, p.codes, p.dictionary, torch.full((features,), -1), torch.arange(features), p.codes @ p.dictionary)

    return draw


def _strength(n: int, count: int, generator: torch.Generator, spread: float = 0.5) -> Tensor:
    return 1 - spread + 2 * spread * torch.rand(n, count, generator=generator)


def _varying(n: int, d: int, features: int, l0: float, noise: float, seed: int) -> Truth:
    """Every row has its own sparsity: its rate is an exponential variable's multiple of the mean, so that L0 varies as much as it is large."""
    g = seeded(seed)
    dictionary_FD = normalize(torch.randn(features, d, generator=g), dim=-1)
    own_N1 = -torch.rand(n, 1, generator=g).clamp_min(1e-12).log()
    on_NF = torch.rand(n, features, generator=g) < l0 / features * own_N1
    return _truth(_strength(n, features, g) * on_NF, dictionary_FD, noise, g)


def _antipodal(n: int, d: int, features: int, l0: float, noise: float, seed: int) -> Truth:
    """Either sign of a direction, each as often (a concept and its opposite)."""
    g = seeded(seed)
    dictionary_FD = normalize(torch.randn(features, d, generator=g), dim=-1)
    on_NF = torch.rand(n, features, generator=g) < l0 / features
    sign_NF = torch.randint(2, (n, features), generator=g) * 2 - 1
    return _truth(_strength(n, features, g) * on_NF * sign_NF, dictionary_FD, noise, g)


def _circles(n: int, d: int, features: int, l0: float, noise: float, seed: int) -> Truth:
    """Planes: a feature that is on lies anywhere on a ring, so that no direction of its plane is better than another."""
    if features % 2 or d < 2:
        raise BadInput(f"features={features} must be even and d={d} at least 2: a circle takes two dimensions")
    g = seeded(seed)
    planes = features // 2
    dictionary_FD = torch.linalg.qr(torch.randn(planes, d, 2, generator=g)).Q.transpose(1, 2).reshape(features, d)
    on_NP = torch.rand(n, planes, generator=g) < l0 / features
    angle_NP, radius_NP = 2 * math.pi * torch.rand(n, planes, generator=g), _strength(n, planes, g)
    codes_NF = torch.stack([angle_NP.cos(), angle_NP.sin()], -1).mul(radius_NP[..., None]) * on_NP[..., None]
    return _truth(codes_NF.flatten(1), dictionary_FD, noise, g, block=torch.arange(planes).repeat_interleave(2))


def _family(n: int, features: int, l0: float, g: torch.Generator, spread: float) -> tuple[Tensor, Tensor]:
    """(codes, parent): parents independently on; given a parent, none or exactly one of its children."""
    if features % (1 + CHILDREN):
        raise BadInput(f"features={features} must be a multiple of {1 + CHILDREN}: a parent and its {CHILDREN} children")
    parents = features // (1 + CHILDREN)
    rate = l0 / (parents * (2 - ALONE))
    if rate > 1:
        raise BadInput(f"l0={l0} must be at most {parents * (2 - ALONE):g} with {parents} parents and one child of each at a time")
    on_NP = torch.rand(n, parents, generator=g) < rate
    some_NP = torch.rand(n, parents, generator=g) >= ALONE
    which_NP = torch.randint(CHILDREN, (n, parents), generator=g)
    child = (on_NP & some_NP)[..., None] & (which_NP[..., None] == torch.arange(CHILDREN))
    on_NF = torch.cat([on_NP, child.flatten(1)], 1)
    parent = torch.cat([torch.full((parents,), -1), torch.arange(parents).repeat_interleave(CHILDREN)])
    return _strength(n, features, g, spread) * on_NF, parent


def _hierarchical(n: int, d: int, features: int, l0: float, noise: float, seed: int) -> Truth:
    """Conditional orthogonality (Costa et al. 2025, arXiv 2506.03093): levels lie in orthogonal subspaces, directions of one level overlap."""
    if d < 2:
        raise BadInput(f"d={d} must be at least 2: parents and children each need dimensions of their own")
    g = seeded(seed)
    codes_NF, parent = _family(n, features, l0, g, 0.5)
    basis_DD = torch.linalg.qr(torch.randn(d, d, generator=g)).Q
    levels = []
    for size, basis_SD in ((features // (1 + CHILDREN), basis_DD[: d // 2]), (features - features // (1 + CHILDREN), basis_DD[d // 2 :])):
        common_1S = normalize(torch.randn(1, len(basis_SD), generator=g), dim=-1)
        own = normalize(torch.randn(size, len(basis_SD), generator=g), dim=-1)
        levels.append(normalize(math.sqrt(LEVEL_CORRELATION) * common_1S + math.sqrt(1 - LEVEL_CORRELATION) * own, dim=-1) @ basis_SD)
    return _truth(codes_NF, torch.cat(levels), noise, g, parent=parent)


def _contained(n: int, d: int, features: int, l0: float, noise: float, seed: int) -> Truth:
    """A child is on only with its parent (Chanin et al. 2024, arXiv 2409.14507): random directions, strengths in [0.9, 1.1],

    so that a latent for both together costs little error and saves one latent.
    """
    g = seeded(seed)
    codes_NF, parent = _family(n, features, l0, g, 0.1)
    return _truth(codes_NF, normalize(torch.randn(features, d, generator=g), dim=-1), noise, g, parent=parent)


KINDS: dict[str, Kind] = {
    "independent": Kind("features on independently, at equal rates", _plain()),
    "correlated": Kind("groups of 8 features that tend to be on together", _plain(correlation=0.6)),
    "skewed": Kind("rates fall as 1 / rank", _plain(skew=1.0)),
    "varying": Kind("some rows use few features and some many", _varying),
    "hierarchical": Kind("children orthogonal to all parents, overlapping among themselves", _hierarchical),
    "contained": Kind("a child is on only where its parent is", _contained),
    "antipodal": Kind("either sign of a direction", _antipodal, signed=True),
    "circles": Kind("planes instead of directions", _circles),
    "noisy": Kind("independent, with noise of half the signal's size", _plain(), noise=0.5),
}
