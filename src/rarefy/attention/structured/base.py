"""What methods share whose rows are weights over keys, but are not a mask under one softmax: synthetic keys, other maps, learned biases.

A method writes `mix` (what is computed) and `weights` (its definition, the whole [T, S] matrix).

Shape letters: B = batch, H = query heads, G = key heads (H is a multiple of G), T = queries, S = keys, D = head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...cost import Cost
from ...errors import BadInput
from ...selection import Selection, check_finite
from ..counted import Counted
from ..heads import per_head, real_places


def places(T: int, S: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(positions of the queries [T, 1], of the keys [S])."""
    return torch.arange(S - T, S, device=device)[:, None], torch.arange(S, device=device)


class Structured(Counted):
    """Attention by `mix`; its definition is `weights` @ values."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        """[B, H, T, D]; query t stands at position S - T + t."""
        raise NotImplementedError

    def weights(self, q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
        """[B, H, T, S] the weight of every key: what `mix` must come to, formed whole."""
        raise NotImplementedError

    def worked(self, T: int, S: int, causal: bool) -> float:
        """(query, key or summary) logits formed for a head."""
        raise NotImplementedError

    def _refuse(self, layer: int | None, **given: Tensor) -> None:
        for what, x in given.items():
            check_finite(x, f"{what} of {self.name}{'' if layer is None else f' in layer {layer}'}")
        q, k = given["queries"], given["keys"]
        if q.shape[1] % k.shape[1]:
            raise BadInput(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")

    def attend(
        self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, scale: float, causal: bool = True, padding_BS: Tensor | None = None, layer: int = 0,
    ) -> Tensor:
        """[B, H, T, D].

        Args:
            padding_BS: True at real keys; rows are worked through without their padding, and padded queries give zeros.

        Raises:
            BadInput: NaN or inf, query heads that are no multiple of the key heads.
        """
        self._refuse(layer, queries=q_BHTD, keys=k_BGSD, values=v_BGSD)
        if padding_BS is None:
            return self._attend(q_BHTD, k_BGSD, v_BGSD, scale, causal)
        rows = list(torch.zeros_like(q_BHTD))
        for b, keys, at in real_places(padding_BS, q_BHTD.shape[2], causal):
            got = self._attend(q_BHTD[b : b + 1, :, at], k_BGSD[b : b + 1, :, keys], v_BGSD[b : b + 1, :, keys], scale, causal)
            rows[b] = rows[b].index_copy(1, at, got[0])
        return torch.stack(rows) if rows else torch.zeros_like(q_BHTD)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        if not q.numel():
            return torch.zeros_like(q)
        B, H, T, D = q.shape
        S = k.shape[2]
        self._shape = (H, D, S, T)
        self._kept += B * H * self.worked(T, S, causal)
        self._seen += B * H * (T * S - T * (T - 1) / 2 if causal else T * S)
        return self.mix(q, k, v, scale, causal)

    def select(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor | None = None) -> Selection:
        """Keys of causal attention with a weight other than zero, [B, H, T, S]."""
        self._refuse(None, queries=q_BHTD, keys=k_BGSD, values=k_BGSD if v_BGSD is None else v_BGSD)
        weight = self.weights(q_BHTD, k_BGSD, q_BHTD.shape[-1] ** -0.5, True)
        return Selection(weight.shape[-1], weight, mask_=weight != 0)

    def forward(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
        """Causal attention with scale 1 / sqrt(D)."""
        return self.attend(q_BHTD, k_BGSD, v_BGSD, scale=q_BHTD.shape[-1] ** -0.5)

    def reference(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
        """Every weight, then the values."""
        if not q_BHTD.numel():
            return torch.zeros_like(q_BHTD)
        return self.weights(q_BHTD, k_BGSD, q_BHTD.shape[-1] ** -0.5, True).to(v_BGSD.dtype) @ per_head(v_BGSD, q_BHTD.shape[1])

    def cost(self, density: float | None = None) -> Cost:
        """Per query at the context of the last call, all heads; by default at the structure's own density there. Bytes in float32."""
        H, D, S = self.dims()
        if density is None:
            _, _, keys, T = self._shape or (0, 0, 0, 1)
            density = self.worked(T, keys, True) / (T * S)
        return Cost(4 * H * D * S * density, 8 * H * D * S * density)
