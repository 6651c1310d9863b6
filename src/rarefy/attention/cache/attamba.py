"""Attamba (Akhauri et al. 2024): a chunk of tokens is kept as the state that a linear recurrence is in at its end.

Shape letters: B = batch, H = query heads, G = key heads, T = new tokens, M = entries of the window, L = tokens that leave it,
C = chunks, P = tokens of a chunk, D = head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ...method import not_negative, positive
from ...site import replaced
from .aligned import Aligned
from .entries import Entries, attend_entries, dense, first_of
from .policy import Policy, PolicyLayer, Rotary


def read(x_BGCPD: Tensor, rate_GD: Tensor) -> Tensor:
    """[B, G, C, D] state at each chunk's end of h_i = a h_(i-1) + x_i, a = exp(-rate), over the same recurrence of ones.

    A chunk of one token is that token, and a rate of 0 the mean.
    """
    back_P = torch.arange(x_BGCPD.shape[3] - 1, -1, -1, device=x_BGCPD.device)
    weight_GPD = (-rate_GD[:, None] * back_P[:, None]).softmax(1).to(x_BGCPD.dtype)
    return (x_BGCPD * weight_GPD[:, None]).sum(3)


class _Layer(PolicyLayer):
    policy: Attamba

    def __init__(self, policy: Policy, index: int) -> None:
        super().__init__(policy, index)
        self.window, self.chunks = Entries(), Aligned()

    def answer(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, at_BT: Tensor, *, scale: float, rotary: Rotary, hidden_BTD: Tensor | None
    ) -> Tensor:
        first, w = not len(self.window), self.window
        w.append(k=k_BGTD, v=v_BGTD, at=at_BT[:, None].expand(*k_BGTD.shape[:3]).int())
        if first:
            out = dense(q_BHTD, k_BGTD, v_BGTD, at_BT, scale)
        elif not len(self.chunks):
            out = attend_entries(q_BHTD, w["k"], w["v"], w["at"], at_BT, scale)[0]
        else:
            number = self.chunks.at()
            end = torch.where(number < 0, -1, self.policy.sinks + (number + 1) * self.policy.chunk_of(self.index) - 1)
            at = torch.cat([end[:, None].expand(-1, k_BGTD.shape[1], -1), w["at"]], 2)
            k, v = (torch.cat([self.chunks[n], w[n]], 2) for n in "kv")
            out = attend_entries(q_BHTD, k, v, at, at_BT, scale)[0]
        self._close()
        return out

    def _close(self) -> None:
        """Read every chunk that now stands wholly before the newest tokens, and forget its tokens."""
        policy, w, P = self.policy, self.window, self.policy.chunk_of(self.index)
        at_BM = w["at"][:, 0]
        whole_B = (at_BM.amax(1) + 1 - policy.recent - policy.sinks).clamp_min(0) // P
        done_B = torch.zeros_like(whole_B) if self.chunks.count_B is None else self.chunks.count_B
        most = int((whole_B - done_B).max())
        if most > 0:
            number = done_B[:, None] + torch.arange(most, device=at_BM.device)
            place_BL = (policy.sinks + number[..., None] * P + torch.arange(P, device=at_BM.device)).flatten(1)
            slot_BL = (at_BM[:, None] == place_BL[..., None]).int().argmax(2)
            wide = slot_BL[:, None, :, None].expand(-1, w["k"].shape[1], -1, w["k"].shape[-1])
            k, v = (read(w[n].gather(2, wide).unflatten(2, (most, P)), rate) for n, rate in zip("kv", policy.rates(self.index, w["k"]), strict=True))
            self.chunks.place(torch.where(number < whole_B[:, None], number, -1).long(), k=k, v=v)
        gone_BM = (at_BM < 0) | (at_BM >= policy.sinks) & (at_BM < (policy.sinks + whole_B * P)[:, None])
        if bool(gone_BM.any()):
            at = w["at"].masked_fill(gone_BM[:, None], -1)
            w.take(first_of(torch.zeros(at.shape, device=at.device), at, (~gone_BM).sum(1).clamp_min(1)))

    def kept(self) -> Tensor:
        """Chunks and whole tokens."""
        whole = (self.window["at"] >= 0).sum(-1)
        return whole if self.chunks.count_B is None else whole + self.chunks.count_B[:, None]

    def tensors(self) -> dict[str, Tensor]:
        return {f"window {n}": x for n, x in self.window.tensors().items()} | {f"chunk {n}": x for n, x in self.chunks.tensors().items()}

    def rows(self, take: Callable[[Tensor], Tensor]) -> None:
        self.window.rows(take)
        self.chunks.rows(take)


class _Watch(nn.Module):
    """Attends densely and notes what it was given and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[Tensor, Tensor, Tensor, Tensor, float]] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int, **rest: Any) -> Tensor:
        out = dense(q, k, v, torch.arange(q.shape[2], device=q.device).expand(len(q), -1), scale)
        self.seen[layer] = (q, k, v, out, scale)
        return out


