"""Attention that a learned slope keeps near: logits lose tau times the distance of their tokens (SparseBEV, Liu et al. 2023, arXiv 2308.09244).

    out_i = softmax_j(q_i k_j / sqrt(D) - tau_ih dist(i, j)) v_j,   tau_ih = softplus(a_h . q_i + b_h)
dist is the distance of two tokens' coordinates, bound by `bind(place)`; of positions where none are. tau comes of the query, one a head, so a
head's field narrows where the query asks for it; tau = 0 is dense attention. `rows` limits attention to tokens whose first coordinate is
less than that far, the row band of Sparse Laneformer (Liu et al. 2024, arXiv 2404.07821); 0 leaves it out.
Departures: the paper's tau is a linear map of the query's features before projection, here of the query itself and kept positive. The
sampling of image features around a query's points is no attention over tokens and not part of this.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width, C = coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ...errors import BadInput, Unsupported
from ...kernels.block_attention.softmax import attend
from ...method import Loss, not_negative, positive
from ..heads import per_head
from ..trained.base import sizes_of
from .base import Structured, places

ROWS = 256
"""Queries worked on at a time."""


class SparseBEV(Structured):
    """Distance-penalised attention.

    Args:
        heads, d_head: of the layer.
        rows: half width of the band in the first coordinate, in its unit; 0 for none.
        seed: of tau's map; tau begins between 0 and 2, as in the paper, at the query 0.
    """

    name = "attention/sparse_bev"
    fitted = "trained"

    def __init__(self, heads: int, d_head: int, rows: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        positive("heads", heads)
        positive("d_head", d_head)
        self.rows = not_negative("rows", rows)
        draw = torch.Generator().manual_seed(seed)
        self.slope_HD = nn.Parameter(torch.randn(heads, d_head, generator=draw) * 0.1 * d_head**-0.5)
        start_H = torch.rand(heads, generator=draw) * 2
        self.start_H = nn.Parameter(start_H.clamp_min(1e-3).expm1().log())
        self._place_SC: Tensor | None = None

    @classmethod
    def for_module(cls, module: nn.Module, **arguments: Any) -> Self:
        """For a Hugging Face attention module, in its dtype and on its device."""
        sizes = sizes_of(module)
        return cls(**{"heads": sizes["heads"], "d_head": sizes["d_head"], **arguments}).to(next(module.parameters()))

    @contextmanager
    def bind(self, place_SC: Tensor) -> Iterator[None]:
        """Coordinates of the tokens served within, [S, C], the same for the batch. Padding is refused beside them."""
        if place_SC.ndim != 2 or not place_SC.is_floating_point() or not bool(place_SC.isfinite().all()):
            raise BadInput(f"place must be finite floats [S, C], not {place_SC.dtype} {list(place_SC.shape)}")
        before, self._place_SC = self._place_SC, place_SC
        try:
            yield
        finally:
            self._place_SC = before

    def loss(self, x: Tensor, y: Tensor) -> Loss:
        """Unsupported: tau learns from the loss of the model that it stands in."""
        raise Unsupported(f"{self.name} learns inside its model: put it in, and step its parameters with the model's")

    def tau(self, q_BHTD: Tensor) -> Tensor:
        """[B, H, T, 1] at least 0."""
        if q_BHTD.shape[1] != len(self.start_H) or q_BHTD.shape[3] != self.slope_HD.shape[1]:
            raise BadInput(f"{self.name} was made for {len(self.start_H)} heads of width {self.slope_HD.shape[1]} and is given {list(q_BHTD.shape)}")
        return softplus(q_BHTD @ self.slope_HD[:, :, None] + self.start_H[:, None, None])

    def attend(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, padding_BS: Tensor | None = None, **how: object) -> Tensor:
        """As Structured.attend. Raises Unsupported for padding beside bound coordinates."""
        if padding_BS is not None and self._place_SC is not None:
            raise Unsupported(f"{self.name} takes bound coordinates for sequences without padding")
        return super().attend(q_BHTD, k_BGSD, v_BGSD, padding_BS=padding_BS, **how)  # type: ignore[arg-type]

    def _apart(self, at_T: Tensor, S: int, causal: bool) -> tuple[Tensor, Tensor]:
        """(distances, whether seen), both [T, S]."""
        j = torch.arange(S, device=at_T.device)
        place = j[:, None].double() if self._place_SC is None else self._place_SC.to(at_T.device).double()
        if len(place) < S:
            raise BadInput(f"{len(place)} tokens have coordinates and {S} keys are there")
        gap = place[at_T[:, 0], None] - place[None, :S]
        keep = j <= at_T if causal else torch.ones(len(at_T), S, dtype=torch.bool, device=j.device)
        return gap.square().sum(-1).sqrt(), keep & (gap[..., 0].abs() < self.rows) if self.rows else keep

    def mix(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        """Some queries at a time."""
        T, S = q.shape[2], k.shape[2]
        at, tau, k, v, outs = places(T, S, q.device)[0], self.tau(q), per_head(k, q.shape[1]), per_head(v, q.shape[1]), []
        for start in range(0, T, ROWS):
            rows = slice(start, start + ROWS)
            far, keep = self._apart(at[rows], S, causal)
            outs.append(attend(q[:, :, rows], k, v, keep, scale, -tau[:, :, rows] * far.to(tau.dtype))[0])
        return torch.cat(outs, 2).to(q.dtype)

    def weights(self, q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
        """The softmax whole."""
        far, keep = self._apart(places(q.shape[2], k.shape[2], q.device)[0], k.shape[2], causal)
        score = q @ per_head(k, q.shape[1]).mT * scale - self.tau(q) * far.to(q.dtype)
        return score.masked_fill(~keep, -torch.inf).softmax(-1)

    def worked(self, T: int, S: int, causal: bool) -> float:
        """Pairs seen and, with a band, within it."""
        return float(self._apart(places(T, S, torch.device("cpu"))[0], S, causal)[1].sum())
