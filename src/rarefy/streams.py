"""Where training gets its activations: a tensor, a store on disk, or a model run on the fly.

Every stream is a pure function of (seed, step): the batch at a step does not depend on where reading began, so that
a resumed run sees exactly what the uninterrupted one would have seen.

Shape letters: N = rows, B = batch rows, D = input width, E = output width, T = context.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .errors import BadInput
from .method import positive
from .site import capture

Batch = tuple[Tensor, Tensor]
"""(x_BD, y_BE): what goes in and what is to be reproduced; the same tensor for autoencoders."""


class Stream(Protocol):
    """What `train` reads."""

    made_from: dict[str, Any]
    """Plain JSON that names the data; a resumed run must find the same."""

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches from `start_step` on, without end."""
        ...


class TensorStream:
    """Rows already in memory, shuffled anew each epoch.

    Args:
        x_ND: rows.
        size: rows a batch, at most N.
        y_NE: targets for transcoders; default x_ND.
    """

    def __init__(self, x_ND: Tensor, size: int, *, y_NE: Tensor | None = None, seed: int = 0) -> None:
        positive("size", size, len(x_ND))
        if y_NE is not None and len(y_NE) != len(x_ND):
            raise BadInput(f"{len(x_ND)} rows in but {len(y_NE)} out; give one target a row")
        self.x_ND, self.y_NE, self.size, self.seed = x_ND, x_ND if y_NE is None else y_NE, size, seed
        digest = hashlib.blake2b(x_ND.detach().cpu().float().numpy().tobytes(), digest_size=16).hexdigest()
        self.made_from = {"rows": digest, "shape": list(x_ND.shape), "size": size, "seed": seed}

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """See Stream."""
        an_epoch = len(self.x_ND) // self.size
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        step = start_step
        while True:
            if step // an_epoch != epoch:
                epoch = step // an_epoch
                order = torch.randperm(len(self.x_ND), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
            at = order[(step % an_epoch) * self.size : (step % an_epoch + 1) * self.size]
            x_BD = self.x_ND[at]
            yield x_BD, (x_BD if self.y_NE is self.x_ND else self.y_NE[at])
            step += 1


class StoreStream:
    """Rows of an activation store on disk (see store/FORMAT.md)."""

    def __init__(self, store: Any, size: int, *, seed: int = 0) -> None:
        self.store, self.size, self.seed = store, positive("size", size, len(store)), seed
        self.made_from = {"store": getattr(store, "name", str(store)), "rows": len(store), "size": size, "seed": seed}

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """See Stream."""
        for x_BD in self.store.batches(self.size, self.seed, start_step):
            yield x_BD, x_BD


class LiveStream:
    """Activations captured from a model as they are needed, shuffled within a buffer of `buffer` contexts.

    Args:
        windows_NT: token ids, one context a row.
        site: canonical site name; `target` the site to reproduce (transcoders), default the same.
        size: rows a batch.
        skip: positions dropped at the start of each context (the first token's norm is far above the others').
    """

    def __init__(
        self, model: nn.Module, site: str, windows_NT: Tensor, size: int, *, target: str | None = None,
        buffer: int = 128, at_once: int = 16, seed: int = 0, skip: int = 1,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        if windows_NT.ndim != 2 or windows_NT.shape[1] <= skip:
            raise BadInput(f"windows have shape {list(windows_NT.shape)}; need [contexts, tokens > {skip}]")
        self.model, self.site, self.target, self.windows_NT = model, site, target or site, windows_NT
        self.size, self.seed, self.skip, self.at_once = positive("size", size), seed, skip, at_once
        self.buffer = min(positive("buffer", buffer), len(windows_NT))
        self.rows = self.buffer * (windows_NT.shape[1] - skip)
        """Rows of a buffer."""
        if size > self.rows:
            raise BadInput(f"a batch of {size} rows is larger than the buffer of {self.rows}; lower it or give more text")
        self.a_buffer = self.rows // size
        digest = hashlib.blake2b(windows_NT.numpy().tobytes(), digest_size=16).hexdigest()
        self.made_from = {"site": site, "target": self.target, "tokens": digest, "buffer": self.buffer, "size": size,
                          "seed": seed, "skip": skip}

    def fill(self, number: int) -> Batch:
        """Rows of buffer `number`, in shuffled order."""
        n = len(self.windows_NT)
        an_epoch = max(1, n // self.buffer)
        epoch, part = divmod(number, an_epoch)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
        chosen = self.windows_NT[order[part * self.buffer : (part + 1) * self.buffer]]
        xs, ys = [], []
        names = list(dict.fromkeys((self.site, self.target)))
        for ids_BT in chosen.split(self.at_once):
            got = capture(self.model, names, input_ids=ids_BT)
            xs.append(got[self.site][:, self.skip :].flatten(0, 1))
            if self.target != self.site:
                ys.append(got[self.target][:, self.skip :].flatten(0, 1))
        x_ND = torch.cat(xs)
        mix = torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(self.seed * 7_368_787 + number))
        x_ND = x_ND[mix]
        return x_ND, (torch.cat(ys)[mix] if ys else x_ND)

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """See Stream."""
        number = start_step // self.a_buffer
        within = start_step % self.a_buffer
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
