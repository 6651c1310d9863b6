"""Reading what flows at the sites of a model, putting methods in and taking them out; places.py has the names.

Shape letters: B = batch, T = tokens, D = width, H = heads.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attach import attached
from .errors import BadInput, Unsupported
from .families import config_of, family_of
from .method import Sparse
from .places import Site, all_sites, dense_of, known_sites, refuse_shared, sites, sites_of

__all__ = ["Site", "all_sites", "capture", "replaced", "sites"]

Map = Callable[[Tensor], Tensor]


def _split(site: Site, fused: Tensor, heads: int, layout: str) -> Tensor:
    at = "qkv".index(site.part)
    if layout == "concat":
        return fused.chunk(3, -1)[at]
    return fused.unflatten(-1, (heads, 3, -1))[..., at, :].flatten(-2)


def _join(site: Site, fused: Tensor, new: Tensor, heads: int, layout: str) -> Tensor:
    at, out = "qkv".index(site.part), fused.clone()
    if layout == "concat":
        out.unflatten(-1, (3, -1))[..., at, :] = new
    else:
        out.unflatten(-1, (heads, 3, -1))[..., at, :] = new.unflatten(-1, (heads, -1))
    return out


def _layout(model: nn.Module, site: Site) -> tuple[int, str]:
    return (config_of(model).num_attention_heads, family_of(model).qkv) if site.part else (0, "")


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple | list) else output


def _with_first(output: Any, new: Tensor) -> Any:
    return type(output)((new, *output[1:])) if isinstance(output, tuple | list) else new


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


class _Enough(Exception):
    """Raised inside a forward pass once the deepest wanted site was read."""


def capture(model: nn.Module, names: Iterable[str], *, grad: bool = False, **inputs: Any) -> dict[str, Tensor]:
    """What flows at the named sites, and nothing computed past the deepest of them.

    Args:
        names: site names, aliases or globs of stream sites; or one of them.
        inputs: what the model takes, such as input_ids [B, T] and attention_mask.

    Returns:
        canonical name -> tensor [B, T, D], detached unless `grad`.

    Raises:
        BadInput: no such site.
        Unsupported: attention sites; a module used at several places; a site that this pass does not reach.
    """
    wanted: dict[str, Site] = {}
    for found in sites_of(model, [names] if isinstance(names, str) else names):
        wanted.update(found)
    if not wanted:
        raise BadInput("capture() was given no site names; name at least one, such as layers.0.resid_post")
    refuse_shared(model, wanted.values())
    wrong = [s.name for s in wanted.values() if s.kind == "attention"]
    if wrong:
        raise Unsupported(f"{wrong[0]} is the attention itself, not a tensor; read {wrong[0]}.z or {wrong[0]}.out")
    got: dict[str, Tensor] = {}
    handles = []

    def take(site: Site, value: Tensor) -> None:
        if site.part:
            value = _split(site, value, *_layout(model, site))
        value = _unflat(value, _rows((), inputs))
        got[site.name] = value if grad else value.detach()
        if len(got) == len(wanted):
            raise _Enough

    for site in wanted.values():
        module = model.get_submodule(site.module_path)
        if site.where == "input":
            handles.append(module.register_forward_pre_hook(lambda m, a, k, s=site: take(s, _input(a, k)), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(lambda m, a, o, s=site: take(s, _first(o))))
    if hasattr(config_of(model), "use_cache"):
        inputs.setdefault("use_cache", False)
    try:
        with contextlib.suppress(_Enough), torch.set_grad_enabled(grad):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in wanted if name not in got]
    if missing:
        raise Unsupported(f"{missing[0]} was not reached by this forward pass")
    return got


def _rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """(B, T) of what a model is called with; () where that is not text."""
    given = kwargs.get("input_ids", kwargs.get("inputs_embeds", args[0] if args else None))
    return tuple(given.shape[:2]) if isinstance(given, Tensor) and given.ndim in (2, 3) else ()


def _unflat(value: Tensor, rows: tuple[int, ...]) -> Tensor:
    """[B, T, D], also where a model works on flat rows [B * T, D] (OPT's MLP)."""
    return value.unflatten(0, rows) if value.ndim == 2 and len(rows) == 2 and value.shape[0] == rows[0] * rows[1] else value


def _checked(site: Site, new: Map, rows: list[tuple[int, ...]]) -> Map:
    """`new`, given [B, T, D] and held to return the same shape and dtype."""

    def call(flat: Tensor) -> Tensor:
        value = _unflat(flat, rows[0])
        out = new(value)
        if isinstance(out, Tensor) and torch.is_autocast_enabled(value.device.type):
            out = out.to(value.dtype)
        if not isinstance(out, Tensor) or out.shape != value.shape or out.dtype != value.dtype:
            given = f"{list(out.shape)} {out.dtype}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise BadInput(f"{site.name}: what is put there returned {given} for {list(value.shape)} {value.dtype}; return a tensor of the same kind")
        return out.view_as(flat) if flat.ndim < out.ndim else out

    return call


class _Hook:
    """A stream's hook, which goes along when another layer comes to stand where it hangs."""

    def __init__(self, module: nn.Module, hang: Callable[[nn.Module], Any]) -> None:
        self.module, self.hang, self.handle = module, hang, hang(module)
        _hooks.append(self)

    def move(self, module: nn.Module) -> None:
        self.handle.remove()
        self.module, self.handle = module, self.hang(module)

    def remove(self) -> None:
        self.handle.remove()
        _hooks.remove(self)


@dataclass(eq=False)
class _Swap:
    """A linear layer and what stands in its place."""

    owner: nn.Module
    leaf: str
    old: nn.Module
    new: nn.Module

    def enter(self) -> None:
        _swaps.append(self)
        self._stand(self.old, self.new)

    def leave(self) -> None:
        """Put back what stood there; where a later swap stands on this one, let that one put it back."""
        at = _swaps.index(self)
        later = next((s for s in _swaps[at + 1 :] if s.owner is self.owner and s.leaf == self.leaf), None)
        del _swaps[at]
        if later is None:
            self._stand(self.new, self.old)
        else:
            later.old = self.old

    def _stand(self, before: nn.Module, now: nn.Module) -> None:
        setattr(self.owner, self.leaf, now)
        for hook in [hook for hook in _hooks if hook.module is before]:
            hook.move(now)


_hooks: list[_Hook] = []
_swaps: list[_Swap] = []
"""Of all contexts that are open, first come first."""


def _hook_stream(model: nn.Module, site: Site, new: Map, handles: list[Any]) -> None:
    rows: list[tuple[int, ...]] = [()]
    handles.append(model.register_forward_pre_hook(lambda m, args, kwargs: rows.__setitem__(0, _rows(args, kwargs)), with_kwargs=True))
    new = _checked(site, new, rows)
    module = model.get_submodule(site.module_path)
    if site.adds:
        _hook_between(model, site, new, handles)
    elif site.where == "input":
        def before(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            value = new(_input(args, kwargs))
            return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": value})

        # A layer's own input comes before what _hook_between notes of it, also when this context is the inner one.
        first = site.name.endswith(".resid_pre")
        handles.append(_Hook(module, lambda m: m.register_forward_pre_hook(before, with_kwargs=True, prepend=first)))
    else:
        def after(m: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            old = _first(output)
            if not site.part:
                return _with_first(output, new(old))
            heads, layout = _layout(model, site)
            return _join(site, old, new(_split(site, old, heads, layout)), heads, layout)

        handles.append(_Hook(module, lambda m: m.register_forward_hook(after)))


def _hook_between(model: nn.Module, site: Site, new: Map, handles: list[Any]) -> None:
    """resid_mid is a sum kept by no module: change the summand by what the new value changes, so that identity is exact."""
    layer = model.get_submodule(site.module_path.rpartition(".")[0])
    stream: list[Tensor] = []

    def note(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream[:] = [_input(args, kwargs)]

    def change(m: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        summand = _first(output)
        middle = stream.pop().view_as(summand) + summand
        return _with_first(output, summand + (new(middle) - middle))

    handles.append(layer.register_forward_pre_hook(note, with_kwargs=True))
    handles.append(model.get_submodule(site.adds).register_forward_hook(change))


@contextlib.contextmanager
def replaced(
    model: nn.Module, plan: Mapping[str, Any] | None = None, *, attention: str = "", **arguments: Any,
) -> Iterator[nn.Module]:
    """Put methods into a model for the length of a `with` block; the model comes back exactly as it was.

    Args:
        plan: site name, alias or glob -> what goes there. Stream sites take a callable [B, T, D] -> [B, T, D]; linear
            sites a module; `layers.N.attn` an attention method. A name goes before a glob, a later glob before an earlier one.
        attention: catalogue name below attention/, with its arguments, for every layer whose attention the plan does not name
            (`replaced(model, attention="quest", budget=0.25)`).

    Raises:
        BadInput, Unsupported: before anything is changed.
    """
    if not isinstance(model, nn.Module):
        raise BadInput(f"replaced() takes a model first, not a {type(model).__name__}")
    if plan is None and not attention:
        raise BadInput(f"replaced() got {', '.join(arguments) or 'nothing to put in'} without attention=NAME; give that or a plan {{site: method}}")
    where = _places(model, {} if plan is None else plan)
    if attention:
        everywhere = {name: (site, new) for new in [_by_name(attention, arguments)] for name, site in sites_of(model, ["layers.*.attn"])[0].items()}
        if everywhere.keys() <= where.keys():
            raise BadInput(f"the plan names the attention of every layer, which leaves attention={attention!r} none; leave one of them out")
        where = everywhere | where
    elif arguments:
        raise BadInput(f"replaced() got {', '.join(arguments)} without attention=NAME")
    for site, new in where.values():
        _check(site, new)
    refuse_shared(model, [site for site, _ in where.values()])
    rank = {name: i for i, name in enumerate(known_sites(model))}
    handles: list[Any] = []
    swapped: list[_Swap] = []
    standing: list[nn.Module] = []
    heads = {s.module_path: (s.name, new) for s, new in where.values() if s.kind == "attention"}
    try:
        with attached(model, heads) if heads else contextlib.nullcontext():
            # Layers first, so that streams through them are hooked to what stands there; streams as they are reached.
            for site, new in where.values():
                if site.kind == "linear":
                    parent, _, leaf = site.module_path.rpartition(".")
                    owner = model.get_submodule(parent)
                    old = getattr(owner, leaf)
                    dense = dense_of[old] if old in dense_of else old
                    if new not in dense_of and new is not dense:
                        dense_of[new] = dense
                        standing.append(new)
                    swapped.append(_Swap(owner, leaf, old, new))
                    swapped[-1].enter()
            for site, new in sorted(where.values(), key=lambda pair: rank.get(pair[0].name, len(rank))):
                if site.kind == "stream":
                    _hook_stream(model, site, new, handles)
            yield model
    finally:
        for handle in handles:
            handle.remove()
        for swap in reversed(swapped):
            swap.leave()
        for new in standing:
            dense_of.pop(new, None)


def _places(model: nn.Module, plan: Mapping[str, Any]) -> dict[str, tuple[Site, Any]]:
    """Site name -> (site, what goes there): globs in their order, then names."""
    if not isinstance(plan, Mapping):
        hint = f"; for a method by name: replaced(model, attention={plan!r})" if isinstance(plan, str) else ""
        raise BadInput(f"a plan is a mapping {{site: what goes there}}, not a {type(plan).__name__}{hint}")
    globs: dict[str, tuple[Site, Any]] = {}
    named: dict[str, tuple[Site, Any]] = {}
    for (name, new), found in zip(plan.items(), sites_of(model, plan), strict=True):
        if isinstance(new, Sparse) and len(found) > 1 and any(s.kind == "linear" for s in found.values()):
            raise BadInput(f"{name} names {len(found)} sites, but one method stands in for one linear layer; give each its own")
        one = not any(c in name for c in "*?[")
        if one and (twice := found.keys() & named.keys()):
            raise BadInput(f"two entries of the plan name {twice.pop()}, one of them as {name}; give it one")
        (named if one else globs).update({s.name: (s, new) for s in found.values()})
    return globs | named


def _by_name(attention: str, arguments: dict[str, Any]) -> nn.Module:
    """One attention method for every layer, by its catalogue name below attention/."""
    from .catalogue import CARDS, entry

    if not isinstance(attention, str):
        raise BadInput(f"attention={attention!r}: give a catalogue name, or the object in a plan, {{'layers.*.attn': method}}")
    leaf = attention.lower().rpartition("/")[2]
    other = next((c for c in CARDS if c.name in (f"cache/{leaf}", f"patterns/{leaf}") and attention in (c.name, leaf)), None)
    if other is not None and not any(c.name == f"attention/{leaf}" for c in CARDS):
        how = f"rarefy.attention.cache.kv_cache(model, {leaf!r})" if other.kind == "cache" else "attention='pattern', pattern=its expression"
        raise BadInput(f"{other.name} is a {other.kind}, not a method of attention: use {how}; `rarefy methods {other.name}` prints its card")
    card = entry(f"attention/{attention.lower().removeprefix('attention/')}")
    if card.fitted == "trained":
        raise BadInput(
            f"{card.name} has parameters of its own that must be trained first: plan = rarefy.plan({card.name!r}, model), train it "
            "(rarefy.attention.trained: Distilled or Trained), then replaced(model, plan)"
        )
    for what, how in (("layers", "name them in a plan, {'layers.[01].attn': method}"), ("heads", "give a plan rarefy.attention.per_head.PerHead")):
        if what in arguments and what not in inspect.signature(card.load()).parameters:
            raise BadInput(f"{card.name} has no {what}= to choose some of them; {how}")
    return card.load()(**arguments).eval()


def _check(site: Site, new: Any) -> None:
    if isinstance(new, type):
        raise BadInput(f"{site.name}: {new.__name__} is a class; give an object of it, {new.__name__}(...)")
    if site.kind == "linear" and not isinstance(new, nn.Module):
        raise BadInput(f"{site.name}: a linear layer is replaced by a module, not by a {type(new).__name__}")
    if site.kind == "attention" and not hasattr(new, "attend"):
        raise BadInput(f"{site.name}: give an attention method (it has `attend`), not a {type(new).__name__}")
    if not callable(new):
        raise BadInput(f"{site.name}: a {type(new).__name__} is not callable")
