"""Pages chosen at each step, nothing evicted (Quest, Tang et al. 2024, arXiv 2406.10774).

Shape letters: B = batch, H = query heads, G = key heads, T = new tokens, S = tokens held, N = pages, D = head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import BadInput, Unsupported
from ...kernels.block_attention import block_attention, page_meta, page_scores, top_pages
from ...kernels.cache_steps import pages_step
from ...method import positive
from .aligned import Aligned
from .base import Growing
from .entries import attend_entries, dense
from .policy import Policy, PolicyLayer, Rotary


class _Layer(PolicyLayer):
    policy: Pages

    def __init__(self, policy: Policy, index: int) -> None:
        super().__init__(policy, index)
        self.all = Aligned()
        self.bounds = Growing()
        """Largest, then smallest key of each page by channel, [B, G, N, 2 D]."""

    def answer(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, at_BT: Tensor, *, scale: float, rotary: Rotary, hidden_BTD: Tensor | None
    ) -> Tensor:
        held = len(self.all)
        self.all.place(at_BT, k=k_BGTD, v=v_BGTD)
        k, v = self.all["k"], self.all["v"]
        self._bound(k, int(at_BT.clamp_min(0).amin()) if held else 0)
        if q_BHTD.shape[2] > 1:
            if not held:
                return dense(q_BHTD, k_BGTD, v_BGTD, at_BT, scale)
            return attend_entries(q_BHTD, k, v, self.all.at()[:, None].expand(*k.shape[:3]), at_BT, scale)[0]
        assert self.all.count_B is not None
        counts = self.all.count_B.tolist()
        if len(set(counts)) == 1 and bool((at_BT >= 0).all()):
            return self._read(q_BHTD, slice(None), counts[0], scale)
        out = torch.zeros_like(q_BHTD)
        for b, count in enumerate(counts):
            if int(at_BT[b, 0]) >= 0:
                out[b : b + 1] = self._read(q_BHTD[b : b + 1], slice(b, b + 1), count, scale)
        return out

    def step(self, q_BH1D: Tensor, k_BG1D: Tensor, v_BG1D: Tensor, *, scale: float) -> Tensor | None:
        held, page = len(self.all), self.policy.page
        if not held:
            return None
        N, fresh = held // page + 1, held % page == 0
        room, keep = self.all.room(1), max(1, round(self.budget * N))
        out, _ = pages_step(
            q_BH1D, k_BG1D, v_BG1D, room["k"], room["v"], self.bounds.room(int(fresh)), held=held, page=page, keep=keep, scale=scale)
        self.all.count(1)
        self.bounds.length += fresh
        self.policy.note(q_BH1D.shape[:2].numel() * (keep * page - N * page + held + 1), q_BH1D.shape[:2].numel() * (held + 1))
        return out

    def _bound(self, k_BGSD: Tensor, first_new: int) -> None:
        """Bring the bounds up to date from the first page that changed."""
        page, start = self.policy.page, first_new // self.policy.page
        changed, D = k_BGSD[:, :, start * page :], k_BGSD.shape[-1]
        there = (self.all.at() >= 0)[:, None, start * page :, None]
        if bool(there.all()):
            meta = page_meta(changed, page)
        else:
            ends = (page_meta(changed.masked_fill(~there, end), page) for end in (-torch.inf, torch.inf))
            meta = torch.cat([x[..., i * D : (i + 1) * D] for i, x in enumerate(ends)], -1)
        self.bounds.length = start
        self.bounds.append(meta)

    def _read(self, q_BH1D: Tensor, rows: slice, count: int, scale: float) -> Tensor:
        """Attention of one query a head over its best pages, of rows with `count` tokens each."""
        page = self.policy.page
        N = -(-count // page)
        k, v = (self.all[n][rows, :, :count] for n in "kv")
        score_BHN = page_scores(q_BH1D, k, page, self.bounds.view()[rows, :, :N])[:, :, 0]
        score_BHN[..., -1] = torch.inf
        mask_BHN = top_pages(score_BHN[:, :, None], max(1, round(self.budget * N)))[:, :, 0]
        self.policy.note(float(mask_BHN.sum()) * page - float(mask_BHN[..., -1].sum()) * (N * page - count), mask_BHN.shape[:2].numel() * count)
        return block_attention(q_BH1D, k, v, mask_BHN[:, :, None], block=page, query_block=1, scale=scale)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens: -n, as in transformers. Nothing else was dropped, so that what is left is what it was."""
        if tokens_to_remove > 0:
            raise BadInput(f"crop({tokens_to_remove}): give minus the number of tokens to drop")
        if not self.uniform:
            raise Unsupported(f"{self} cannot be cropped where a row has padding: which of its newest tokens are real is not held")
        left = max(0, self.seen + tokens_to_remove)
        if left == self.seen:
            return
        self.seen, page = left, self.policy.page
        self.all.crop(left)
        self.bounds.length = min(self.bounds.length, left // page)
        if left % page:
            self.bounds.append(page_meta(self.all["k"][:, :, left // page * page :], page))

    def tensors(self) -> dict[str, Tensor]:
        return self.all.tensors() | ({} if self.bounds.store is None else {"bounds": self.bounds.store})

    def kept(self) -> Tensor:
        assert self.all.count_B is not None
        return self.all.count_B[:, None].expand(-1, self.all["k"].shape[1])

    def rows(self, take: Callable[[Tensor], Tensor]) -> None:
        self.all.rows(take)
        self.bounds.rows(take)


class Pages(Policy):
    """Every entry stays; a single new token reads the pages whose bound promises most, its own page among them.

    A chunk of tokens (a prompt) attends densely, as in the paper. The budget is what is read at a step, max(1,
    round(budget * pages)) pages for each query head; memory does not fall.

    Args:
        page: entries in a page.
    """

    name = "cache/pages"
    layer = _Layer

    def __init__(self, budget: float | list[float] = 0.25, page: int = 16) -> None:
        super().__init__(budget)
        self.page = positive("page", page)
        self._read = self._there = 0.0

    def note(self, read: float, there: float) -> None:
        """Count entries read, and those there were."""
        self._read, self._there = self._read + read, self._there + there

    def measured_density(self) -> float:
        """Entries read of those that were there, over single-token steps since this was last asked; 1 if there was none."""
        read, there = self._read, self._there
        self._read = self._there = 0.0
        return read / there if there else 1.0
