"""ALISA (Zhao et al. 2024): a sparse window of entries read at each step; old ones may be dropped and computed again when read.

Shape letters: B = batch, H = query heads, G = key heads, R = query heads of a key head, T = new tokens, S = tokens held, C = entries
read, L = queries that are remembered, U = tokens rebuilt, E = width of the model, D = head width.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ...errors import BadInput, Unsupported
from ...method import positive
from .aligned import Aligned
from .entries import attend_entries, dense, first_of, probabilities
from .policy import Policy, PolicyLayer, Rotary


class _Got(Exception):
    """Carries keys and values out of an attention module before it attends."""


class _Recorder:
    """Stands for a cache in a call that is made for its keys and values alone."""

    layers = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> None:
        raise _Got(key_states, value_states)


class _Layer(PolicyLayer):
    policy: Alisa

    def __init__(self, policy: Policy, index: int) -> None:
        super().__init__(policy, index)
        self.all, self.inputs = Aligned(), Aligned()
        self.recent: list[Tensor] = []
        """Probability that each entry got from one of the last queries, its heads summed, [B, G, S then]."""
        self.gone = 0
        """Places below this have no keys and values any more, only the layer's inputs."""

    def answer(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, at_BT: Tensor, *, scale: float, rotary: Rotary, hidden_BTD: Tensor | None
    ) -> Tensor:
        first = not len(self.all)
        if self.policy.rebuild and bool((at_BT < 0).any()):
            raise Unsupported(f"{self}: rows of different length cannot drop the same tokens; use rebuild=0 or rows without padding")
        self.all.place(at_BT - self.gone if self.gone else at_BT, k=k_BGTD, v=v_BGTD)
        if self.policy.rebuild:
            self._note_inputs(at_BT, hidden_BTD, rotary)
        if first and q_BHTD.shape[2] > 1:
            out = dense(q_BHTD, k_BGTD, v_BGTD, at_BT, scale)
            self._remember(q_BHTD, at_BT, k_BGTD, at_BT[:, None].expand(*k_BGTD.shape[:3]), scale)
        else:
            out = torch.cat([self._step(q_BHTD[:, :, t : t + 1], at_BT[:, t : t + 1], scale) for t in range(q_BHTD.shape[2])], 2)
        self._drop()
        return out

    def _note_inputs(self, at_BT: Tensor, hidden_BTD: Tensor | None, rotary: Rotary) -> None:
        if hidden_BTD is None:
            raise Unsupported(f"{self}: nothing to rebuild from, the attention module's input was not seen")
        turn = {} if rotary is None else dict(zip(("cos", "sin"), (x.expand(len(hidden_BTD), -1, -1)[:, None] for x in rotary), strict=True))
        self.inputs.place(at_BT, hidden=hidden_BTD[:, None], **turn)

    def _remember(self, q_BHTD: Tensor, at_BT: Tensor, k_BGMD: Tensor, at_BGM: Tensor, scale: float) -> None:
        """Weights of the last queries of a prompt, by place."""
        last_B = at_BT.amax(1)
        for back in range(min(self.policy.local, int(last_B.max()) + 1) - 1, -1, -1):
            row = torch.arange(len(last_B), device=at_BT.device)
            column = (at_BT == (last_B - back)[:, None]).int().argmax(1)
            place = torch.where(last_B >= back, last_B - back, -1)[:, None]
            q = q_BHTD[row, :, column][:, :, None]
            for _, p in probabilities(q, k_BGMD, at_BGM, place, scale):
                self._keep(p.sum((2, 3)), at_BGM)

    def _keep(self, p_BGM: Tensor, at_BGM: Tensor) -> None:
        by_place = torch.zeros(*p_BGM.shape[:2], max(1, int(at_BGM.max()) + 1), device=p_BGM.device)
        by_place.scatter_add_(2, at_BGM.clamp_min(0).long(), p_BGM.masked_fill(at_BGM < 0, 0.0))
        self.recent = [*self.recent, by_place][-self.policy.local :]

    def _step(self, q_BH1D: Tensor, at_B1: Tensor, scale: float) -> Tensor:
        """One query over half newest entries, half those with the largest sum of the remembered weights."""
        B, G = q_BH1D.shape[0], self.all["k"].shape[1]
        S = int(at_B1.max()) + 1
        total = torch.zeros(B, G, S, device=q_BH1D.device)
        for p in self.recent:
            total[..., : p.shape[-1]] += p[..., :S]
        place = torch.arange(S, device=q_BH1D.device)
        seen_BS = place <= at_B1
        keep_B = torch.tensor([max(1, round(self.budget * (n + 1))) for n in at_B1[:, 0].tolist()], device=q_BH1D.device)
        newest = place > at_B1 - (keep_B // 2).clamp_min(1)[:, None]
        at_BGS = torch.where(seen_BS, place, -1)[:, None].expand(B, G, S)
        index = first_of(total.masked_fill(newest[:, None], torch.inf), at_BGS, keep_B)
        k, v = self._read(index)
        at = index.masked_fill(index < 0, -1)
        out, got = attend_entries(q_BH1D, k, v, at, at_B1, scale, sums=True)
        self._keep(got, at)
        return out

    def _read(self, index_BGC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of these places; those that were dropped are computed again from the layer's inputs."""
        held = (index_BGC - self.gone).clamp_min(0)
        wide = held[..., None].expand(*held.shape, self.all["k"].shape[-1])
        k, v = self.all["k"].gather(2, wide), self.all["v"].gather(2, wide)
        lost = (index_BGC >= 0) & (index_BGC < self.gone)
        if bool(lost.any()):
            needed_U = index_BGC[lost].unique()
            fresh_k, fresh_v = self._rebuild(needed_U)
            at = torch.searchsorted(needed_U, index_BGC.clamp_min(0)).clamp_max(len(needed_U) - 1)
            wide = at[..., None].expand_as(wide)
            k, v = (torch.where(lost[..., None], new.gather(2, wide), old) for new, old in ((fresh_k, k), (fresh_v, v)))
        return k, v

    def _rebuild(self, places_U: Tensor) -> tuple[Tensor, Tensor]:
        """[B, G, U, D] keys and values: the attention module is called up to the point where it hands them to a cache."""
        turn = tuple(self.inputs[n][:, 0, places_U] for n in ("cos", "sin")) if "cos" in self.inputs.held else None
        self.policy.rebuilt += len(places_U)
        module = self.policy.modules[self.index]
        cache = "layer_past" if "layer_past" in signature(module.forward).parameters else "past_key_values"
        inputs = {"hidden_states": self.inputs["hidden"][:, 0, places_U], "attention_mask": None, "position_embeddings": turn}
        try:
            module(**inputs, **{cache: _Recorder()})
        except _Got as got:
            k, v = got.args
            return k, v
        raise Unsupported(f"{self}: this attention module does not hand its keys to a cache, so nothing can be rebuilt")

    def _drop(self) -> None:
        """Forget keys and values of the oldest tokens: `rebuild` of those before the newest half of the budget."""
        count = int(self.all.count_B.max()) + self.gone if self.all.count_B is not None else 0     # type: ignore[union-attr]
        upto = int(self.policy.rebuild * (count - max(1, round(self.budget * count) // 2)))
        if upto > self.gone:
            fresh = Aligned()
            kept = {n: self.all[n][:, :, upto - self.gone :] for n in "kv"}
            places = torch.arange(count - upto, device=kept["k"].device).expand(len(kept["k"]), -1)
            fresh.place(places, **kept)
            self.all, self.gone = fresh, upto

    def kept(self) -> Tensor:
        assert self.all.count_B is not None
        return (self.all.count_B[:, None] + self.gone).expand(-1, self.all["v"].shape[1])

    def tensors(self) -> dict[str, Tensor]:
        names = self.all.tensors() | {f"input {n}": x for n, x in self.inputs.tensors().items()}
        return names | {f"weights {i}": p for i, p in enumerate(self.recent)}

    def rows(self, take: Callable[[Tensor], Tensor]) -> None:
        self.all.rows(take)
        self.inputs.rows(take)
        self.recent = [take(p) for p in self.recent]


class Alisa(Policy):
    """Sparse window attention (sec. 4.1, alg. 1): half of what is read are the newest entries, half those with most recent weight.

    The weight of an entry is the probability that it got from the last `local` queries, where an entry that was not read got
    none; all query heads that a key head serves are summed. A prompt attends densely. Every token stays within reach; with
    `rebuild` the keys and values of that fraction of the older tokens are deleted, and computed again from the layer's inputs
    whenever they are read (the third phase of sec. 4.2). Inputs take E numbers a token where keys and values take 2 G D, so
    this saves memory only without grouped heads. The paper's scheduler, which moves tokens between devices, and its int8 storage
    are not here.

    Args:
        budget: fraction of the entries that a step reads.
        local: queries whose weights are summed.
        rebuild: fraction of the tokens before the newest half of the budget that hold no keys and values.
    """

    name = "cache/alisa"
    layer = _Layer

    def __init__(self, budget: float | list[float] = 0.25, local: int = 16, rebuild: float = 0.0) -> None:
        super().__init__(budget)
        self.local = positive("local", local)
        if isinstance(rebuild, bool) or not 0 <= rebuild <= 1:
            raise BadInput(f"rebuild={rebuild!r} must be in [0, 1]: the fraction of older tokens without keys and values")
        self.rebuild, self.rebuilt = float(rebuild), 0
        """`rebuilt` counts tokens computed again, a layer."""
