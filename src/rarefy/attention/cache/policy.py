"""What every policy of the key-value cache shares: it sees the queries, answers them itself and counts what it holds.

A policy's layer hands the model only the new keys and answers the attention call from what it holds, so nothing of a
model is changed for good: `with cache.on(model)` routes the attention of every layer to the cache that the call carries.

Shape letters: B = batch, H = query heads, G = key heads, T = new tokens, S = tokens so far, M = entries held, D = head width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from ...attach import layer_of_keys
from ...errors import BadInput, Unsupported
from ...method import fraction
from ...selection import check_finite
from ...site import replaced, sites

Rotary = tuple[Tensor, Tensor] | None
"""(cos, sin) [B or 1, T, R] of the new tokens."""


class PolicyLayer(CacheLayerMixin):
    """One layer's entries. Subclasses write `answer`, `tensors`, `kept` and `rows`."""

    is_sliding = False
    attends = True
    supports_early_init = False

    def __init__(self, policy: Policy, index: int) -> None:
        super().__init__()
        self.policy, self.index, self.budget = policy, index, policy.budget_of(index)
        self.seen = 0
        """Tokens so far, padding included."""
        self.uniform = True
        """Whether no row has had padding: the rows' tokens stand at the same places."""

    def __repr__(self) -> str:
        return f"{self.policy.name} (layer {self.index})"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take note of new keys and values and give them back: what was held before stays here."""
        if not self.policy.is_on:
            raise Unsupported(f"{self} answers queries itself; call the model inside `with cache.on(model):`")
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise Unsupported(f"{self} holds no gradients; call the model under torch.no_grad() (generate does)")
        if not math.isfinite(float(key_states.sum(dtype=torch.float32) + value_states.sum(dtype=torch.float32))):
            for what, x in (("keys", key_states), ("values", value_states)):
                check_finite(x, f"{what} of {self}")
        self.is_initialized = True
        self.device, self.dtype = key_states.device, key_states.dtype
        self.seen += key_states.shape[2]
        layer_of_keys[key_states] = self
        return key_states, value_states

    def answer(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, at_BT: Tensor, *, scale: float, rotary: Rotary, hidden_BTD: Tensor | None
    ) -> Tensor:
        """[B, H, T, D]: attention of the new queries over what is held and the new keys, which are taken in on the way.

        Args:
            at_BT: place of each new token among the real tokens of its row; -1 at padding.
        """
        raise NotImplementedError

    def step(self, q_BH1D: Tensor, k_BG1D: Tensor, v_BG1D: Tensor, *, scale: float) -> Tensor | None:
        """What `answer` gives and does for one token of each row where no row has had padding, in fewer operations; None: ask `answer`."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """Everything held, by name; names that begin with "offloaded" need not be in fast memory."""
        raise NotImplementedError

    def kept(self) -> Tensor:
        """[B, G] entries that a query can still reach."""
        raise NotImplementedError

    def rows(self, take: Callable[[Tensor], Tensor]) -> None:
        """Replace what is held by `take` of it: other batch rows."""
        raise NotImplementedError

    def bytes(self, offloaded: bool | None = None) -> int:
        """Bytes of the storage of every tensor held; of the offloaded ones, or of the others, alone if asked."""
        return sum(self.storages(offloaded).values())

    def storages(self, offloaded: bool | None = None) -> dict[int, int]:
        """Bytes of each storage, as in `bytes`, by its address."""
        chosen = (x for name, x in self.tensors().items() if offloaded in (None, name.startswith("offloaded")))
        return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in chosen}

    def offload(self) -> None:
        """Everything held to the CPU."""
        if self.seen:
            self.rows(lambda x: x.to("cpu"))

    def prefetch(self) -> None:
        """Everything held back to where the keys come from, what is named "offloaded" too."""
        if self.seen:
            self.rows(lambda x: x.to(self.device))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.__init__(self.policy, self.index)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what a policy would hold without its newest tokens cannot be told from what it holds."""
        raise Unsupported(f"{self} cannot be cropped: what was dropped for the newest keys is gone; use rarefy.attention.cache.Cache")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.seen:
            self.rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these batch rows."""
        if self.seen:
            self.rows(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each batch row `repeats` times."""
        if self.seen:
            self.rows(lambda x: x.repeat_interleave(repeats, 0))


