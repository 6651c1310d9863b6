"""Names for the places of a model.

Canonical names: embed, layers.N.resid_pre | resid_mid | resid_post, layers.N.attn.{in,q,k,v,z,out}, layers.N.attn (the
attention itself), layers.N.mlp.{in,hidden,out}, layers.N.{q,k,v,o,qkv,gate,up,down}_proj (linear layers), final_norm,
logits (the head's output; Gemma 2 caps it afterwards). TransformerLens hook names and raw module paths are understood
too, and globs over canonical names. A raw path is the output of that module.

Shape letters: B = batch, T = tokens, D = width.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from weakref import WeakKeyDictionary

from torch import nn

from .errors import BadInput, Unsupported
from .families import Family, backbone_path, config_of, family_of, why_no_middle


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
    (r"blocks\.(\d+|\*)\.hook_resid_(pre|mid|post)", r"layers.\1.resid_\2"),
    (r"blocks\.(\d+|\*)\.attn\.hook_([qkvz])", r"layers.\1.attn.\2"),
    (r"blocks\.(\d+|\*)\.hook_(attn|mlp)_out", r"layers.\1.\2.out"),
    (r"blocks\.(\d+|\*)\.mlp\.hook_post", r"layers.\1.mlp.hidden"),
    (r"blocks\.(\d+|\*)\.ln1\.hook_normalized", r"layers.\1.attn.in"),
    (r"blocks\.(\d+|\*)\.ln2\.hook_normalized", r"layers.\1.mlp.in"),
]


def _canonical(name: str) -> str:
    for pattern, canonical in _LENS:
        if match := re.fullmatch(pattern, name):
            return match.expand(canonical)
    return name


dense_of: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
"""Module in a linear layer's place -> that layer: what stands in need not know its widths."""


def _out_features(module: nn.Module) -> int:
    module = dense_of.get(module, module)
    return module.nf if type(module).__name__ == "Conv1D" else module.out_features  # type: ignore[return-value]


def _in_features(module: nn.Module) -> int:
    module = dense_of.get(module, module)
    return module.weight.shape[0] if type(module).__name__ == "Conv1D" else module.in_features  # type: ignore[return-value]


def _width(module: nn.Module, otherwise: int) -> int:
    """Width of the output of any module that says it."""
    module = dense_of.get(module, module)
    for name in ("out_features", "nf", "embedding_dim"):
        if isinstance(width := getattr(module, name, None), int):
            return width
    return otherwise


