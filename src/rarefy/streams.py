"""Where training gets its activations: a tensor, a store on disk, or a model run on the fly.

Every stream is a pure function of (seed, step): the batch at a step does not depend on where reading began, so that
a resumed run sees exactly what the uninterrupted one would have seen.

Shape letters: N = rows, B = batch rows, D = input width, E = output width, T = context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import xxhash
from torch import Tensor, nn

from .errors import BadInput
from .method import positive
from .site import capture, sites
from .store.tensors import raw_bytes

if TYPE_CHECKING:
    from .store.shards import ActivationStore

Batch = tuple[Tensor, Tensor]
"""(x_BD, y_BE): what goes in and what is to be reproduced; the same tensor for autoencoders."""


class Stream(Protocol):
    """What `train` reads."""

    @property
    def made_from(self) -> dict[str, Any]:
        """Plain JSON that names the data and its order; a resumed run must find the same."""
        ...

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches from `start_step` on, all of the same number of rows, without end."""
        ...


def _digest(tensors: dict[str, Tensor]) -> str:
    """Hash of names, dtypes, shapes and elements; of a tensor on the meta device, which has none, without them."""
    total = xxhash.xxh3_128()
    for name, tensor in tensors.items():
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        if tensor.device.type != "meta":
            total.update(raw_bytes(tensor))
    return total.hexdigest()


def _whole(name: str, value: int, least: int = 0) -> int:
    if type(value) is not int or value < least:
        raise BadInput(f"{name}={value!r} must be a whole number >= {least}")
    return value


def _order(n: int, seed: int, number: int, salt: int) -> Tensor:
    """Permutation of n; salt keeps the orders of different things apart."""
    mixed = xxhash.xxh3_64_intdigest(f"{salt},{seed},{number}".encode())
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed % 2**63))


def _one(model: nn.Module, name: str) -> str:
    """Canonical name of the one site that `name` means."""
    found = list(sites(model, name))
    if len(found) > 1:
        raise BadInput(f"{name} names {len(found)} sites ({', '.join(found[:3])}, ...); give one")
    return found[0]


class TensorStream:
    """Rows already in memory, shuffled anew each epoch; rows past the last whole batch wait for another epoch's order.

    Args:
        x_ND: rows.
        size: rows a batch, at most N.
        y_NE: targets for transcoders; default x_ND.
    """

    def __init__(self, x_ND: Tensor, size: int, *, y_NE: Tensor | None = None, seed: int = 0) -> None:
        if x_ND.ndim != 2 or not len(x_ND):
            raise BadInput(f"rows have shape {list(x_ND.shape)}; need [rows, width] with at least one row")
        positive("size", size, len(x_ND))
        if y_NE is not None and (y_NE.ndim != 2 or len(y_NE) != len(x_ND)):
            raise BadInput(f"{len(x_ND)} rows in but targets of shape {list(y_NE.shape)}; give one target a row, [rows, width]")
        self.x_ND, self.y_NE, self.size, self.seed = x_ND, x_ND if y_NE is None else y_NE, size, seed
        held = {"x": x_ND} if y_NE is None else {"x": x_ND, "y": y_NE}
        self.made_from = {"rows": _digest(held), "shape": list(x_ND.shape), "size": size, "seed": seed}

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """See Stream."""
        an_epoch, held = len(self.x_ND) // self.size, -1
        order, step = torch.empty(0, dtype=torch.long), _whole("start_step", start_step)
        while True:
            epoch, part = divmod(step, an_epoch)
            if epoch != held:
                held, order = epoch, _order(len(self.x_ND), self.seed, epoch, 1)
            at = order[part * self.size : (part + 1) * self.size].to(self.x_ND.device)
            x_BD = self.x_ND.index_select(0, at)
            yield x_BD, (x_BD if self.y_NE is self.x_ND else self.y_NE.index_select(0, at))
            step += 1


class StoreStream:
    """Rows of an activation store on disk (see store/FORMAT.md), each once an epoch, in its dtype.

    Args:
        size: rows a batch, at most those of the store as it stood when it was opened.
    """

    def __init__(self, store: ActivationStore, size: int, *, seed: int = 0) -> None:
        self.store, self.size, self.seed = store, positive("size", size, len(store)), seed
        self.made_from = {"store": store.name, "rows": len(store), "size": size, "seed": seed}

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """See Stream."""
        for x_BD in self.store.batches(self.size, self.seed, start_step):
            yield x_BD, x_BD


