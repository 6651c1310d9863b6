"""Which layers can share a dictionary (Ghilardi et al. 2024, arXiv 2410.21508).

The distance of two layers is the mean angle between what flows at them for the same token; neighbouring groups are merged,
nearest first, until as many are left as asked for. Complete linkage, the paper's, keeps the greatest distance within a group
small and so makes no long chains.

Shape letters: L = layers, B = contexts, T = tokens, D = width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..method import positive
from ..site import capture

LINKAGES = ("complete", "average", "single")


@torch.no_grad()
def angular_distances(model: nn.Module, names: Sequence[str], windows: Iterable[Tensor], skip: int = 1) -> Tensor:
    """[L, L] float64 mean over tokens of arccos(cosine) / pi: 0 for one direction, 1/2 for orthogonal ones, 1 for opposite ones.

    Args:
        names: stream sites of one width. windows: token ids [B, T]. skip: positions left out at the start of each context.

    Raises:
        BadInput: fewer than two sites, sites of several widths, or no tokens.
    """
    if len(names) < 2:
        raise BadInput(f"{len(names)} site{'s' if len(names) != 1 else ''} to group; name at least two, such as 'layers.*.resid_post'")
    total_LL, rows = torch.zeros(len(names), len(names), dtype=torch.float64), 0
    for ids_BT in windows:
        got = capture(model, names, input_ids=ids_BT)
        if len({v.shape[-1] for v in got.values()}) > 1:
            raise BadInput(f"layers are compared at sites of one width; {names[0]} has {got[names[0]].shape[-1]}, others differ")
        unit_LND = torch.stack([torch.nn.functional.normalize(got[name][:, skip:].flatten(0, 1).double(), dim=-1) for name in names])
        for a, unit_ND in enumerate(unit_LND):
            total_LL[a] += ((unit_LND * unit_ND).sum(-1).clamp(-1, 1).acos() / math.pi).sum(-1).cpu()
        rows += unit_LND.shape[1]
    if not rows:
        raise BadInput("no tokens to compare layers on; give more text")
    return (total_LL / rows).fill_diagonal_(0.0)


def layer_groups(distance_LL: Tensor, groups: int, linkage: str = "complete") -> list[list[int]]:
    """Runs of neighbouring layers, by bottom-up clustering in which only neighbours merge; of equally near pairs the first does.

    Args:
        distance_LL: symmetric. groups: in 1..L. linkage: distance of two groups is the greatest, the mean or the least of
            their layers' distances.
    """
    if distance_LL.ndim != 2 or distance_LL.shape[0] != distance_LL.shape[1] or not len(distance_LL):
        raise BadInput(f"distances have shape {list(distance_LL.shape)}; need [layers, layers]")
    positive("groups", groups, len(distance_LL))
    if linkage not in LINKAGES:
        raise BadInput(f"linkage={linkage!r} must be one of {', '.join(LINKAGES)}")
    reduce = {"complete": torch.amax, "average": torch.mean, "single": torch.amin}[linkage]
    found = [[layer] for layer in range(len(distance_LL))]
    while len(found) > groups:
        apart = [float(reduce(distance_LL[a][:, b])) for a, b in zip(found, found[1:], strict=False)]
        at = apart.index(min(apart))
        found[at : at + 2] = [found[at] + found[at + 1]]
    return found
