"""Where training gets its activations: a tensor, a store on disk, or a model run on the fly.

Every stream is a pure function of (seed, step): the batch at a step does not depend on where reading began, so that
a resumed run sees exactly what the uninterrupted one would have seen.

Shape letters: N = rows, B = batch rows, D = input width, E = output width, T = context, S = sites.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import xxhash
from torch import Tensor, nn

from .errors import BadInput
from .method import positive
from .places import sites_of
from .site import capture
from .store.tensors import raw_bytes

if TYPE_CHECKING:
    from .store.shards import ActivationStore

Batch = tuple[Tensor, Tensor]
"""(x_BD, y_BE): what goes in and what is to be reproduced; the same tensor for autoencoders."""
JOINS = ("concat", "mix")


class Stream(Protocol):
    """What `train` reads."""

    @property
    def made_from(self) -> dict[str, Any]:
        """Plain JSON that names the data and its order; a resumed run must find the same."""
        ...

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches from `start_step` on, all of the same number of rows, without end."""
        ...


def digest(tensors: dict[str, Tensor]) -> str:
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


def weights_digest(model: nn.Module) -> str:
    """`digest` of all that a model's state holds."""
    return digest({k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)})


def _names(model: nn.Module, given: str | Sequence[str]) -> tuple[str, ...]:
    """Canonical names of all that is named, each once, in the order given (a glob's in the model's)."""
    asked = [given] if isinstance(given, str) else given
    return tuple(dict.fromkeys(name for found in sites_of(model, asked) for name in found))


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
        self.made_from = {"rows": digest(held), "shape": list(x_ND.shape), "size": size, "seed": seed}

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


@dataclass(frozen=True)
class Flow:
    """Which sites a dictionary reads, which it reproduces, and how its rows are made of several.

    `concat`: a row is what flows at all of them at one position, one after another (crosscoders, transcoders from or to
    several sites). `mix`: a row is what flows at one of them, so that a position gives a row a site and one dictionary serves
    all (multi-layer and layer-group autoencoders).
    """

    sites: tuple[str, ...]
    targets: tuple[str, ...]
    """The same as `sites` for autoencoders."""
    join: str = ""
    """concat, mix, or "" for one site and one target."""
    beside: bool = False
    """Whether the sites are read in two models: those of the first, then those of the second."""

    @classmethod
    def of(cls, model: nn.Module, site: str | Sequence[str], target: str | Sequence[str] = (), join: str = "", beside: bool = False) -> Flow:
        """Of names, aliases and globs. Raises BadInput where the sites do not fit each other or the way they are joined."""
        names, goals = _names(model, site), _names(model, target) if target else ()
        if join and join not in JOINS:
            raise BadInput(f"join={join!r} must be one of {', '.join(JOINS)}")
        for what, found in (("site", names), ("target", goals)):
            if len(found) > 1 and not join:
                raise BadInput(
                    f"{what} names {len(found)} sites ({', '.join(found[:3])}, ...); train on one site a run, or join them: concat makes one row of "
                    "all (a crosscoder), mix takes each as a row of its own (one dictionary for all layers)"
                )
        if join and len(names) == 1 and len(goals) < 2 and not beside:
            raise BadInput(f"join={join!r} with one site, {names[0]}, joins nothing; name several, or leave it out")
        if beside and (goals or join != "concat"):
            raise BadInput("two models are read side by side by a crosscoder: join them by concat, and name no target")
        if join == "mix" and goals and len(goals) != len(names):
            raise BadInput(f"mix pairs sites with targets, and there are {len(names)} and {len(goals)}; name as many of each")
        return cls(names, goals or names, join, beside)

    @property
    def transcodes(self) -> bool:
        """Whether something other than what is read is reproduced."""
        return self.targets != self.sites

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of what a row reproduced is made of."""
        return (*self.targets, *(f"beside:{name}" for name in self.targets)) if self.beside else self.targets

    def read(self, model: nn.Module, ids_BT: Tensor, beside: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """What flows for token ids, (x, y): [B, T, D] and [B, T, E]; of `mix` [S, B, T, D] with one entry a site. y is x for autoencoders."""
        got = self._flows(model, ids_BT, beside)
        join = torch.stack if self.join == "mix" else lambda parts: parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        x = join([g[name] for g in got for name in self.sites])
        return x, (join([g[name] for g in got for name in self.targets]) if self.transcodes else x)

    def _flows(self, model: nn.Module, ids_BT: Tensor, beside: nn.Module | None) -> list[dict[str, Tensor]]:
        """What flows in each model, by site, on the first one's device."""
        models, names = (model, *([beside] if beside is not None else [])), dict.fromkeys((*self.sites, *self.targets))
        home = next(model.parameters()).device
        got = [capture(m, names, input_ids=ids_BT.to(next(m.parameters()).device)) for m in models]
        return [{name: value.to(home) for name, value in g.items()} for g in got]

    def widths(self, model: nn.Module, ids_BT: Tensor, beside: nn.Module | None = None) -> tuple[list[int], list[int]]:
        """Widths of the parts of a row read and of a row reproduced, as the model gives them; one each where sites are mixed."""
        got = self._flows(model, ids_BT, beside)
        read, made = ([g[name].shape[-1] for g in got for name in names] for names in (self.sites, self.targets))
        if self.join != "mix":
            return read, made
        for widths, names in ((read, self.sites), (made, self.targets)):
            if len(set(widths)) > 1:
                raise BadInput(f"mix needs sites of one width; {names[0]} has {widths[0]} and {names[-1]} {widths[-1]}. concat takes any")
        return read[:1], made[:1]