def fit_rates(texts: list[tuple[Tensor, Tensor, Tensor, Tensor, float]], chunk: int, recent: int, sinks: int, steps: int, seed: int) -> Tensor:
    """[2, G, D] rates of keys and of values from a layer's (queries, keys, values, dense outputs, scale), by Adam from means on."""
    random, device = torch.Generator().manual_seed(seed), texts[0][1].device
    rate = torch.zeros(2, *texts[0][1].shape[1::2], device=device, requires_grad=True)
    optimiser = torch.optim.Adam([rate], lr=0.05)
    for _ in range(steps):
        q, k, v, out, scale = texts[int(torch.randint(len(texts), (), generator=random))]
        b, T = int(torch.randint(len(q), (), generator=random)), q.shape[2]
        last = sinks + max(0, T - sinks) // chunk * chunk
        place = torch.arange(T, device=device)
        end, at = place[sinks:last][chunk - 1 :: chunk], torch.randperm(T, generator=random)[:64].to(device)
        closed = end + recent <= at[:, None]
        inside = (place >= sinks) & (place < sinks + closed.sum(1, keepdim=True) * chunk)
        row = zip((k[b : b + 1], v[b : b + 1]), rate, strict=True)
        both = [torch.cat([read(x[:, :, sinks:last].unflatten(2, (-1, chunk)), r), x], 2) for x, r in row]
        where, seen = torch.cat([end, place]).expand(1, k.shape[1], -1), torch.cat([closed, ~inside], 1)[None]
        got = attend_entries(q[b : b + 1, :, at], both[0], both[1], where, at[None], scale, allowed_BTM=seen)[0]
        optimiser.zero_grad()
        mse_loss(got, out[b : b + 1, :, at]).backward()
        optimiser.step()
    return rate.detach()


class Attamba(Policy):
    """Chunks of round(1 / budget) tokens become one key and one value; the first `sinks` and newest `recent` tokens stay whole.

    Not the paper's: it puts selective state-space models in the place of the key and value projections, carries their state
    over chunks, and trains the model with them by its own loss. Here a finished model's keys (after rotation) and values are
    read by a diagonal recurrence with one fitted decay a channel, started afresh in each chunk; a prompt attends densely
    before it is chunked; chunks are of one length. Without `fit` every decay is 1: means of chunks.

    Args:
        budget: one over the tokens of a chunk, rounded to whole tokens.
        recent, sinks: whole tokens at the end (at least; a chunk is read when all of it is older) and at the start.
        steps: of Adam in `fit`, each over one text and 64 of its queries.
        seed: of the choice of texts and queries.
    """

    name = "cache/attamba"
    unit = "chunk of cached keys"
    layer = _Layer

    def __init__(self, budget: float | list[float] = 0.25, recent: int = 32, sinks: int = 4, steps: int = 60, seed: int = 0) -> None:
        super().__init__(budget)
        self.recent, self.sinks = positive("recent", recent), int(not_negative("sinks", sinks))
        self.steps, self.seed = positive("steps", steps), seed
        self.rates_of: list[Tensor] = []
        """Of each layer, [2, G, D]: minus the logarithm of each channel's decay, of keys and of values."""

    def chunk_of(self, layer: int) -> int:
        """Tokens of a layer's chunks."""
        return round(1 / self.budget_of(layer))

    def rates(self, layer: int, k_BGMD: Tensor) -> Tensor:
        """[2, G, D] rates of a layer; zeros before `fit`."""
        return self.rates_of[layer] if layer < len(self.rates_of) else torch.zeros(2, *k_BGMD.shape[1::2], device=k_BGMD.device)

    def fit(self, model: nn.Module, input_ids: Tensor | Iterable[Tensor]) -> Attamba:
        """Fit the decays so that each layer's output over chunks is, in squares, near the dense one on calibration text without padding."""
        texts = []
        with torch.no_grad():
            for ids in [input_ids] if isinstance(input_ids, Tensor) else input_ids:
                watch = _Watch()
                with replaced(model, {"layers.*.attn": watch}):
                    model(input_ids=ids, use_cache=False)
                texts.append(watch.seen)
        with torch.enable_grad():
            self.rates_of = [
                fit_rates([text[n] for text in texts], self.chunk_of(n), self.recent, self.sinks, self.steps, self.seed) for n in sorted(texts[0])
            ]
        return self