class Policy(transformers.Cache):
    """A cache that keeps, compresses or chooses among its entries; pass it as `past_key_values` inside `with cache.on(model)`.

    Args:
        budget: what fraction of the dense cache may be kept (or, where a policy keeps all, read at a step); one figure or
            one for each layer.
    """

    name: ClassVar[str] = ""
    unit: ClassVar[str] = "cached key"
    layer: ClassVar[type[PolicyLayer]]

    def __init__(self, budget: float | Sequence[float] = 0.25) -> None:
        self.budgets = [fraction("budget", b) for b in budget] if isinstance(budget, Sequence) else [fraction("budget", budget)]
        if not self.budgets:
            raise BadInput("budget=[] names no layer; give a figure or one for each layer")
        self.is_on = False
        self.modules: list[nn.Module] = []
        """While at work: the attention modules, first layer first."""
        super().__init__(layer_class_to_replicate=self._next_layer)  # type: ignore[arg-type]

    def _next_layer(self) -> PolicyLayer:
        return self.layer(self, len(self.layers))

    def budget_of(self, layer: int) -> float:
        """The budget of a layer."""
        if len(self.budgets) == 1:
            return self.budgets[0]
        if layer >= len(self.budgets):
            raise BadInput(f"{len(self.budgets)} budgets were given but the model has a layer {layer}; give one figure or one for each layer")
        return self.budgets[layer]

    @contextlib.contextmanager
    def on(self, model: nn.Module) -> Iterator[Policy]:
        """Route the attention of every layer to this cache; the model comes back as it was.

        Raises:
            Unsupported: a layer that this cannot serve (sliding window, capped logits, cross attention), by name.
        """
        before = self.is_on, self.modules
        with replaced(model, {"layers.*.attn": _Served(self)}):
            self.is_on = True
            self.modules = [model.get_submodule(site.module_path) for site in sites(model, "layers.*.attn").values()]
            try:
                yield self
            finally:
                self.is_on, self.modules = before

    def bytes(self, offloaded: bool | None = None) -> int:
        """Bytes of every tensor held, spare room included, what layers share once; with `offloaded`, of that part or of the rest alone."""
        held: dict[int, int] = {}
        for layer in self.layers:
            held |= layer.storages(offloaded)  # type: ignore[union-attr]
        return sum(held.values())

    def kept(self) -> list[Tensor]:
        """Of each layer, [B, G] entries that a query can still reach."""
        return [layer.kept() for layer in self.layers]  # type: ignore[union-attr]


class _Served(nn.Module):
    """Stands in a plan and hands each call to the cache that it came with."""

    wants = ("cache", "rotary", "hidden")
    serves_cache = True

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, padding_BS: Tensor | None, layer: int,
        cache: Any, rotary: Rotary, hidden_BTD: Tensor | None,
    ) -> Tensor:
        """What the layer of the cache answers."""
        if not causal or not isinstance(cache, PolicyLayer) or cache.policy is not self.policy:
            raise Unsupported(f"layer {layer} was run without this {self.policy.name}; pass it: past_key_values=cache")
        T = q.shape[2]
        cache.uniform = cache.uniform and padding_BS is None
        if T == 1 and cache.uniform and (out := cache.step(q, k, v, scale=scale)) is not None:
            return out
        if padding_BS is None:
            at_BT = torch.arange(cache.seen - T, cache.seen, device=q.device).expand(q.shape[0], T)
        else:
            at_BT = (padding_BS.long().cumsum(1) - 1).masked_fill(~padding_BS, -1)[:, cache.seen - T :]
        return cache.answer(q, k, v, at_BT, scale=scale, rotary=rotary, hidden_BTD=hidden_BTD)
