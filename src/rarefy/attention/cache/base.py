"""A cache of transformers' kind that grows in place, with derived data that grows along with the keys.

Shape letters: B = batch, G = key heads, S = cached keys, T = new keys, D = head width, N = entries of derived data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ...attach import layer_of_keys
from ...errors import BadInput

Make = Callable[[Tensor], Tensor]
"""Keys [B, G, n, D] -> derived data [B, G, ceil(n / every), ...]."""


class Growing:
    """A tensor that grows along dim 2 into storage with room to spare, so that a step copies only what is new."""

    def __init__(self) -> None:
        self.store: Tensor | None = None
        self.length = 0

    def view(self) -> Tensor:
        """What is held, without the spare room."""
        if self.store is None:
            raise BadInput("nothing was put into this cache yet")
        return self.store[:, :, : self.length]

    def append(self, x: Tensor) -> Tensor:
        """Add x behind what is held; gives the whole. Where a gradient is wanted it concatenates instead of writing in place."""
        end = self.length + x.shape[2]
        held = self.store
        if torch.is_grad_enabled() and (x.requires_grad or (held is not None and held.requires_grad)):
            self.store = x if held is None else torch.cat([held[:, :, : self.length], x], 2)
        else:
            if held is None:
                self.store = x.new_empty(*x.shape[:2], end, *x.shape[3:])
            self.room(x.shape[2])[:, :, self.length : end] = x
        self.length = end
        return self.view()

    def room(self, rows: int) -> Tensor:
        """The storage, grown so that `rows` more fit behind what is held; whoever writes them adds to `length`. Gradients end here.

        What was held under torch.inference_mode may not be written outside of it, and moves too.
        """
        assert self.store is not None
        held, end = self.store, self.length + rows
        if held.shape[2] < end or held.requires_grad or (held.is_inference() and not torch.is_inference_mode_enabled()):
            self.store = held.new_empty(*held.shape[:2], end + max(16, end // 8), *held.shape[3:])
            self.store[:, :, : self.length] = held[:, :, : self.length].detach()
        return self.store

    def rows(self, take: Callable[[Tensor], Tensor]) -> None:
        """Replace the storage by `take` of it: other batch rows."""
        if self.store is not None:
            self.store = take(self.store)


class _Summary:
    """Derived data, and how many keys it was derived from."""

    def __init__(self, every: int) -> None:
        self.grown, self.every, self.seen = Growing(), every, 0

    def extend(self, keys: Tensor, make: Make) -> Tensor:
        done = min(self.grown.length, self.seen // self.every)
        if done * self.every < keys.shape[2]:
            self.grown.length = done
            self.grown.append(make(keys[:, :, done * self.every :]))
        self.seen = keys.shape[2]
        return self.grown.view()

    def crop(self, left: int) -> None:
        self.seen = min(self.seen, left)
        self.grown.length = min(self.grown.length, left // self.every)


class Layer(CacheLayerMixin):
    """Keys and values of one attention layer, all of them."""

    is_sliding = False
    is_croppable = True
    attends = False
    """Whether the layer answers queries itself (policies) or hands its keys to whoever attends."""

    def __init__(self) -> None:
        super().__init__()
        self._held = (Growing(), Growing())
        self._summaries: dict[str, _Summary] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add T keys and values; gives all of them."""
        self.is_initialized = True
        self.device, self.dtype = key_states.device, key_states.dtype
        k, v = self._held
        self.keys, self.values = k.append(key_states), v.append(value_states)
        layer_of_keys[self.keys] = self
        return self.keys, self.values

    def summary(self, name: str, make: Make, every: int = 1) -> Tensor:
        """Derived data [B, G, ceil(S / every), ...] of the keys, computed for new keys alone at each call.

        Entry i is what `make` gives for keys i * every .. (i + 1) * every - 1; one that was computed from fewer keys is
        computed again when more have come. `make` must treat each run of `every` keys by itself. The same name with
        another `every` starts afresh.

        Args:
            make: keys [B, G, n, D] -> [B, G, ceil(n / every), ...], for keys that start at a multiple of `every`.
        """
        if every < 1:
            raise BadInput(f"every={every} must be a whole number >= 1")
        if name not in self._summaries or self._summaries[name].every != every:
            self._summaries[name] = _Summary(every)
        return self._summaries[name].extend(self._held[0].view(), make)

    def stores(self, name: str, make: Make, every: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and `summary` of the keys as they lie, with the room behind them: for kernels that take a step in one call."""
        self.summary(name, make, every)
        k, v = self._held
        return k.room(0), v.room(0), self._summaries[name].grown.room(0)

    def _growing(self) -> list[Growing]:
        return [*self._held, *(summary.grown for summary in self._summaries.values())]

    def bytes(self) -> int:
        """Bytes of every tensor held, spare room and derived data included."""
        return sum(held.store.untyped_storage().nbytes() for held in self._growing() if held.store is not None)

    def offload(self) -> None:
        """Everything to the CPU."""
        self._rows(lambda x: x.to("cpu"))

    def prefetch(self) -> None:
        """Everything back to where the keys come from."""
        if self.is_initialized:
            self._rows(lambda x: x.to(self.device))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._held[0].length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.__init__()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest keys: `tokens_to_remove` is -n, as in transformers."""
        if tokens_to_remove > 0:
            raise BadInput(f"crop({tokens_to_remove}): give minus the number of keys to drop")
        left = max(0, self.get_seq_length() + tokens_to_remove)
        for held in self._held:
            held.length = min(held.length, left)
        for summary in self._summaries.values():
            summary.crop(left)
        self._renew()

    def _rows(self, take: Callable[[Tensor], Tensor]) -> None:
        for held in self._growing():
            held.rows(take)
        self._renew()

    def _renew(self) -> None:
        if self.is_initialized and self._held[0].store is not None:
            self.keys, self.values = (held.view() for held in self._held)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these batch rows."""
        self._rows(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each batch row `repeats` times."""
        self._rows(lambda x: x.repeat_interleave(repeats, 0))


class Cache(transformers.Cache):
    """All keys and values of every layer; what DynamicCache is, without copying the past at each step.

    Pass it as `past_key_values`. Attention methods that want "cache" find the layer's `summary` there.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=Layer)

    def bytes(self) -> int:
        """Bytes of every tensor held, spare room and derived data included."""
        return sum(layer.bytes() for layer in self.layers)  # type: ignore[union-attr]