def _layer_sites(model: nn.Module, family: Family, n: int, path: str) -> Iterator[Site]:
    hidden = config_of(model).hidden_size
    at = f"layers.{n}"
    yield Site(f"{at}.resid_pre", path, "stream", "input", hidden)
    linears = {}
    for name, inner in family.linears.items():
        with contextlib.suppress(AttributeError):
            linears[name] = model.get_submodule(f"{path}.{inner}")
    streams = {}
    for name, spec in family.streams.items():
        where = "input" if spec[-1] == "<" else "output"
        adds = f"{path}.{family.mid_adds}" if name == "resid_mid" and family.mid_adds else ""
        streams[name] = Site(f"{at}.{name}", f"{path}.{spec[:-1]}", "stream", where, hidden, adds=adds)
    yield streams["attn.in"]
    for part in "qkv":
        if f"{part}_proj" in linears:
            yield Site(f"{at}.attn.{part}", f"{path}.{family.linears[f'{part}_proj']}", "stream", "output", _out_features(linears[f"{part}_proj"]))
        elif "qkv_proj" in linears:
            yield Site(f"{at}.attn.{part}", f"{path}.{family.linears['qkv_proj']}", "stream", "output", _out_features(linears["qkv_proj"]) // 3, part)
    yield Site(f"{at}.attn.z", f"{path}.{family.linears['o_proj']}", "stream", "input", _in_features(linears["o_proj"]))
    yield Site(f"{at}.attn", f"{path}.{family.attn}", "attention", "output", hidden)
    yield streams["attn.out"]
    if "resid_mid" in streams and not why_no_middle(model, family):
        yield streams["resid_mid"]
    yield streams["mlp.in"]
    if "down_proj" in linears:
        yield Site(f"{at}.mlp.hidden", f"{path}.{family.linears['down_proj']}", "stream", "input", _in_features(linears["down_proj"]))
    yield streams["mlp.out"]
    for name, module in linears.items():
        yield Site(f"{at}.{name}", f"{path}.{family.linears[name]}", "linear", "output", _out_features(module))
    yield Site(f"{at}.resid_post", path, "stream", "output", hidden)


def all_sites(model: nn.Module) -> dict[str, Site]:
    """Every canonical site of a model, in the order they are reached."""
    family = family_of(model)
    base = backbone_path(model, family)
    prefix = f"{base}." if base else ""
    hidden = config_of(model).hidden_size
    found = [Site("embed", prefix + family.embed, "stream", "output", _width(model.get_submodule(prefix + family.embed), hidden))]
    stack = model.get_submodule(prefix + family.layers)
    for n in range(len(stack)):  # type: ignore[arg-type]
        found += _layer_sites(model, family, n, f"{prefix}{family.layers}.{n}")
    modules = dict(model.named_modules())
    if family.final_norm and prefix + family.final_norm in modules:
        found.append(Site("final_norm", prefix + family.final_norm, "stream", "output", hidden))
    head = modules.get(family.head)
    if head is not None:
        width = _width(head, getattr(config_of(model), "vocab_size", hidden))
        found.append(Site("logits", family.head, "stream", "output", width))
    return {site.name: site for site in found}


def known_sites(model: nn.Module) -> dict[str, Site]:
    """all_sites, or nothing for a model that has no row in the table."""
    try:
        family_of(model)
    except Unsupported:
        return {}
    return all_sites(model)


def sites(model: nn.Module, pattern: str = "*") -> dict[str, Site]:
    """Sites that a name, alias, glob or raw module path names.

    Raises:
        BadInput: nothing matches; lists the nearest names.
        Unsupported: the name is right but this model has no such place, with the reason.
    """
    return sites_of(model, [pattern])[0]


def sites_of(model: nn.Module, patterns: Iterable[str]) -> list[dict[str, Site]]:
    """`sites` of each pattern, walking the model once."""
    known, modules = known_sites(model), dict(model.named_modules())
    return [_find(model, _canonical(pattern), known, modules) for pattern in patterns]


def _find(model: nn.Module, pattern: str, known: Mapping[str, Site], modules: Mapping[str, nn.Module]) -> dict[str, Site]:
    if not known and pattern not in modules:
        family_of(model)
    if pattern in known:
        return {pattern: known[pattern]}
    if any(c in pattern for c in "*?["):
        found = {name: site for name, site in known.items() if fnmatchcase(name, pattern)}
        _refuse_experts(model, pattern, known)
        if found:
            return found
    elif pattern and pattern in modules:
        width = _width(modules[pattern], getattr(getattr(model, "config", None), "hidden_size", 0))
        return {pattern: Site(pattern, pattern, "stream", "output", width)}
    _refuse(model, pattern, known)
    raise AssertionError


def _refuse_experts(model: nn.Module, pattern: str, known: Mapping[str, Site]) -> None:
    """A name or glob of the MLP's inside that meets a layer of experts; a glob must not pass over it in silence."""
    if not known or family_of(model).name != "moe" or not (leaf := re.search(r"(gate_proj|up_proj|down_proj|mlp\.hidden)$", pattern)):
        return
    for n in range(sum(name.endswith(".resid_post") for name in known)):
        name = f"layers.{n}.{leaf[1]}"
        if name not in known and fnmatchcase(name, pattern):
            raise Unsupported(f"{name}: the experts of this layer are fused into one tensor, with no linear layer to replace; use layers.{n}.mlp.out")


def _refuse(model: nn.Module, pattern: str, known: Mapping[str, Site]) -> None:
    family = family_of(model)
    layers = sum(name.endswith(".resid_post") for name in known)
    if match := re.match(r"layers\.(\d+)\.", pattern):
        if int(match[1]) >= layers:
            raise BadInput(f"no site {pattern!r}: this model has layers 0..{layers - 1}")
    if pattern.endswith(".resid_mid") and (reason := why_no_middle(model, family)):
        raise Unsupported(f"{pattern}: {reason}; use resid_pre or resid_post")
    _refuse_experts(model, pattern, known)
    near = difflib.get_close_matches(pattern, known, n=4, cutoff=0.5)
    hint = f"near: {', '.join(near)}" if near else "examples: layers.0.resid_post, layers.*.mlp.out"
    raise BadInput(f"no site matches {pattern!r}; {hint} (`rarefy sites MODEL` lists all)")


def refuse_shared(model: nn.Module, found: Iterable[Site]) -> None:
    """Raise Unsupported for a module used at several places: a hook or a swap at a module that several places share would act at all of them."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    for site in found:
        same = paths.get(id(model.get_submodule(site.module_path)), [])
        if len(same) > 1:
            raise Unsupported(f"{site.name}: {', '.join(same[:3])} are the same module, used more than once; no single use of it can be reached")
