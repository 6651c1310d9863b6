"""Attention whose map from scores to weights is sparse: every score is formed, few weights are more than zero.

Nothing is saved on scores; what is saved is the values of zero weight, and what is gained is that a head says plainly what it
looks at. `weights` is all that a method gives.

Shape letters: B = batch, H = query heads, G = key heads, R = H / G, T = queries, S = keys, D = head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...cost import Cost
from ...errors import BadInput
from ...method import fraction
from ...selection import Selection, check_finite
from ..counted import Counted

ROWS = 256
"""Queries whose scores are held at once."""


class MappedAttention(Counted):
    """map(q k^T * scale) v, with the scores of unseen keys at minus infinity."""

    def weights(self, score_BHTS: Tensor, seen_BHT1: Tensor) -> Tensor:
        """[B, H, T, S] of scores that are -inf where a key is not seen; seen_BHT1 [B or 1, 1, T, 1] the keys that a query can see."""
        raise NotImplementedError

    def naive(self, score_BHTS: Tensor, seen_BHT1: Tensor) -> Tensor:
        """The same by its definition, in the plainest way: what `reference` uses."""
        raise NotImplementedError

    def after(self, out_BHTD: Tensor) -> Tensor:
        """What a method does to the sums of values. Default: nothing."""
        return out_BHTD

    @staticmethod
    def _scores(q: Tensor, k: Tensor, scale: float, first: int | None, real_BS: Tensor | None) -> Tensor:
        """[B, H, T, S] with -inf where a key is not seen; `first` is the position of the first query, None where not causal."""
        share, T, S = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
        rows_BGXD = q.unflatten(1, (-1, share)).flatten(2, 3)
        score = (rows_BGXD @ k.mT * scale).unflatten(2, (share, T)).flatten(1, 2)
        if first is not None:
            at = torch.arange(first, first + T, device=q.device)
            score = score.masked_fill(torch.arange(S, device=q.device) > at[:, None], -torch.inf)
        return score if real_BS is None else score.masked_fill(~real_BS[:, None, None], -torch.inf)

    def _seen_of(self, S: int, T: int, causal: bool, real_BS: Tensor | None, device: torch.device) -> Tensor:
        """[B or 1, 1, T, 1] keys that each query can see."""
        if real_BS is None:
            seen = torch.arange(S - T + 1, S + 1, device=device) if causal else torch.full((T,), S, device=device)
            return seen.view(1, 1, T, 1)
        count = real_BS.cumsum(-1)[:, S - T :] if causal else real_BS.sum(-1, keepdim=True).expand(-1, T)
        return count[:, None, :, None]

    def attend(
        self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, scale: float, causal: bool = True,
        padding_BS: Tensor | None = None, layer: int = 0,
    ) -> Tensor:
        """[B, H, T, D]; query t stands at position S - T + t; padded queries give zeros.

        Args:
            padding_BS: True at real keys.
        """
        for what, x in (("queries", q_BHTD), ("keys", k_BGSD), ("values", v_BGSD)):
            check_finite(x, f"{what} of {self.name} in layer {layer}")
        if q_BHTD.shape[1] % k_BGSD.shape[1]:
            raise BadInput(f"{q_BHTD.shape[1]} query heads are no multiple of {k_BGSD.shape[1]} key heads")
        if not q_BHTD.numel():
            return torch.zeros_like(q_BHTD)
        (B, H, T, D), (G, S) = q_BHTD.shape, k_BGSD.shape[1:3]
        self._shape = (H, D, S, T)
        seen = self._seen_of(S, T, causal, padding_BS, q_BHTD.device)
        real_T = None if padding_BS is None or not causal else padding_BS[:, None, S - T :, None]
        outs = []
        for start in range(0, T, ROWS):
            stop = min(T, start + ROWS)
            last = S - T + stop if causal else S
            real = None if padding_BS is None else padding_BS[:, :last]
            score = self._scores(q_BHTD[:, :, start:stop], k_BGSD[:, :, :last], scale, S - T + start if causal else None, real)
            weight = self.weights(score, seen[:, :, start:stop])
            if real_T is not None:
                weight = torch.where(real_T[:, :, start:stop], weight, 0)
            self._kept += float((weight.detach() != 0).sum())
            rows_BGXS = weight.unflatten(1, (G, H // G)).flatten(2, 3)
            outs.append((rows_BGXS @ v_BGSD[:, :, :last]).unflatten(2, (H // G, stop - start)).flatten(1, 2))
        self._seen += float(seen.expand(B, H, T, 1).sum())
        out = self.after(torch.cat(outs, 2))
        return out if real_T is None else torch.where(real_T, out, 0)

    def select(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor | None = None) -> Selection:
        """Keys of causal attention with a weight other than zero, mask form [B, H, T, S]."""
        for what, x in (("queries", q_BHTD), ("keys", k_BGSD)):
            check_finite(x, f"{what} of {self.name}")
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        score = self._scores(q_BHTD, k_BGSD, q_BHTD.shape[-1] ** -0.5, S - T, None)
        weight = self.weights(score, self._seen_of(S, T, True, None, score.device)) if score.numel() else score
        return Selection(S, weight, mask_=weight != 0)

    def forward(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
        """Causal attention with scale 1 / sqrt(D)."""
        return self.attend(q_BHTD, k_BGSD, v_BGSD, scale=q_BHTD.shape[-1] ** -0.5)

    def reference(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
        """All scores at once, the map by its definition."""
        if not q_BHTD.numel():
            return torch.zeros_like(q_BHTD)
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        score = self._scores(q_BHTD, k_BGSD, q_BHTD.shape[-1] ** -0.5, S - T, None)
        weight = self.naive(score, self._seen_of(S, T, True, None, score.device))
        return self.after(weight.to(v_BGSD.dtype) @ v_BGSD.repeat_interleave(q_BHTD.shape[1] // k_BGSD.shape[1], 1))

    def cost(self, density: float | None = None) -> Cost:
        """Per query at the context of the last call: every score, and the values of weight; bytes in float32."""
        H, D, S = self.dims()
        density = 1.0 if density is None else density
        return Cost(2 * H * D * S * (1 + density), 4 * H * D * S * (1 + density))


class BudgetedMap(MappedAttention):
    """A map that is told how many keys to keep.

    Args:
        budget: fraction of the visible keys.
    """

    def __init__(self, budget: float = 0.25) -> None:
        super().__init__()
        self._budget = fraction("budget", budget)

    @property
    def budget(self) -> float:
        """Fraction of the visible keys asked for."""
        return self._budget
