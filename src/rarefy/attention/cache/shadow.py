"""ShadowKV (Sun et al. 2024): a prompt's keys as low-rank factors before rotation, its values elsewhere, landmarks to choose by.

Shape letters: B = batch, H = query heads, G = key heads, T = new tokens, S = tokens of the prompt, N = chunks of C tokens, D = head
width, r = rank, K = chunks chosen, O = outlier chunks, R = rotated width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...kernels.cache_steps import chunks_step
from ...method import not_negative, positive
from .aligned import Aligned
from .entries import Entries, attend_entries, dense, first_of
from .policy import Policy, PolicyLayer, Rotary


def rotate(x_BGSD: Tensor, cos_BSR: Tensor, sin_BSR: Tensor, back: bool = False) -> Tensor:
    """Rotary positions as Llama and NeoX apply them: channel i turns with i + R / 2; `back` undoes it. Channels from R on stay."""
    R = cos_BSR.shape[-1]
    cos, sin = cos_BSR[:, None], sin_BSR[:, None]
    if back:                                                   # some models scale cos and sin: undo that too
        size = (cos.square() + sin.square()).clamp_min(1e-12)    # an empty slot holds zeros
        cos, sin = cos / size, -sin / size
    turning, still = x_BGSD[..., :R], x_BGSD[..., R:]
    half = torch.cat([-turning[..., R // 2 :], turning[..., : R // 2]], -1)
    return torch.cat([turning * cos + half * sin, still], -1)


class _Layer(PolicyLayer):
    policy: ShadowKV

    def __init__(self, policy: Policy, index: int) -> None:
        super().__init__(policy, index)
        self.exact, self.far = Entries(), Aligned()
        self.shares = False
        """Whether cos and sin are the first layer's."""
        self.count = 0
        """Chunks of the first row that are no outliers, for each of its heads."""
        self.held: dict[str, Tensor] = {}
        """basis [B, r, G * D], landmark [B, G, N, D], common [B, N] (False: not all chunk tokens there), and the rotation if any."""

    def answer(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, at_BT: Tensor, *, scale: float, rotary: Rotary, hidden_BTD: Tensor | None
    ) -> Tensor:
        first = not len(self.exact)
        self.exact.append(k=k_BGTD, v=v_BGTD, at=at_BT[:, None].expand(*k_BGTD.shape[:3]).int())
        if first:
            self._shadow(k_BGTD, v_BGTD, at_BT, rotary)
            return dense(q_BHTD, k_BGTD, v_BGTD, at_BT, scale)
        e = self.exact
        k, v, at = e["k"], e["v"], e["at"]
        if self.held:
            far_k, far_v, far_at = self._fetch(self._choose(q_BHTD, scale))
            k, v, at = torch.cat([far_k, k], 2), torch.cat([far_v, v], 2), torch.cat([far_at, at], 2)
        return attend_entries(q_BHTD, k, v, at, at_BT, scale)[0]

    def step(self, q_BH1D: Tensor, k_BG1D: Tensor, v_BG1D: Tensor, *, scale: float) -> Tensor | None:
        if not self.held or not self.count:
            return None
        held, room, far = len(self.exact), self.exact.room(1), self.far.stores()
        keep, turn = min(max(1, round(self.budget * self.count)), self.count), (self.held["cos"], self.held["sin"]) if "cos" in self.held else None
        got = chunks_step(
            q_BH1D, k_BG1D, v_BG1D, room["k"], room["v"], room["at"], self.held["landmark"], self.held["far"], far["factor"],
            self.held["basis"], far["offloaded v"], turn, held=held, place=self.seen - 1, keep=keep, chunk=self.policy.chunk, scale=scale)
        if got is None:
            return None
        self.exact.count(1)
        self.policy.note(k_BG1D.numel() * keep * self.policy.chunk * k_BG1D.element_size())
        return got[0]

    def _shadow(self, k_BGTD: Tensor, v_BGTD: Tensor, at_BT: Tensor, rotary: Rotary) -> None:
        """Split a prompt: whole chunks but for the newest and the outliers become factors and landmarks, the rest stays exact."""
        C, O = self.policy.chunk, self.policy.outliers
        line = Aligned()
        turn = {} if rotary is None else {n: x.expand(k_BGTD.shape[0], -1, -1)[:, None] for n, x in zip(("cos", "sin"), rotary, strict=True)}
        line.place(at_BT, k=k_BGTD, v=v_BGTD, **turn)
        assert line.count_B is not None
        far_B = line.count_B // C - self.policy.local
        N = int(far_B.max())
        if N < 1:
            return
        k, v = (line[n][:, :, : N * C] for n in "kv")
        whole_BN = torch.arange(N, device=k.device) < far_B[:, None]
        chunks = k.unflatten(2, (N, C))
        landmark = chunks.mean(3)
        alike = torch.cosine_similarity(chunks, landmark[:, :, :, None], dim=-1).amin(-1).masked_fill(~whole_BN[:, None], torch.inf)
        odd = torch.zeros_like(alike, dtype=torch.bool).scatter_(-1, alike.topk(min(O, N), largest=False).indices, True)
        far_BGN = whole_BN[:, None] & ~odd
        before = k
        if turn:
            self.held |= self._shared({n: line[n][:, 0, : N * C].clone(memory_format=torch.contiguous_format) for n in turn})
            before = rotate(k, self.held["cos"], self.held["sin"], back=True)
        flat = (before * whole_BN.repeat_interleave(C, 1)[:, None, :, None]).transpose(1, 2).flatten(2)      # [B, S, G * D]
        rank = self.policy.rank or max(1, round(self.budget * flat.shape[2]))
        u, s, basis = torch.linalg.svd(flat.float(), full_matrices=False)
        u, basis = (u * s[:, None])[..., :rank].to(k.dtype), basis[:, :rank].to(k.dtype)
        place = torch.arange(N * C, device=k.device).expand(len(k), -1)
        self.far.place(place, **{"factor": u[:, None], "offloaded v": v})
        self.held |= {"basis": basis.clone(memory_format=torch.contiguous_format), "landmark": landmark, "far": far_BGN}
        self.count = int(far_BGN[0, 0].sum())
        in_far = far_BGN.repeat_interleave(C, 2)                                                       # [B, G, N * C]
        at = self.exact["at"].long()
        there = (at >= 0) & (at < N * C)
        gone = in_far.gather(2, at.clamp(0, N * C - 1)) & there
        stay_B = ((at >= 0) & ~gone).sum(-1).amax(1)
        # Heads differ in their outliers but not in how many they have, so every head keeps the same count.
        self.exact.take(first_of(torch.zeros_like(at).float(), at.masked_fill(gone, -1), stay_B.clamp_min(1)))

    def _shared(self, turn: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first layer's cos and sin where they are the same."""
        first: Any = self.policy.layers[0] if self.policy.layers else self
        theirs = {n: x for n, x in first.held.items() if n in turn}
        self.shares = first is not self and all(n in theirs and torch.equal(x, theirs[n]) for n, x in turn.items())
        return theirs if self.shares else turn

    def _choose(self, q_BHTD: Tensor, scale: float) -> Tensor:
        """[B, G, K] chunks with the most probability at their landmarks, the best query of the head's group counting; -1 = none."""
        landmark, far_BGN = self.held["landmark"], self.held["far"]
        q = q_BHTD.unflatten(1, (landmark.shape[1], -1)).flatten(2, 3)
        logit = (q @ landmark.mT * scale).masked_fill(~far_BGN[:, :, None], -torch.inf)
        score = logit.softmax(-1).nan_to_num(0.0).amax(2).masked_fill(~far_BGN, -1.0)
        keep_B = torch.tensor([max(1, round(self.budget * n)) for n in far_BGN[:, 0].sum(-1).tolist()], device=q.device)
        best = score.topk(min(int(keep_B.max()), score.shape[-1]), dim=-1)
        good = (torch.arange(best.values.shape[-1], device=q.device) < keep_B[:, None, None]) & (best.values >= 0)
        return best.indices.masked_fill(~good, -1)

    def _fetch(self, chosen_BGK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys (rebuilt and rotated), values (fetched) and places of the chosen chunks, [B, G, K * C, ...]."""
        C = self.policy.chunk
        v_BGSD, factor_B1Sr = self.far["offloaded v"], self.far["factor"]
        B, G, _, D = v_BGSD.shape
        at = (chosen_BGK[..., None] * C + torch.arange(C, device=chosen_BGK.device)).flatten(2)
        at = at.masked_fill((chosen_BGK < 0).repeat_interleave(C, 2), -1)
        slot = at.clamp_min(0)
        row = torch.arange(B, device=slot.device)[:, None, None]
        basis_BGrD = self.held["basis"].unflatten(2, (G, D)).transpose(1, 2)
        k = factor_B1Sr[:, 0][row, slot] @ basis_BGrD
        if "cos" in self.held:
            cos, sin = (self.held[n][row, slot].flatten(0, 1) for n in ("cos", "sin"))
            k = rotate(k.flatten(0, 1)[:, None], cos, sin)[:, 0].unflatten(0, (B, G))
        v = v_BGSD.gather(2, slot[..., None].expand(-1, -1, -1, D))
        self.policy.note(float((at >= 0).sum()) * v.element_size() * D)
        return k, v, at.int()

    def kept(self) -> Tensor:
        """Every token."""
        newest = self.exact["at"].amax(-1)
        return (newest.maximum(self.far.at().amax(-1)[:, None]) if self.held else newest).long() + 1

    def tensors(self) -> dict[str, Tensor]:
        return self.exact.tensors() | self.far.tensors() | self.held

    def rows(self, take: Callable[[Tensor], Tensor]) -> None:
        self.exact.rows(take)
        self.far.rows(take)
        first: Any = self.policy.layers[0]
        done = {n: first.held[n] for n in ("cos", "sin")} if self.shares else {}         # layers change their rows first to last
        self.held = {name: take(x) for name, x in self.held.items() if name not in done} | done


class ShadowKV(Policy):
    """A prompt's keys stay as low-rank factors, its values may lie in slow memory; steps rebuild and fetch the chunks that count.

    After the first prompt: the keys of all heads, rotation undone, are replaced by a singular value decomposition of rank r
    (sec. 4.1); chunks of rotated keys by their means, the landmarks. Chunks whose mean fits them worst stay exact, as do the
    prompt's last `local` chunks, its unfinished one and all later tokens (the authors' code factors those of the prompt too, and does
    not read that). A step takes the softmax over landmarks, rebuilds the keys of the best
    max(1, round(budget * chunks)) for each key head and fetches their values. Names of tensors that begin with "offloaded"
    are what a GPU would hold in host memory; here they are counted apart (`bytes(offloaded=True)`), and `fetched_bytes()` says
    what crossed over. cos and sin of the prompt are held and counted, once for all layers that turn alike, which a model with a table would not need.

    Args:
        chunk: tokens a landmark stands for (8 in the paper).
        rank: of the keys; 0 follows the budget, round(budget * G * D) (the paper: 160 of 1024).
        outliers: chunks that stay exact, a key head (48 in the paper, at 128k tokens).
        local: newest whole chunks of the prompt that stay exact (4 in the authors' code).
    """

    name = "cache/shadow"
    unit = "chunk of cached keys"
    layer = _Layer

    def __init__(self, budget: float | list[float] = 0.25, chunk: int = 8, rank: int = 0, outliers: int = 2, local: int = 4) -> None:
        super().__init__(budget)
        self.chunk = positive("chunk", chunk)
        self.rank, self.outliers = int(not_negative("rank", rank)), int(not_negative("outliers", outliers))
        self.local = int(not_negative("local", local))
        self._fetched = 0.0

    def note(self, fetched: float) -> None:
        """Count bytes of values fetched."""
        self._fetched += fetched

    def fetched_bytes(self) -> int:
        """Bytes of values that steps fetched since this was last asked."""
        fetched, self._fetched = self._fetched, 0.0
        return round(fetched)
