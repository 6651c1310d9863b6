"""Policies that drop entries for good; each layer, batch row and key head keeps entries of its own, with their true positions.

Shape letters: B = batch, H = query heads, G = key heads, T = new tokens, M = entries held, D = head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels.cache_steps import evicting_step
from ...method import positive
from ..lottery import drawn
from .entries import Entries, attend_entries, dense, dense_sums, first_of
from .policy import Policy, PolicyLayer, Rotary


class EvictingLayer(PolicyLayer):
    """New queries attend to what is held and to each other; then all but the best max(1, round(budget * S)) entries go.

    S counts the real tokens of a row so far. Subclasses write `rank`; with `accumulates` they find in `entries["sum"]` the
    probability that each entry has got so far from the queries of its heads.
    """

    accumulates = False
    only_prompts = False
    """Evict after a chunk of tokens, never for a single one."""

    def __init__(self, policy: Policy, index: int) -> None:
        super().__init__(policy, index)
        self.entries = Entries()

    def rank(self, q_BHTD: Tensor, at_BT: Tensor, keep_B: Tensor, scale: float) -> Tensor:
        """[B, G, M] worth of each entry; the highest `keep_B` stay."""
        raise NotImplementedError

    def above(self, keep: int) -> tuple[int, int] | None:
        """(first, recent) where `rank` is the sum, or the place without sums, with places below `first` and above `recent` above all."""
        return None

    def step(self, q_BH1D: Tensor, k_BG1D: Tensor, v_BG1D: Tensor, *, scale: float) -> Tensor | None:
        held, keep = len(self.entries), max(1, round(self.budget * self.seen))
        if not held:
            return None
        over, limits = 0 if self.only_prompts else held + 1 - keep, self.above(keep)
        first, recent = limits or (0, 0)
        drop = over == 1 and limits is not None
        room = self.entries.room(1)
        out, _ = evicting_step(
            q_BH1D, k_BG1D, v_BG1D, room["k"], room["v"], room["at"], room.get("sum"), held=held, place=self.seen - 1, first=first,
            recent=recent, drop=drop, scale=scale)
        self.entries.count(0 if drop else 1)
        if over > 0 and not drop:
            self._evict(q_BH1D, torch.full((len(q_BH1D), 1), self.seen - 1, device=q_BH1D.device), scale)
        return out

    def answer(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, at_BT: Tensor, *, scale: float, rotary: Rotary, hidden_BTD: Tensor | None
    ) -> Tensor:
        held = len(self.entries)
        at_BGT = at_BT[:, None].expand(*k_BGTD.shape[:3])
        new = {"k": k_BGTD, "v": v_BGTD, "at": at_BGT.int()}
        if self.accumulates:
            new["sum"] = torch.zeros(at_BGT.shape, device=q_BHTD.device)
        self.entries.append(**new)
        e = self.entries
        if held or self.accumulates:
            if held or not self.uniform:
                out, got_BGM = attend_entries(q_BHTD, e["k"], e["v"], e["at"], at_BT, scale, sums=self.accumulates)
            else:
                out, got_BGM = dense_sums(q_BHTD, k_BGTD, v_BGTD, scale)
            if self.accumulates:
                e.put("sum", e["sum"] + got_BGM)
        else:
            out = dense(q_BHTD, k_BGTD, v_BGTD, at_BT, scale)
        self._evict(q_BHTD, at_BT, scale)
        return out

    def _evict(self, q_BHTD: Tensor, at_BT: Tensor, scale: float) -> None:
        if self.only_prompts and q_BHTD.shape[2] == 1:
            return
        at_BGM = self.entries["at"]
        real_B = at_BGM.amax((1, 2)) + 1                       # the newest real token is always held
        keep_B = torch.tensor([max(1, round(self.budget * n)) for n in real_B.tolist()], device=at_BGM.device)
        count_BG = (at_BGM >= 0).sum(-1)
        if bool((count_BG <= keep_B[:, None]).all()) and bool((count_BG == at_BGM.shape[-1]).all()):
            return
        score = self.rank(q_BHTD, at_BT, keep_B, scale).float()
        newest = at_BGM == (real_B - 1)[:, None, None]
        score = score.masked_fill(newest, torch.inf)
        if bool((count_BG == at_BGM.shape[-1]).all()) and bool((keep_B == at_BGM.shape[-1] - 1).all()):
            least = score == score.amin(-1, keepdim=True)      # of equals the earliest goes, as in first_of
            self.entries.drop_one(at_BGM.masked_fill(~least, torch.iinfo(at_BGM.dtype).max).argmin(-1))
        else:
            self.entries.take(first_of(score, at_BGM, keep_B))

    def positions(self) -> Tensor:
        """[B, G, M] place of each entry among the real tokens of its row; -1 where a slot is empty."""
        return self.entries["at"]

    def kept(self) -> Tensor:
        return (self.positions() >= 0).sum(-1)

    def tensors(self) -> dict[str, Tensor]:
        return self.entries.tensors()

    def rows(self, take: Callable[[Tensor], Tensor]) -> None:
        self.entries.rows(take)


class _WindowLayer(EvictingLayer):
    def above(self, keep: int) -> tuple[int, int]:
        return min(self.policy.sinks + 1, keep) - 1, self.seen       # type: ignore[attr-defined]

    def rank(self, q_BHTD: Tensor, at_BT: Tensor, keep_B: Tensor, scale: float) -> Tensor:
        """Place, with the first few above all."""
        at = self.entries["at"]
        first_B = keep_B.clamp_max(self.policy.sinks + 1) - 1        # type: ignore[attr-defined]
        return at.float().masked_fill(at < first_B[:, None, None], torch.inf)


class WindowSinks(Policy):
    """StreamingLLM (Xiao et al. 2023, arXiv 2309.17453): the first few entries and a window of the newest.

    The paper gives entries positions within the cache; here they keep their own, so that a budget of 1 is the dense model.

    Args:
        sinks: first entries that stay (4 in the paper); the newest comes before them.
    """

    name = "cache/window"
    layer = _WindowLayer

    def __init__(self, budget: float | list[float] = 0.25, sinks: int = 4) -> None:
        super().__init__(budget)
        self.sinks = positive("sinks", sinks)


class _RandomLayer(EvictingLayer):
    def rank(self, q_BHTD: Tensor, at_BT: Tensor, keep_B: Tensor, scale: float) -> Tensor:
        """A hash of place, head, layer and seed: the same in a batch and alone."""
        at = self.entries["at"].long()
        head_G = torch.arange(at.shape[1], device=at.device)[:, None]
        return drawn(at, self.index, head_G, self.policy.seed)  # type: ignore[attr-defined]


class RandomEviction(Policy):
    """Baseline: entries kept at random; the newest stays."""

    name = "cache/random"
    layer = _RandomLayer

    def __init__(self, budget: float | list[float] = 0.25, seed: int = 0) -> None:
        super().__init__(budget)
        self.seed = seed
