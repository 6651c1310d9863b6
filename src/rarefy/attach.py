"""Attention methods inside Hugging Face models, through transformers' own attention interface.

The interface is entered under a private name for the length of a `with` block, together with a mask function: without
one, transformers drops the padding mask of custom attention without a word.

A method may ask for more than queries, keys and values by naming it in its `wants`: "hidden" (hidden_BTD, what the
attention module was given), "cache" (cache: the layer's cache, if it is one of rarefy's, else None), "positions"
(position_ids [B or 1, T]) and "rotary" (rotary: the (cos, sin) [B or 1, T, R] of these queries, or None in a model that
does not rotate). They come by keyword.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width, R = rotated width.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .errors import BadInput, Unsupported

EXTRAS = ("hidden", "cache", "positions", "rotary")
"""What a method's `wants` may name."""

layer_of_keys: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Key tensor that a cache's `update` returned -> the layer that returned it: this is how the router finds a layer's cache."""

_numbers = itertools.count()
_routers: dict[str, _Router] = {}
"""The routers that are registered now, by their key."""

UNCOMPILED = "rarefy's attention methods choose keys by what they hold, which no graph can: compile without fullgraph=True"

SHUT = -1e4
"""A float mask with this or less at a key hides it; with anything between that and zero, or above, it weighs keys."""

FOREIGN = {
    "sliding_window": "attends within a sliding window already", "softcap": "caps its attention logits", "position_bias": "adds a bias to its logits",
    "s_aux": "has a learned sink in its softmax", "head_mask": "is given a mask of heads",
}
"""What a layer may have, or a call pass to its attention, that would change the result, and no method here computes."""


def _refusals(name: str, module: nn.Module) -> None:
    # Mistral and Mixtral pass their config's window at each call; elsewhere it is the module's own.
    everywhere = getattr(module.config, "sliding_window", None) if getattr(module.config, "layer_types", None) is None else None
    _refuse_foreign(name, {
        "sliding_window": getattr(module, "sliding_window", everywhere), "s_aux": getattr(module, "sinks", None),
        "softcap": getattr(module, "attn_logit_softcapping", None) or getattr(module, "softcap", None),
    })
    if getattr(module, "is_cross_attention", False):
        raise Unsupported(f"{name}: cross attention is not served")


def _refuse_foreign(name: str, given: Mapping[str, Any]) -> None:
    for what, does in FOREIGN.items():
        value = given.get(what)
        if isinstance(value, Tensor) or value:
            raise Unsupported(f"{name}: this layer {does} ({what}), which no method here computes; leave it out of the plan")


def _open(name: str, mask: Tensor) -> Tensor:
    """Where a mask [B, 1, T, S] lets a query see a key, as bool; refuses one that weighs keys or that differs from head to head."""
    if mask.is_floating_point():
        shut = mask <= SHUT
        if not bool((shut | (mask == 0)).all()):
            raise Unsupported(f"{name}: the mask adds a bias to the logits, which is not served; pass zeros where a key is seen and -inf elsewhere")
        mask = ~shut
    elif mask.dtype != torch.bool:
        raise Unsupported(f"{name}: the mask is {mask.dtype}; pass a boolean one or [B, S] of ones and zeros")
    if mask.shape[1] > 1 and not torch.equal(mask, mask[:, :1].expand_as(mask)):
        raise Unsupported(f"{name}: the mask differs from head to head; leave it to the method which keys a head sees")
    return mask[:, 0]


def _padding(name: str, mask: Tensor, causal: bool, B: int, T: int, S: int) -> Tensor | None:
    """Real keys [B, S] of a mask [B or 1, H or 1, T, S], None where all are; refuses a mask that is more than causal and padding."""
    if mask.ndim != 4 or mask.shape[2:] != (T, S) or mask.shape[0] not in (1, B):
        raise Unsupported(f"{name}: the mask is {list(mask.shape)} for {B} rows of {T} queries and {S} keys; pass [B, 1, T, S] or [B, S]")
    open_BTS = _open(name, mask).expand(B, T, S)
    real_BS = open_BTS.any(1)
    expected = real_BS[:, None, :]
    if causal:
        at_T = torch.arange(S - T, S, device=mask.device)
        expected = expected & (torch.arange(S, device=mask.device) <= at_T[:, None])
    # A padded query may be masked in any way: nobody reads its output.
    rows = real_BS[:, S - T :] if causal or T == S else torch.ones_like(real_BS[:, :1]).expand(-1, T)
    if not torch.equal(open_BTS & rows[..., None], expected & rows[..., None]):
        raise Unsupported(
            f"{name}: the mask is more than causal and padding (packed sequences, a static cache or a prefix); pass plain padded batches"
        )
    return None if bool(real_BS.all()) else real_BS


class _Router:
    """The attention function that transformers calls: modules of the plan go to their methods, others to dense."""

    def __init__(self, key: str, methods: Mapping[int, tuple[str, Any, int]], before: dict[int, str]) -> None:
        self.key, self.methods = key, methods
        self.before = before
        """Of each config, by id: the attention it named when this router came."""
        self.given: dict[int, dict[str, Any]] = {}
        """Of each module of the plan that is at work: what it was called with."""
        self._mask: Tensor | None = None
        """The last mask, what it was checked as, and its real keys: every layer of a pass is given the same one."""
        self._checked: tuple[Any, Tensor | None] = (None, None)
        self._turn, self._whose = threading.Lock(), 0
        """Held by the thread whose pass it is. A pass that is broken off leaves it held, for that thread's next one."""

    def take_turns(self, model: nn.Module) -> list[Any]:
        """One pass through the model at a time: methods, and this router, hold what they need from layer to layer."""

        @torch.compiler.disable(reason=UNCOMPILED)
        def enter(m: nn.Module, args: tuple[Any, ...]) -> None:
            if self._whose != threading.get_ident():
                self._turn.acquire()
                self._whose = threading.get_ident()

        @torch.compiler.disable(reason=UNCOMPILED)
        def leave(m: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._whose == threading.get_ident():
                self._whose = 0
                self._turn.release()

        return [model.register_forward_pre_hook(enter, prepend=True), model.register_forward_hook(leave, always_call=True)]

    def watch(self, model: nn.Module, path: str, name: str) -> Any:
        """Note what the module is called with, and refuse calls that would go past the method or that it cannot serve."""
        module: Any = model.get_submodule(path)
        config, layers = module.config, [above for above in _above(model, path) if hasattr(above, "gradient_checkpointing")]

        def before(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if m is not module:
                raise Unsupported(f"{name}: this copy of a model was made with methods in it (deepcopy, DataParallel); copy it outside `replaced`")
            if (now := config._attn_implementation) not in _routers:
                raise Unsupported(f"{name}: attention was set to {now!r} inside `replaced`, which would leave the plan out; set it before")
            if any(_reentrant(layer) for layer in layers):
                raise Unsupported(f"{name}: reentrant gradient checkpointing may compute the layer again after `replaced`; pass use_reentrant=False")
            _refuse_static(name, m, kwargs.get("past_key_values", kwargs.get("layer_past")))     # GPT-NeoX has the other name
            self.given[id(m)] = {"hidden": args[0] if args else kwargs.get("hidden_states"), "rotary": kwargs.get("position_embeddings")}

        return module.register_forward_pre_hook(before, with_kwargs=True)

    @torch.compiler.disable(reason=UNCOMPILED)
    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
        scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:
        layer = layer_of_keys.get(key)
        alone = getattr(layer, "attends", False)
        if id(module) not in self.methods:
            if alone:
                raise Unsupported(f"{layer} attends for itself, but a layer of this model is outside its plan; serve every layer (cache.on(model))")
            return self._dense(module)(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
            )
        name, method, number = self.methods[id(module)]
        given = self.given.pop(id(module), {})
        if alone and not getattr(method, "serves_cache", False):
            raise Unsupported(f"{name}: {layer} attends for itself and bars other methods of attention; use rarefy.attention.cache.Cache")
        _refuse_call(name, dropout, kwargs)
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        (B, _, T, D), S = query.shape, layer.get_seq_length() if alone and layer is not None else key.shape[2]
        padding_BS = self._real(name, attention_mask, causal, B, T, S)
        extras = {
            "hidden": lambda: {"hidden_BTD": given.get("hidden")}, "rotary": lambda: {"rotary": given.get("rotary")},
            "cache": lambda: {"cache": layer}, "positions": lambda: {"position_ids": _positions(kwargs.get("position_ids"), padding_BS, T, S, query)},
        }
        more: dict[str, Any] = {}
        for wanted in getattr(method, "wants", ()):
            more |= extras[wanted]()
        out_BHTD = method.attend(
            query, key, value, scale=D**-0.5 if scaling is None else scaling, causal=causal, padding_BS=padding_BS, layer=number, **more
        )
        return out_BHTD.transpose(1, 2).contiguous(), None

    def _real(self, name: str, mask: Tensor | None, causal: bool, B: int, T: int, S: int) -> Tensor | None:
        """`_padding`, once for a mask that several layers are given in turn and nobody wrote to in between."""
        if mask is None:
            return None
        asked = None if mask.is_inference() else (mask._version, causal, B, T, S)      # what was made in inference mode counts no writes
        if mask is not self._mask or asked is None or asked != self._checked[0]:
            self._checked, self._mask = (asked, _padding(name, mask, causal, B, T, S)), mask
        return self._checked[1]

    def _dense(self, module: nn.Module) -> Any:
        """transformers' sdpa attention, or an outer context's router: its plan still holds for what this one leaves alone."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return _routers.get(self.before.get(id(module.config), ""), sdpa_attention_forward)

    def leave(self, configs: Mapping[int, Any]) -> None:
        """Give each config its attention back; where another router came later, let that one hand on to what stood here before."""
        del _routers[self.key]
        for i, config in configs.items():
            later = [r for r in _routers.values() if r.before.get(i) == self.key]
            for router in later:
                router.before[i] = self.before[i]
            if not later:
                config._attn_implementation_internal = self.before[i]


def _above(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules that a path leads through, from the model to the one it names."""
    names = path.split(".")
    return [model.get_submodule(".".join(names[:n])) for n in range(len(names) + 1)]


def _reentrant(layer: Any) -> bool:
    """Whether a layer of transformers' is checkpointed in the way that does not notice when it is computed differently the second time."""
    how = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
    return layer.gradient_checkpointing and layer.training and how.get("use_reentrant", True)


def _refuse_static(name: str, module: nn.Module, held: Any) -> None:
    """Refuse a cache of fixed length: its keys outnumber the real ones."""
    layers = getattr(getattr(held, "self_attention_cache", held), "layers", ())
    at = getattr(module, "layer_idx", None) or 0
    if at < len(layers) and getattr(layers[at], "is_compileable", False):
        raise Unsupported(f"{name}: a static cache holds keys that are not there yet; use a cache that grows (DynamicCache or rarefy's)")


def _refuse_call(name: str, dropout: float, kwargs: Mapping[str, Any]) -> None:
    """Refuse what a call asks for besides attention by queries and keys."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        raise Unsupported(f"{name}: a choice of keys by what they hold cannot be exported or traced; export the model without its methods")
    if dropout:
        raise Unsupported(f"{name}: attention dropout is on; call model.eval() first")
    if kwargs.get("output_attentions"):
        raise Unsupported(f"{name}: a method forms no matrix of attention for output_attentions=True to return; leave that, or this layer, out")
    _refuse_foreign(name, kwargs)


def _positions(given: Tensor | None, padding_BS: Tensor | None, T: int, S: int, like: Tensor) -> Tensor:
    """[B or 1, T]: the model's own positions, or, where it keeps them to itself, a count of real tokens."""
    if given is not None:
        return given
    if padding_BS is None:
        return torch.arange(S - T, S, device=like.device)[None]
    return (padding_BS.long().cumsum(1) - 1).clamp_min(0)[:, S - T :]


def _one_device(name: str, module: nn.Module, method: Any) -> None:
    """Raise BadInput for a method whose tensors are elsewhere than the layer; layers that are loaded as they are needed (meta) have no place yet."""
    here = {t.device for t in module.parameters()} - {torch.device("meta")}
    if len(here) != 1 or not isinstance(method, nn.Module):
        return
    (device,) = here
    for what, tensor in (*method.named_parameters(), *method.named_buffers()):
        if tensor.device != device:
            raise BadInput(f"{name} is on {device} and the method's {what} on {tensor.device}: move it with method.to({str(device)!r})")


@contextlib.contextmanager
def attached(model: nn.Module, plan: Mapping[str, tuple[str, Any]]) -> Iterator[None]:
    """Route the attention modules of `plan` (module path -> (site name, method)) to their methods.

    Modules outside the plan run transformers' sdpa attention. Configs and registries are restored on the way out, in whatever order several
    such contexts of one model end. Threads take turns, a pass each.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if not (getattr(model, "_supports_sdpa", False) or getattr(model, "_supports_attention_backend", False)):
        raise Unsupported(f"{type(model).__name__} does not take its attention from transformers' attention interface")
    methods: dict[int, tuple[str, Any, int]] = {}
    configs: dict[int, Any] = {}
    for path, (name, method) in plan.items():
        module = model.get_submodule(path)
        _refusals(name, module)
        _one_device(name, module, method)
        if unknown := set(getattr(method, "wants", ())) - set(EXTRAS):
            raise Unsupported(f"{name}: the method wants {', '.join(sorted(unknown))}; the router has {', '.join(EXTRAS)}")
        methods[id(module)] = (name, method, int(name.split(".")[1]))      # layers.N.attn; modules of encoders do not know their number
        # A mask is made by whoever runs the layers, from a config of its own.
        configs |= {id(above.config): above.config for above in _above(model, path) if hasattr(above, "config")}
    key = f"rarefy-{next(_numbers)}"
    router = _routers[key] = _Router(key, methods, {i: c._attn_implementation_internal for i, c in configs.items()})
    hooks = [*router.take_turns(model), *(router.watch(model, path, name) for path, (name, _) in plan.items())]
    ALL_ATTENTION_FUNCTIONS.register(key, router)
    ALL_MASK_ATTENTION_FUNCTIONS.register(key, sdpa_mask)
    try:
        for config in configs.values():
            config._attn_implementation_internal = key
        yield
    finally:
        for hook in hooks:
            hook.remove()
        router.leave(configs)
        type(ALL_ATTENTION_FUNCTIONS)._global_mapping.pop(key, None)
        type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping.pop(key, None)
