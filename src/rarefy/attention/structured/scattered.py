"""ScatterFormer's scattered linear attention (He et al. 2024, arXiv 2401.00912): ragged windows of any size in one flat sequence, no padding.

    out_i = phi(q_i) KV_g / (phi(q_i) K_g),   KV_g = sum over window g's j of phi(k_j) v_j^T,   K_g = sum of phi(k_j),   g = window of i
The cost is linear in tokens however they fall into windows. phi = elu + 1 (Katharopoulos et al. 2020), which keeps K_g above zero. Without
labels a window is a run of `window` positions; `bind(group)` gives each token its window. In causal attention only a window's earlier keys
count, by products within the window. The convolution between windows is the model's, not attention's.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width, I, J = queries and keys of a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import elu

from ...errors import BadInput, Unsupported
from ...method import positive
from ..heads import per_head
from .base import Structured, places


def members(label: Tensor) -> dict[int, Tensor]:
    """Window -> rising positions of its tokens."""
    names, counts = label.unique(return_counts=True)
    return dict(zip(names.tolist(), label.argsort(stable=True).split(counts.tolist()), strict=True))


class Scattered(Structured):
    """Linear attention in windows.

    Args:
        window: positions in a window, where none are bound.
    """

    name = "attention/scatterformer"

    def __init__(self, window: int = 64) -> None:
        super().__init__()
        self.window = positive("window", window)
        self._group_S: Tensor | None = None

    @contextmanager
    def bind(self, group_S: Tensor) -> Iterator[None]:
        """Windows of the sequences served within: whole numbers [S], one a position, the same for the batch. Padding is refused beside them."""
        if group_S.ndim != 1 or group_S.is_floating_point():
            raise BadInput(f"group must be whole numbers [S], not {group_S.dtype} {list(group_S.shape)}")
        before, self._group_S = self._group_S, group_S
        try:
            yield
        finally:
            self._group_S = before

    def groups(self, S: int, device: torch.device) -> Tensor:
        """[S] window of each position."""
        if self._group_S is None:
            return torch.arange(S, device=device) // self.window
        if len(self._group_S) < S:
            raise BadInput(f"{len(self._group_S)} positions have a window and {S} keys are there")
        return self._group_S[:S].to(device)

    def attend(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, padding_BS: Tensor | None = None, **how: object) -> Tensor:
        """As Structured.attend. Raises Unsupported for padding beside bound windows."""
        if padding_BS is not None and self._group_S is not None:
            raise Unsupported(f"{self.name} takes bound windows for sequences without padding")
        return super().attend(q_BHTD, k_BGSD, v_BGSD, padding_BS=padding_BS, **how)  # type: ignore[arg-type]

    def mix(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        """Window by window; queries whose window holds no key give zeros."""
        H, T, S = q.shape[1], q.shape[2], k.shape[2]
        group = self.groups(S, q.device)
        keys, unit = members(group), scale**0.5
        phi_q, phi_k, v = elu(q * unit) + 1, elu(per_head(k, H) * unit) + 1, per_head(v, H)
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        out, (at, _) = torch.zeros_like(v[:, :, :1]).expand(-1, -1, T, -1), places(T, S, q.device)
        for w, i in members(group[S - T :]).items():
            j = keys[w]
            few = phi_k[:, :, j]
            if causal:
                got = ((phi_q[:, :, i] @ few.mT) * (j <= at[i])) @ v[:, :, j]
            else:
                got = phi_q[:, :, i] @ (few.mT @ v[:, :, j])
            out = out.index_copy(2, i, got)
        return out[..., :-1] / out[..., -1:]

    def weights(self, q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
        """phi(q_i) phi(k_j) over its sum in the window."""
        T, S = q.shape[2], k.shape[2]
        group, (at, j) = self.groups(S, q.device), places(T, S, q.device)
        keep = group[S - T :, None] == group
        keep = keep & (j <= at) if causal else keep
        score = ((elu(q * scale**0.5) + 1) @ (elu(per_head(k, q.shape[1]) * scale**0.5) + 1).mT) * keep
        return score / score.sum(-1, keepdim=True)

    def worked(self, T: int, S: int, causal: bool) -> float:
        """Pairs that the sums stand for."""
        group = self.groups(S, torch.device("cpu"))
        _, name, count = group.unique(return_inverse=True, return_counts=True)
        if not causal:
            return float(count[name[S - T :]].sum())
        earlier = torch.zeros(S)
        for at in members(group).values():
            earlier[at] = torch.arange(1.0, len(at) + 1)
        return float(earlier[S - T :].sum())