class LiveStream:
    """Activations captured from a model as they are needed, shuffled within a buffer of `buffer` contexts.

    Contexts are dealt to buffers in an order shuffled anew each epoch; those past the last whole buffer, and the rows of a
    buffer past its last whole batch, wait for another epoch. Memory is that of one buffer of activations.

    Args:
        model: in eval mode, or its dropout makes the stream another one each time it is read.
        site: name of a stream site, or several to be joined; `target` the site or sites to reproduce (transcoders), default the same.
        windows_NT: token ids, one context a row.
        size: rows a batch.
        join: concat or mix, see Flow. beside: a second model with the same vocabulary, whose rows at the same sites are
            joined to the first's (model diffing).
        at_once: contexts a forward pass.
        skip: positions dropped at the start of each context (the first token's norm is far above the others').
    """

    def __init__(
        self, model: nn.Module, site: str | Sequence[str], windows_NT: Tensor, size: int, *, target: str | Sequence[str] | None = None,
        join: str = "", beside: nn.Module | None = None, buffer: int = 128, at_once: int = 16, seed: int = 0, skip: int = 1,
    ) -> None:
        if windows_NT.ndim != 2 or not len(windows_NT) or windows_NT.shape[1] <= _whole("skip", skip):
            raise BadInput(f"windows have shape {list(windows_NT.shape)}; need [contexts, tokens > {skip}] with at least one context")
        self.model, self.beside, self.windows_NT = model, beside, windows_NT
        self.flow = Flow.of(model, site, target or (), join, beside is not None)
        self.size, self.seed, self.skip, self.at_once = positive("size", size), seed, skip, positive("at_once", at_once)
        self.buffer = min(positive("buffer", buffer), len(windows_NT))
        self.rows = self.buffer * (windows_NT.shape[1] - skip) * (len(self.flow.sites) if join == "mix" else 1)
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
            one, flow = not self.flow.join, self.flow
            self._made_from = {
                "model": weights_digest(self.model), "site": flow.sites[0] if one else list(flow.sites),
                "target": flow.targets[0] if one else list(flow.targets), "tokens": digest({"": self.windows_NT}), "buffer": self.buffer,
                "at_once": self.at_once, "size": self.size, "seed": self.seed, "skip": self.skip, **({} if one else {"join": flow.join}),
                **({"beside": weights_digest(self.beside)} if self.beside is not None else {}),
            }
        return self._made_from

    def fill(self, number: int) -> Batch:
        """Rows of buffer `number`, in shuffled order."""
        n = len(self.windows_NT)
        epoch, part = divmod(number, n // self.buffer)
        chosen = self.windows_NT[_order(n, self.seed, epoch, 2)[part * self.buffer : (part + 1) * self.buffer]]
        parts = [self.take(ids_BT) for ids_BT in chosen.split(self.at_once)]
        x_ND, same = torch.cat([x for x, _ in parts]), all(y is x for x, y in parts)
        mix = _order(len(x_ND), self.seed, number, 3).to(x_ND.device)
        mixed = x_ND[mix]
        return mixed, (mixed if same else torch.cat([y for _, y in parts])[mix])

    def take(self, ids_BT: Tensor) -> Batch:
        """Rows of some contexts, in order: by site where sites are mixed, then by context and position."""
        x, y = self.flow.read(self.model, ids_BT, self.beside)
        rows = x[..., self.skip :, :].flatten(0, -2)
        return rows, (y[..., self.skip :, :].flatten(0, -2) if self.flow.transcodes else rows)

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
