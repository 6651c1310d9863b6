"""Names for the places of a model, reading what flows there, putting a method in and taking it out.

Canonical names: embed, layers.N.resid_pre | resid_mid | resid_post, layers.N.attn.{in,q,k,v,z,out}, layers.N.attn (the
attention itself), layers.N.mlp.{in,hidden,out}, layers.N.{q,k,v,o,qkv,gate,up,down}_proj (linear layers), final_norm,
logits. TransformerLens hook names and raw module paths are understood too, and globs over canonical names.

Shape letters: B = batch, T = tokens, D = width, H = heads.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .attach import attached
from .errors import BadInput, Unsupported
from .families import Family, backbone_path, family_of, is_parallel

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Site:
    """One place of a model."""

    name: str
    module_path: str
    kind: str
    """stream (a tensor [B, T, D]), linear (a layer that can be swapped) or attention."""
    where: str
    """Of the module at `module_path`: its input or its output."""
    d: int
    """Width D of the tensor; for linear layers, of their output."""
    part: str = ""
    """q, k or v of a fused projection."""
    adds: str = ""
    """For resid_mid: the module whose output, added to the stream, makes it."""


_LENS = [
    (r"hook_embed", "embed"), (r"ln_final\.hook_normalized", "final_norm"),
    (r"blocks\.(\d+)\.hook_resid_(pre|mid|post)", r"layers.\1.resid_\2"),
    (r"blocks\.(\d+)\.attn\.hook_([qkvz])", r"layers.\1.attn.\2"),
    (r"blocks\.(\d+)\.hook_(attn|mlp)_out", r"layers.\1.\2.out"),
    (r"blocks\.(\d+)\.mlp\.hook_post", r"layers.\1.mlp.hidden"),
    (r"blocks\.(\d+)\.ln1\.hook_normalized", r"layers.\1.attn.in"),
    (r"blocks\.(\d+)\.ln2\.hook_normalized", r"layers.\1.mlp.in"),
]


def _canonical(name: str) -> str:
    for pattern, canonical in _LENS:
        if match := re.fullmatch(pattern, name):
            return match.expand(canonical)
    return name


def _out_features(module: nn.Module) -> int:
    return module.nf if type(module).__name__ == "Conv1D" else module.out_features  # type: ignore[return-value]


def _in_features(module: nn.Module) -> int:
    return module.weight.shape[0] if type(module).__name__ == "Conv1D" else module.in_features  # type: ignore[return-value]


def _layer_sites(model: nn.Module, family: Family, n: int, path: str) -> Iterator[Site]:
    hidden = model.config.hidden_size
    at = f"layers.{n}"
    yield Site(f"{at}.resid_pre", path, "stream", "input", hidden)
    linears = {}
    for name, inner in family.linears.items():
        with contextlib.suppress(AttributeError):
            linears[name] = model.get_submodule(f"{path}.{inner}")
    for name, spec in family.streams.items():
        if name == "resid_mid" and is_parallel(model, family):
            continue
        where = "input" if spec[-1] == "<" else "output"
        adds = f"{path}.{family.mid_adds}" if name == "resid_mid" and family.mid_adds else ""
        yield Site(f"{at}.{name}", f"{path}.{spec[:-1]}", "stream", where, hidden, adds=adds)
    for part in "qkv":
        if f"{part}_proj" in linears:
            yield Site(f"{at}.attn.{part}", f"{path}.{family.linears[f'{part}_proj']}", "stream", "output", _out_features(linears[f"{part}_proj"]))
        elif "qkv_proj" in linears:
            yield Site(f"{at}.attn.{part}", f"{path}.{family.linears['qkv_proj']}", "stream", "output", _out_features(linears["qkv_proj"]) // 3, part)
    yield Site(f"{at}.attn.z", f"{path}.{family.linears['o_proj']}", "stream", "input", _in_features(linears["o_proj"]))
    yield Site(f"{at}.attn", f"{path}.{family.attn}", "attention", "output", hidden)
    if "down_proj" in linears:
        yield Site(f"{at}.mlp.hidden", f"{path}.{family.linears['down_proj']}", "stream", "input", _in_features(linears["down_proj"]))
    for name, module in linears.items():
        yield Site(f"{at}.{name}", f"{path}.{family.linears[name]}", "linear", "output", _out_features(module))
    yield Site(f"{at}.resid_post", path, "stream", "output", hidden)


def all_sites(model: nn.Module) -> dict[str, Site]:
    """Every canonical site of a model, in the order they are reached."""
    family = family_of(model)
    base = backbone_path(model, family)
    prefix = f"{base}." if base else ""
    hidden = model.config.hidden_size
    found = [Site("embed", prefix + family.embed, "stream", "output", hidden)]
    stack = model.get_submodule(prefix + family.layers)
    for n in range(len(stack)):  # type: ignore[arg-type]
        found += _layer_sites(model, family, n, f"{prefix}{family.layers}.{n}")
    modules = dict(model.named_modules())
    if family.final_norm and prefix + family.final_norm in modules:
        found.append(Site("final_norm", prefix + family.final_norm, "stream", "output", hidden))
    head = modules.get(family.head)
    if head is not None:
        width = _out_features(head) if hasattr(head, "out_features") else getattr(model.config, "vocab_size", hidden)
        found.append(Site("logits", family.head, "stream", "output", width))
    return {site.name: site for site in found}


def sites(model: nn.Module, pattern: str = "*") -> dict[str, Site]:
    """Sites that a name, alias, glob or raw module path names.

    Raises:
        BadInput: nothing matches; lists the nearest names.
        Unsupported: the name is right but this model has no such place, with the reason.
    """
    pattern = _canonical(pattern)
    modules = dict(model.named_modules())
    try:
        known = all_sites(model)
    except Unsupported:
        if pattern not in modules:
            raise
        known = {}
    if pattern in known:
        return {pattern: known[pattern]}
    if any(c in pattern for c in "*?["):
        found = {name: site for name, site in known.items() if fnmatchcase(name, pattern)}
        if found:
            return found
    elif pattern in modules:
        width = getattr(modules[pattern], "out_features", getattr(getattr(model, "config", None), "hidden_size", 0))
        return {pattern: Site(pattern, pattern, "stream", "output", width)}
    _refuse(model, pattern, known)
    raise AssertionError


def _refuse(model: nn.Module, pattern: str, known: Mapping[str, Site]) -> None:
    family = family_of(model)
    layers = sum(name.endswith(".resid_post") for name in known)
    if match := re.match(r"layers\.(\d+)\.", pattern):
        if int(match[1]) >= layers:
            raise BadInput(f"no site {pattern!r}: this model has layers 0..{layers - 1}")
    if pattern.endswith(".resid_mid") and is_parallel(model, family):
        raise Unsupported(f"{pattern}: attention and MLP of this model run in parallel, so no stream lies between them; use resid_pre or resid_post")
    if family.name == "moe" and re.search(r"(gate|up|down)_proj$|mlp\.hidden$", pattern):
        raise Unsupported(f"{pattern}: this model's experts are fused into one tensor a layer, with no linear layer to replace; use mlp.out")
    near = difflib.get_close_matches(pattern, known, n=4, cutoff=0.5)
    raise BadInput(f"no site matches {pattern!r}; {'near: ' + ', '.join(near) if near else 'examples: layers.0.resid_post, layers.*.mlp.out'} (`rarefy sites MODEL` lists all)")


# ------------------------------------------------------------------------------------- tensors in, tensors out


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
    return (model.config.num_attention_heads, family_of(model).qkv) if site.part else (0, "")


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
        names: site names, aliases or globs of stream sites.
        inputs: what the model takes, such as input_ids [B, T] and attention_mask.

    Returns:
        canonical name -> tensor [B, T, D], detached unless `grad`.
    """
    wanted: dict[str, Site] = {}
    for name in names:
        wanted.update(sites(model, name))
    wrong = [s.name for s in wanted.values() if s.kind == "attention"]
    if wrong:
        raise Unsupported(f"{wrong[0]} is the attention itself, not a tensor; read {wrong[0]}.z or {wrong[0]}.out")
    got: dict[str, Tensor] = {}
    handles = []

    def take(site: Site, value: Tensor) -> None:
        if site.part:
            value = _split(site, value, *_layout(model, site))
        if value.ndim == 2 and "input_ids" in inputs:          # OPT flattens its MLP's input
            value = value.unflatten(0, inputs["input_ids"].shape)
        got[site.name] = value if grad else value.detach()
        if len(got) == len(wanted):
            raise _Enough

    for site in wanted.values():
        module = model.get_submodule(site.module_path)
        if site.where == "input":
            handles.append(module.register_forward_pre_hook(lambda m, a, k, s=site: take(s, _input(a, k)), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(lambda m, a, o, s=site: take(s, _first(o))))
    if hasattr(model.config, "use_cache"):
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


def _batched(new: Map) -> Map:
    """`new`, given [1, N, D] where a model works on flattened rows [N, D] (OPT's MLP)."""
    return lambda value: new(value[None])[0] if value.ndim == 2 else new(value)


def _hook_stream(model: nn.Module, site: Site, new: Map, handles: list[Any]) -> None:
    new = _batched(new)
    module = model.get_submodule(site.module_path)
    if site.adds:
        _hook_between(model, site, new, handles)
    elif site.where == "input":
        def before(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            value = new(_input(args, kwargs))
            return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": value})

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    else:
        def after(m: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            old = _first(output)
            if not site.part:
                return _with_first(output, new(old))
            heads, layout = _layout(model, site)
            return _join(site, old, new(_split(site, old, heads, layout)), heads, layout)

        handles.append(module.register_forward_hook(after))


def _hook_between(model: nn.Module, site: Site, new: Map, handles: list[Any]) -> None:
    """resid_mid is a sum kept by no module: change the summand by what the new value changes, so that identity is exact."""
    layer = model.get_submodule(site.module_path.rpartition(".")[0])
    stream: list[Tensor] = []

    def note(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream[:] = [_input(args, kwargs)]

    def change(m: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        summand = _first(output)
        middle = stream[0].view_as(summand) + summand
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
            sites a module; `layers.N.attn` an attention method.
        attention: instead of a plan: catalogue name below attention/, for every layer, with its arguments
            (`replaced(model, attention="quest", budget=0.25)`).

    Raises:
        BadInput, Unsupported: before anything is changed.
    """
    if attention:
        from .catalogue import entry

        cls = entry(f"attention/{attention.removeprefix('attention/')}").load()
        plan = {**(plan or {}), "layers.*.attn": cls(**arguments).eval()}
    elif arguments:
        raise BadInput(f"replaced() got {', '.join(arguments)} without attention=NAME")
    where: dict[str, tuple[Site, Any]] = {}
    for name, new in (plan or {}).items():
        where.update({s.name: (s, new) for s in sites(model, name).values()})
    for site, new in where.values():
        _check(site, new)
    handles: list[Any] = []
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    heads = {s.module_path: (s.name, new) for s, new in where.values() if s.kind == "attention"}
    try:
        with attached(model, heads) if heads else contextlib.nullcontext():
            for site, new in where.values():
                if site.kind == "stream":
                    _hook_stream(model, site, new, handles)
                elif site.kind == "linear":
                    parent, _, leaf = site.module_path.rpartition(".")
                    owner = model.get_submodule(parent)
                    swapped.append((owner, leaf, getattr(owner, leaf)))
                    setattr(owner, leaf, new)
            yield model
    finally:
        for handle in handles:
            handle.remove()
        for owner, leaf, old in reversed(swapped):
            setattr(owner, leaf, old)


def _check(site: Site, new: Any) -> None:
    if site.kind == "linear" and not isinstance(new, nn.Module):
        raise BadInput(f"{site.name}: a linear layer is replaced by a module, not by a {type(new).__name__}")
    if site.kind == "attention" and not hasattr(new, "attend"):
        raise BadInput(f"{site.name}: give an attention method (it has `attend`), not a {type(new).__name__}")
    if not callable(new):
        raise BadInput(f"{site.name}: a {type(new).__name__} is not callable")
