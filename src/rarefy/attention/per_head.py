"""Different methods for different heads of one layer (DuoAttention's and MoA's shape: some heads stream, some retrieve).

Shape letters as in block.py; M = methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput, Unsupported


class PerHead(nn.Module):
    """The i-th of M equal groups of consecutive query heads attends by the i-th method.

    A plan's value like any attention method: `{"layers.3.attn": PerHead([WindowSinks(0.1), Quest(0.1)])}` gives the first
    half of the heads window and sinks, the second half Quest. A method may stand in several places of the list.

    Args:
        methods: attention methods; their number divides the number of query heads.
    """

    wants = ("positions", "rotary")

    def __init__(self, methods: Sequence[nn.Module]) -> None:
        super().__init__()
        if not methods:
            raise BadInput("PerHead was given no methods; give one a group of heads")
        for method in methods:
            if not hasattr(method, "attend"):
                raise BadInput(f"PerHead takes attention methods (they have `attend`), not a {type(method).__name__}")
            if "hidden" in getattr(method, "wants", ()):
                named = getattr(method, "name", type(method).__name__)
                raise Unsupported(f"{named} has parameters for every head of its layer and cannot serve a few of them")
        self.methods = nn.ModuleList(methods)

    def attend(
        self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, scale: float, causal: bool = True, padding_BS: Tensor | None = None,
        layer: int = 0, position_ids: Tensor | None = None, rotary: Any = None,
    ) -> Tensor:
        """[B, H, T, D]; each group sees its own key heads."""
        H, G, M = q_BHTD.shape[1], k_BGSD.shape[1], len(self.methods)
        if H % M:
            raise BadInput(f"{M} methods cannot share {H} query heads evenly; list a method more than once to give it more")
        heads, share = H // M, H // G
        out = []
        for i, method in enumerate(self.methods):
            first, last = i * heads // share, ((i + 1) * heads - 1) // share + 1
            k, v = k_BGSD[:, first:last], v_BGSD[:, first:last]
            if heads % share and share % heads:                    # a group that cuts through key heads: a key head each
                of_head = torch.arange(i * heads, (i + 1) * heads, device=k.device) // share - first
                k, v = k[:, of_head], v[:, of_head]
            extras: dict[str, Any] = {
                "cache": {"cache": None}, "positions": {"position_ids": position_ids}, "rotary": {"rotary": rotary},
            }
            more: dict[str, Any] = {}
            for wanted in getattr(method, "wants", ()):
                more |= extras[wanted]
            out.append(method.attend(  # type: ignore[operator]
                q_BHTD[:, i * heads : (i + 1) * heads], k, v, scale=scale, causal=causal, padding_BS=padding_BS, layer=layer, **more
            ))
        return torch.cat(out, 1)

    def forward(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
        """Causal attention with scale 1 / sqrt(D)."""
        return self.attend(q_BHTD, k_BGSD, v_BGSD, scale=q_BHTD.shape[-1] ** -0.5)

    def measured_density(self) -> float:
        """Mean over the groups of heads, since this was last asked."""
        each = {id(m): m.measured_density() for m in dict.fromkeys(self.methods)}  # type: ignore[operator]
        return sum(each[id(m)] for m in self.methods) / len(self.methods)
