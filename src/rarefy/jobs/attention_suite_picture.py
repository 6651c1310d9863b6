"""What each head keeps: density and attention mass kept, layers x heads, and the mask of one head as a picture.

Shape letters: B = sequences, H = heads, G = key heads, T = queries, S = keys, D = head width, Q = query blocks, N = key blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..catalogue import Entry
from ..errors import RarefyError
from ..families import config_of
from ..kernels.block_attention import token_mask
from ..method import positive
from ..site import replaced
from .attention_suite_methods import prepare

if TYPE_CHECKING:
    from .attention_suite import AttentionRequest, Sittings
    from .attention_suite_tasks import Sitting

MOST = 4
"""Methods drawn."""
SQUARE = 64
"""Cells of a mask's picture, along each side."""


class _Keeper:
    """Attends as its method does, and notes which pairs the method keeps and how much of dense attention they hold."""

    unit = "key"

    def __init__(self, method: Any) -> None:
        self.method = method
        self.wants = tuple(w for w in getattr(method, "wants", ()) if w != "cache")
        self.pairs_HTS: Tensor | None = None
        self.density_H = self.mass_H = torch.zeros(0)

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.method(*inputs)

    def attend(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, scale: float, causal: bool = True, **more: Any) -> Tensor:
        """The method's attention."""
        T, S, H = q_BHTD.shape[2], k_BGSD.shape[2], q_BHTD.shape[1]
        mask = self.method.choose(q_BHTD * (scale * q_BHTD.shape[-1] ** 0.5), k_BGSD, causal)
        rows = 1 if T == 1 else self.method.query_block
        pairs = token_mask(mask, T, S, block=self.method.block, query_block=rows, causal=causal, allowed=self.method.allowed(), heads=H)
        seen_TS = torch.arange(S) <= torch.arange(S - T, S)[:, None]
        map_BHTS = ((q_BHTD @ k_BGSD.repeat_interleave(H // k_BGSD.shape[1], 1).mT) * scale).masked_fill(~seen_TS, -torch.inf).softmax(-1)
        pairs = pairs.expand_as(map_BHTS)
        self.density_H = pairs.sum((0, 2, 3)) / (seen_TS.sum() * len(map_BHTS))
        self.mass_H = (map_BHTS * pairs).sum(-1).mean((0, 2))
        self.pairs_HTS = pairs[0]
        return self.method.attend(q_BHTD, k_BGSD, v_BGSD, scale=scale, causal=causal, **more)


def shrunk(pairs_TS: Tensor, side: int = SQUARE) -> Tensor:
    """[side, side] share of the pairs of each cell that are kept, of a [T, S] mask; smaller masks are given as they are."""
    positive("side", side)
    (T, S), side = pairs_TS.shape, min(side, *pairs_TS.shape)
    row, column = torch.arange(T) * side // T, torch.arange(S) * side // S
    total = torch.zeros(side, side, dtype=torch.float64)
    cell = (row[:, None] * side + column).flatten()
    total.view(-1).index_add_(0, cell, pairs_TS.double().flatten())
    return total / torch.bincount(cell, minlength=side * side).view(side, side)


@torch.no_grad()
def kept_by_heads(sitting: Sitting, plan: Mapping[str, Any]) -> list[_Keeper]:
    """A keeper a layer, after one sequence has gone through. Raises BadInput as the methods do."""
    layers = config_of(sitting.model).num_hidden_layers
    keepers = [_Keeper(plan.get(f"layers.{i}.attn", next(iter(plan.values())))) for i in range(layers)]
    with replaced(sitting.model, {f"layers.{i}.attn": k for i, k in enumerate(keepers)}):
        sitting.model(input_ids=sitting.ids_BT[:1], use_cache=False)
    return keepers


def _grids(name: str, budget: float, what: str, keepers: Sequence[_Keeper]) -> list[dict[str, Any]]:
    heads, layers = len(keepers[0].density_H), len(keepers)
    mass_LH = torch.stack([k.mass_H for k in keepers])
    labels = {"columns": [f"head {i}" for i in range(heads)], "rows": [f"layer {i}" for i in range(layers)]}
    at = int(mass_LH.argmin())
    pairs = keepers[at // heads].pairs_HTS
    assert pairs is not None
    head = f"{name} at budget {budget:g}"
    return [
        {"title": f"{head}: keys kept", "note": f"Share of the keys seen, on {what}.", **labels,
         "values": torch.stack([k.density_H for k in keepers]).tolist(), "figures": True},
        {"title": f"{head}: attention kept", "note": "Share of the dense attention that lies on the keys kept.", **labels, "values": mass_LH.tolist(),
         "figures": True},
        {"title": f"{head}: mask of layer {at // heads}, head {at % heads}",
         "note": f"The head that loses most attention; queries from top to bottom, keys from left to right, of {pairs.shape[-1]} tokens.",
         "columns": [], "rows": [], "values": shrunk(pairs[at % heads]).tolist(), "figures": False},
    ]


def pictures(cards: Mapping[str, Entry], request: AttentionRequest, sittings: Sittings) -> list[dict[str, Any]]:
    """Grids for the page, of the first methods that choose blocks or keys, at the middle budget, on what the model under test reads."""
    budget, out = sorted(request.budgets)[len(request.budgets) // 2], []
    task = next((t for t in ("text", "induction", "mqar") if t in request.tasks), "mqar")
    sitting = sittings.sitting(task, min(max(request.lengths), 512 if task == "mqar" else sittings.longest))
    for one in cards.values():
        if one.kind != "method" or not hasattr(one.load(), "choose") or len(out) >= 3 * MOST:
            continue
        try:
            plan = prepare(one, budget, request.settings, sitting, None).plan
            out += _grids(one.name, budget, f"{sitting.task} at {sitting.length} tokens", kept_by_heads(sitting, plan))
        except RarefyError:                                 # said already, where it was to be measured
            continue
    return out
