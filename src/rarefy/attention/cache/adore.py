"""ADORE (Zhang et al. 2024): a small recurrent controller says which tokens the next step needs; the others wait in a released store.

Shape letters: B = batch, H = query heads, G = key heads, R = query heads of a key head, T = new tokens, S = tokens so far,
K = entries kept, E = width of the model, D = head width, C = states of the controller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ...errors import BadInput, Unsupported
from ...method import positive
from ...site import replaced
from .aligned import Aligned
from .controller import Controller, Watch, fit_controller
from .entries import attend_entries, dense, first_of
from .policy import Policy, PolicyLayer, Rotary


class _Layer(PolicyLayer):
    policy: Adore

    def __init__(self, policy: Policy, index: int) -> None:
        super().__init__(policy, index)
        self.store, self.states = Aligned(), Aligned()
        self.resident: dict[str, Tensor] = {}
        """k, v [B, G, K, D] and at [B, G, K], -1 where a row keeps fewer."""

    def answer(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, at_BT: Tensor, *, scale: float, rotary: Rotary, hidden_BTD: Tensor | None
    ) -> Tensor:
        if self.index >= len(self.policy.controllers):
            raise BadInput(f"{self} has no controller yet; call cache.fit(model, input_ids) first")
        if hidden_BTD is None:
            raise Unsupported(f"{self}: its controller reads the attention module's input, which was not seen")
        first = not len(self.store)
        self._read(hidden_BTD, at_BT)
        self.store.place(at_BT, k=k_BGTD, v=v_BGTD)
        if first and q_BHTD.shape[2] > 1:
            self._choose(at_BT.amax(1))
            return dense(q_BHTD, k_BGTD, v_BGTD, at_BT, scale)
        out = torch.empty_like(q_BHTD)
        before_B = at_BT.masked_fill(at_BT < 0, torch.iinfo(at_BT.dtype).max).amin(1) - 1
        for t in range(q_BHTD.shape[2]):
            before_B = torch.where(at_BT[:, t] < 0, before_B, at_BT[:, t])
            self._choose(before_B.minimum(self.store.count_B - 1))                        # type: ignore[operator]
            held = self.resident
            out[:, :, t : t + 1] = attend_entries(q_BHTD[:, :, t : t + 1], held["k"], held["v"], held["at"], at_BT[:, t : t + 1], scale)[0]
        return out

    def _read(self, hidden_BTE: Tensor, at_BT: Tensor) -> None:
        """Run the recurrence on over the real tokens of each row; padding leaves no trace."""
        gru = self.policy.controllers[self.index].gru
        begin_B = torch.zeros_like(at_BT[:, 0]) if self.states.count_B is None else self.states.count_B
        last_BC = hidden_BTE.new_zeros(len(at_BT), gru.hidden_size, dtype=torch.float32)
        if len(self.states):
            row = torch.arange(len(at_BT), device=at_BT.device)
            last_BC = self.states["z"][row, 0, begin_B.clamp_min(1) - 1] * (begin_B > 0)[:, None]
        b, t = (at_BT >= 0).nonzero(as_tuple=True)
        packed = torch.zeros_like(hidden_BTE, dtype=torch.float32)
        packed[b, at_BT[b, t] - begin_B[b]] = hidden_BTE[b, t].float()
        z_BTC = gru(packed, last_BC[None].contiguous())[0]
        self.states.place(at_BT, z=z_BTC.gather(1, (at_BT - begin_B[:, None]).clamp_min(0)[..., None].expand_as(z_BTC))[:, None])

    def _choose(self, now_B: Tensor) -> None:
        """Make the entries of most importance to the step at `now_B` resident, itself among them; the rest is released."""
        z = self.states["z"][:, 0]
        place = torch.arange(len(self.store), device=z.device)
        now_BTC = z.gather(1, now_B.clamp_min(0)[:, None, None].expand(-1, 1, z.shape[-1]))
        score = self.policy.controllers[self.index](now_BTC, z, now_B[:, None])[:, :, 0]
        at_BGS = torch.where(place <= now_B[:, None], place, -1)[:, None].expand_as(score)
        count = [max(1, round(self.budget * (n + 1))) for n in now_B.tolist()]
        keep_B = torch.tensor([min(n, self.policy.most or n) for n in count], device=z.device)
        index = first_of(score.masked_fill((place == now_B[:, None])[:, None], torch.inf), at_BGS, keep_B)
        if self.resident:
            known = (index[..., None] == self.resident["at"][:, :, None]).any(-1)
            self.policy.rebuilt += int(((index >= 0) & ~known & (index < now_B[:, None, None])).sum())
        wide = index.clamp_min(0)[..., None].expand(*index.shape, self.store["k"].shape[-1])
        self.resident = {"at": index} | {n: self.store[n].gather(2, wide) for n in "kv"}

    def kept(self) -> Tensor:
        return (self.resident["at"] >= 0).sum(-1)

    def tensors(self) -> dict[str, Tensor]:
        held = {f"resident {n}": x for n, x in self.resident.items()} | {f"state {n}": x for n, x in self.states.tensors().items()}
        return held | {f"offloaded {n}": x for n, x in self.store.tensors().items()}

    def rows(self, take: Callable[[Tensor], Tensor]) -> None:
        self.store.rows(take)
        self.states.rows(take)
        self.resident = {n: take(x) for n, x in self.resident.items()}


class Adore(Policy):
    """A step attends to the max(1, round(budget * S)) tokens that its controller finds important, the current one among them.

    The controller of a layer reads the layer's inputs (a GRU of `states` numbers), each key head keeps tokens of its own, and
    targets are the tokens in full attention's top K, by cross entropy. A prompt attends densely. Released tokens are not gone:
    keys and values of all tokens wait in a store that counts as offloaded, and are copied back when their importance returns
    (`rebuilt` counts them), exact as they were. Not the paper's: it computes them again together with the current token, finetunes
    the model along, and keeps a fixed number (here `most`, as a cap on the fraction). The form of the score is ours.

    Args:
        budget: fraction of the tokens so far that is kept.
        most: entries that are kept at most; None for no cap.
        states: width of the controller.
        steps: of Adam in `fit`, each over one text and 64 of its queries.
        seed: of the controller's start and the choice of texts and queries.
    """

    name = "cache/adore"
    layer = _Layer

    def __init__(
        self, budget: float | list[float] = 0.25, most: int | None = None, states: int = 16, steps: int = 100, seed: int = 0
    ) -> None:
        super().__init__(budget)
        self.most = None if most is None else positive("most", most)
        self.states, self.steps, self.seed = positive("states", states), positive("steps", steps), seed
        self.controllers: list[Controller] = []
        self.rebuilt = 0
        """Entries that were released and came back, of all layers, rows and key heads."""

    def fit(self, model: nn.Module, input_ids: Tensor | Iterable[Tensor]) -> Adore:
        """Fit a controller a layer to which tokens are in the dense model's top K on calibration text.

        Args:
            input_ids: [B, T], or several such, without padding.
        """
        texts = []
        with torch.no_grad():
            for ids in [input_ids] if isinstance(input_ids, Tensor) else input_ids:
                watch = Watch()
                with replaced(model, {"layers.*.attn": watch}):
                    model(input_ids=ids, use_cache=False)
                texts.append(watch.seen)
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(self.seed)
            self.controllers = [fit_controller([text[n] for text in texts], self.states, self.budget_of(n), self.steps) for n in sorted(texts[0])]
        return self
