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
_names: set[str] = set()
"""Keys that are registered now."""


def _refusals(name: str, module: nn.Module) -> None:
    # Mistral and Mixtral pass their config's window at each call; elsewhere it is the module's own.
    everywhere = getattr(module.config, "sliding_window", None) if getattr(module.config, "layer_types", None) is None else None
    if getattr(module, "sliding_window", everywhere):
        raise Unsupported(f"{name}: this layer attends within a sliding window already; leave it out of the plan")
    if getattr(module, "attn_logit_softcapping", None) or getattr(module, "softcap", None):
        raise Unsupported(f"{name}: this layer caps its attention logits, which block attention does not do; leave it out")
    if getattr(module, "is_cross_attention", False):
        raise Unsupported(f"{name}: cross attention is not served")
    if isinstance(getattr(module, "sinks", None), Tensor):
        raise Unsupported(f"{name}: this layer has a learned sink in its softmax, which no method here computes; leave it out of the plan")


def _padding(name: str, mask: Tensor | None, causal: bool, T: int, S: int) -> Tensor | None:
    """Real keys [B, S] of a boolean mask [B, 1, T, S]; refuses a mask that is more than causal and padding."""
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        mask = mask == 0
    if mask.shape[-1] != S:
        raise Unsupported(f"{name}: the mask covers {mask.shape[-1]} keys but there are {S}")
    real_BS = mask[:, 0, -1]
    expected = real_BS[:, None, :]
    if causal:
        at_T = torch.arange(S - T, S, device=mask.device)
        expected = expected & (torch.arange(S, device=mask.device) <= at_T[:, None])
    # A padded query may be masked in any way: nobody reads its output.
    rows = real_BS[:, S - T :] if causal else torch.ones_like(real_BS[:, :1]).expand(-1, T)
    if not torch.equal(mask[:, 0] & rows[..., None], expected & rows[..., None]):
        raise Unsupported(
            f"{name}: the mask is more than causal and padding (packed sequences, a static cache or a prefix); pass plain padded batches"
        )
    return None if bool(real_BS.all()) else real_BS


class _Router:
    """The attention function that transformers calls: modules of the plan go to their methods, others to dense."""

    def __init__(self, methods: Mapping[int, tuple[str, Any]], before: Mapping[int, str]) -> None:
        self.methods, self.before = methods, before
        self.given: dict[int, dict[str, Any]] = {}
        """Of each module of the plan that is at work: what it was called with."""
        self._checked: tuple[Tensor | None, Tensor | None] = (None, None)
        """The last mask and its real keys: every layer of a pass is given the same mask."""

    def watch(self, module: nn.Module, name: str) -> Any:
        """Note what the module is called with, and refuse a cache of fixed length: its keys outnumber the real ones."""

        def before(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            held = kwargs.get("past_key_values", kwargs.get("layer_past"))     # GPT-NeoX has the other name
            layers = getattr(getattr(held, "self_attention_cache", held), "layers", ())
            at = getattr(m, "layer_idx", None) or 0
            if at < len(layers) and getattr(layers[at], "is_compileable", False):
                raise Unsupported(f"{name}: a static cache holds keys that are not there yet; use a cache that grows (DynamicCache or rarefy's)")
            self.given[id(m)] = {"hidden": args[0] if args else kwargs.get("hidden_states"), "rotary": kwargs.get("position_embeddings")}

        return module.register_forward_pre_hook(before, with_kwargs=True)

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
        name, method = self.methods[id(module)]
        given = self.given.pop(id(module), {})
        if alone and not getattr(method, "serves_cache", False):
            raise Unsupported(f"{name}: {layer} attends for itself and bars other methods of attention; use rarefy.attention.cache.Cache")
        if dropout:
            raise Unsupported(f"{name}: attention dropout is on; call model.eval() first")
        if kwargs.get("sliding_window") or kwargs.get("softcap"):
            raise Unsupported(f"{name}: sliding windows and capped logits are not served; leave this layer out")
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        T, S = query.shape[2], layer.get_seq_length() if alone and layer is not None else key.shape[2]
        if attention_mask is not None and self._checked[0] is not attention_mask:
            self._checked = (attention_mask, _padding(name, attention_mask, causal, T, S))
        padding_BS = None if attention_mask is None else self._checked[1]
        extras = {
            "hidden": lambda: {"hidden_BTD": given.get("hidden")}, "rotary": lambda: {"rotary": given.get("rotary")},
            "cache": lambda: {"cache": layer}, "positions": lambda: {"position_ids": _positions(kwargs.get("position_ids"), padding_BS, T, S, query)},
        }
        more: dict[str, Any] = {}
        for wanted in getattr(method, "wants", ()):
            more |= extras[wanted]()
        out_BHTD = method.attend(
            query, key, value, scale=query.shape[-1] ** -0.5 if scaling is None else scaling, causal=causal,
            padding_BS=padding_BS, layer=getattr(module, "layer_idx", 0) or 0, **more,
        )
        return out_BHTD.transpose(1, 2).contiguous(), None

    def _dense(self, module: nn.Module) -> Any:
        """transformers' sdpa attention, or an outer context's router: its plan still holds for what this one leaves alone."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        outer = self.before.get(id(module.config), "")
        return ALL_ATTENTION_FUNCTIONS[outer] if outer in _names else sdpa_attention_forward


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

    Modules outside the plan run transformers' sdpa attention. Configs and registries are restored on the way out.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if not (getattr(model, "_supports_sdpa", False) or getattr(model, "_supports_attention_backend", False)):
        raise Unsupported(f"{type(model).__name__} does not take its attention from transformers' attention interface")
    methods: dict[int, tuple[str, Any]] = {}
    configs: dict[int, Any] = {id(model.config): model.config}
    for path, (name, method) in plan.items():
        module = model.get_submodule(path)
        _refusals(name, module)
        _one_device(name, module, method)
        if unknown := set(getattr(method, "wants", ())) - set(EXTRAS):
            raise Unsupported(f"{name}: the method wants {', '.join(sorted(unknown))}; the router has {', '.join(EXTRAS)}")
        methods[id(module)] = (name, method)
        configs[id(module.config)] = module.config
    key = f"rarefy-{next(_numbers)}"
    before = {i: c._attn_implementation_internal for i, c in configs.items()}
    _names.add(key)
    router = _Router(methods, before)
    watched = [router.watch(model.get_submodule(path), name) for path, (name, _) in plan.items()]
    ALL_ATTENTION_FUNCTIONS.register(key, router)
    ALL_MASK_ATTENTION_FUNCTIONS.register(key, sdpa_mask)
    try:
        for config in configs.values():
            config._attn_implementation_internal = key
        yield
    finally:
        for handle in watched:
            handle.remove()
        for i, config in configs.items():
            config._attn_implementation_internal = before[i]
        _names.discard(key)
        type(ALL_ATTENTION_FUNCTIONS)._global_mapping.pop(key, None)
        type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping.pop(key, None)