class LiveStream:
    """Activations captured from a model as they are needed, shuffled within a buffer of `buffer` contexts.

    Contexts are dealt to buffers in an order shuffled anew each epoch; those past the last whole buffer, and the rows of a
    buffer past its last whole batch, wait for another epoch. Memory is that of one buffer of activations.

    Args:
        model: in eval mode, or its dropout makes the stream another one each time it is read.
        site: name of one stream site; `target` the site to reproduce (transcoders), default the same.
        windows_NT: token ids, one context a row.
        size: rows a batch.
        at_once: contexts a forward pass.
        skip: positions dropped at the start of each context (the first token's norm is far above the others').
    """

    def __init__(
        self, model: nn.Module, site: str, windows_NT: Tensor, size: int, *, target: str | None = None,
        buffer: int = 128, at_once: int = 16, seed: int = 0, skip: int = 1,
    ) -> None:
        if windows_NT.ndim != 2 or not len(windows_NT) or windows_NT.shape[1] <= _whole("skip", skip):
            raise BadInput(f"windows have shape {list(windows_NT.shape)}; need [contexts, tokens > {skip}] with at least one context")
        self.model, self.windows_NT, self.site = model, windows_NT, _one(model, site)
        self.target = _one(model, target) if target else self.site
        self.size, self.seed, self.skip, self.at_once = positive("size", size), seed, skip, positive("at_once", at_once)
        self.buffer = min(positive("buffer", buffer), len(windows_NT))
        self.rows = self.buffer * (windows_NT.shape[1] - skip)
        """Rows of a buffer."""
        if size > self.rows:
            raise BadInput(f"a batch of {size} rows is larger than the buffer of {self.rows}; lower it or give more text")
        self.a_buffer = self.rows // size
        """Batches of a buffer."""
        self._made_from: dict[str, Any] | None = None

    @property
    def made_from(self) -> dict[str, Any]:
        """See Stream. Names the model by all its tensors, as they are when this is first read."""
        if self._made_from is None:
            held = {k: v for k, v in self.model.state_dict().items() if isinstance(v, Tensor)}
            self._made_from = {
                "model": _digest(held), "site": self.site, "target": self.target, "tokens": _digest({"": self.windows_NT}), "buffer": self.buffer,
                "at_once": self.at_once, "size": self.size, "seed": self.seed, "skip": self.skip,
            }
        return self._made_from

    def fill(self, number: int) -> Batch:
        """Rows of buffer `number`, in shuffled order."""
        n = len(self.windows_NT)
        epoch, part = divmod(number, n // self.buffer)
        chosen = self.windows_NT[_order(n, self.seed, epoch, 2)[part * self.buffer : (part + 1) * self.buffer]]
        device = next(self.model.parameters()).device
        names = list(dict.fromkeys((self.site, self.target)))
        xs, ys = [], []
        for ids_BT in chosen.split(self.at_once):
            got = capture(self.model, names, input_ids=ids_BT.to(device))
            xs.append(got[self.site][:, self.skip :].flatten(0, 1))
            if self.target != self.site:
                ys.append(got[self.target][:, self.skip :].flatten(0, 1))
        x_ND = torch.cat(xs)
        mix = _order(len(x_ND), self.seed, number, 3).to(x_ND.device)
        x_ND = x_ND[mix]
        return x_ND, (torch.cat(ys)[mix] if ys else x_ND)

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """See Stream."""
        number, within = divmod(_whole("start_step", start_step), self.a_buffer)
        while True:
            x_ND, y_ND = self.fill(number)
            for i in range(within, self.a_buffer):
                rows = slice(i * self.size, (i + 1) * self.size)
                x_BD = x_ND[rows]
                yield x_BD, (x_BD if y_ND is x_ND else y_ND[rows])
            number, within = number + 1, 0


def windows(batches: Sequence[Any]) -> Tensor:
    """All full contexts [N, T] of packed batches, for LiveStream."""
    full = [b.input_ids for b in batches]
    if not full:
        raise BadInput("no contexts: the text is shorter than one context; give more text or a smaller --context")
    return torch.cat(full)
