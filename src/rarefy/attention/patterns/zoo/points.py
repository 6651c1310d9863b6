"""Patterns of graphs and of points: attention along edges, and in windows of voxels that hold unequally many.

Shape letters: N = nodes, points or voxels; C = coordinates; S = sets; K = members of a set.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ....errors import BadInput
from ....method import positive
from ..lifts import by, layers
from ..pattern import Pattern
from ..relations import edges, expander, key_is, members, query_is, same
from ..words import own, word
from .example import Example


@word
def exphormer(degree: int = 4, seed: int = 0) -> Pattern:
    """Exphormer (Shirzad et al. 2023, arXiv 2303.06147): a graph's edges, an expander over its nodes, loops, virtual nodes tied to all.

    Reads "graph" [edges, 2], "node" (its number, -1 for virtual nodes) and "virtual" (1 for those).
    """
    return edges("graph", both=True) | by("node", expander(degree, seed)) | own() | key_is("virtual") | query_is("virtual")


@word
def scene_graph() -> Pattern:
    """Scene graph modification (He et al. 2020, arXiv 2010.02591): nodes see themselves and their neighbours, by "graph" [edges, 2]."""
    return edges("graph", both=True) | own()


@word
def dsvt() -> Pattern:
    """DSVT (Wang et al. 2023, arXiv 2301.06051): sets of equal size, sorted along x and, in every second layer, along y; see `dsvt_sets`."""
    return layers(members("sets_x"), members("sets_y"))


@word
def flatformer() -> Pattern:
    """FlatFormer (Liu et al. 2023, arXiv 2301.08739): groups of equal size, sorted by windows along x and, in turn, along y; see `flat_groups`."""
    return layers(same("group_x"), same("group_y"))


@word
def swin3d() -> Pattern:
    """Swin3D (Yang et al. 2023, arXiv 2304.06906): occupied voxels of a cubic window, in every second layer shifted; see `voxel_windows`."""
    return layers(same("window"), same("shifted"))


def voxel_windows(at_NC: Tensor, size: int, shift: int = 0) -> Tensor:
    """[N] number of the cubic window that each voxel lies in, windows cut `shift` earlier on every axis.

    Raises:
        BadInput: coordinates that are not whole numbers [N, C].
    """
    if at_NC.ndim != 2 or at_NC.is_floating_point():
        raise BadInput(f"voxels are whole numbers [voxels, coordinates], not {at_NC.dtype} {list(at_NC.shape)}")
    positive("size", size)
    return torch.unique((at_NC + shift).div(size, rounding_mode="floor"), dim=0, return_inverse=True)[1]


def _sorted(at_NC: Tensor, size: int, axis: int, shift: int) -> tuple[Tensor, Tensor]:
    """(window of each voxel, order by window and in it by `axis` and then the others)."""
    window_N = voxel_windows(at_NC, size, shift)
    axes = [axis, *(c for c in range(at_NC.shape[1]) if c != axis)]
    order = torch.arange(len(at_NC))
    for column in [*(at_NC[:, c] for c in reversed(axes)), window_N]:        # least important first; each sort is stable
        order = order[column[order].argsort(stable=True)]
    return window_N, order


def dsvt_sets(at_NC: Tensor, size: int, members: int, axis: int = 0, shift: int = 0) -> Tensor:
    """[S, K] voxels of DSVT's sets (sec. 3.2): each window's n voxels, sorted, in ceil(n / K) sets of K by evenly spaced index.

    Place k of set j holds voxel floor((j K + k) n / (sets K)) of its window, so that some stand twice and none is padding.
    """
    positive("members", members)
    window_N, order = _sorted(at_NC, size, axis, shift)
    sets = []
    for count, mine in zip(window_N.bincount().tolist(), order.split(window_N.bincount().tolist()), strict=True):
        slots = -(-count // members) * members
        sets.append(mine[torch.arange(slots) * count // slots].view(-1, members))
    return torch.cat(sets) if sets else torch.zeros(0, members, dtype=torch.long)


def flat_groups(at_NC: Tensor, size: int, members: int, axis: int = 0, shift: int = 0) -> Tensor:
    """[N] FlatFormer's groups (sec. 3.2): all voxels sorted by window, and in it by `axis`, cut in runs of `members`, the last shorter."""
    positive("members", members)
    order = _sorted(at_NC, size, axis, shift)[1]
    group = torch.empty(len(at_NC), dtype=torch.long)
    group[order] = torch.arange(len(at_NC)) // members
    return group


def scattered(length: int, seed: int = 0) -> Tensor:
    """[N, 2] different voxels of a picture of which they fill a quarter, in the order of scanning; made up."""
    side = 2 * round(length**0.5)
    cell = torch.randperm(side * side, generator=torch.Generator().manual_seed(seed))[:length].sort().values
    return torch.stack([cell // side, cell % side], 1)


def _graph(length: int) -> Mapping[str, Tensor]:
    """A ring with a few chords; the last of the length are virtual nodes."""
    virtual = max(1, length // 64)
    nodes = length - virtual
    ring, chord = torch.arange(nodes), torch.arange(0, nodes, 5)
    graph = torch.cat([torch.stack([ring, (ring + 1) % nodes], 1), torch.stack([chord, (chord * 7 + 3) % nodes], 1)])
    is_virtual = (torch.arange(length) >= nodes).long()
    return {"graph": graph, "node": torch.where(is_virtual == 1, -1, torch.arange(length)), "virtual": is_virtual}


def _voxels(length: int) -> Mapping[str, Tensor]:
    at, size = scattered(length), 8
    out = {f"sets_{name}": dsvt_sets(at, size, 12, axis) for axis, name in enumerate("xy")}
    out |= {f"group_{name}": flat_groups(at, size, 16, axis, 0 if axis == 0 else size // 2) for axis, name in enumerate("xy")}
    return out | {"window": voxel_windows(at, size), "shifted": voxel_windows(at, size, size // 2)}


EXAMPLES = (
    Example("exphormer", lambda n: exphormer(4), _graph, causal=False),
    Example("scene_graph", lambda n: scene_graph(), lambda n: {"graph": _graph(n)["graph"]}, causal=False),
    Example("dsvt", lambda n: dsvt(), _voxels, causal=False, layers=2),
    Example("flatformer", lambda n: flatformer(), _voxels, causal=False, layers=2),
    Example("swin3d", lambda n: swin3d(), _voxels, causal=False, layers=2),
)
