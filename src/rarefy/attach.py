"""Attention methods inside Hugging Face models, through transformers' own attention interface.

The interface is entered under a private name for the length of a `with` block, together with a mask function: without
one, transformers drops the padding mask of custom attention without a word.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import Unsupported

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
        self._checked: tuple[Tensor | None, Tensor | None] = (None, None)
        """The last mask and its real keys: every layer of a pass is given the same mask."""

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
        scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if id(module) not in self.methods:
            return self._dense(module)(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
            )
        name, method = self.methods[id(module)]
        if dropout:
            raise Unsupported(f"{name}: attention dropout is on; call model.eval() first")
        if kwargs.get("sliding_window") or kwargs.get("softcap"):
            raise Unsupported(f"{name}: sliding windows and capped logits are not served; leave this layer out")
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        if attention_mask is not None and self._checked[0] is not attention_mask:
            self._checked = (attention_mask, _padding(name, attention_mask, causal, query.shape[2], key.shape[2]))
        out_BHTD = method.attend(
            query, key, value, scale=query.shape[-1] ** -0.5 if scaling is None else scaling, causal=causal,
            padding_BS=None if attention_mask is None else self._checked[1], layer=getattr(module, "layer_idx", 0) or 0,
        )
        return out_BHTD.transpose(1, 2).contiguous(), None

    def _dense(self, module: nn.Module) -> Any:
        """transformers' sdpa attention, or an outer context's router: its plan still holds for what this one leaves alone."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        outer = self.before.get(id(module.config), "")
        return ALL_ATTENTION_FUNCTIONS[outer] if outer in _names else sdpa_attention_forward


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
        methods[id(module)] = (name, method)
        configs[id(module.config)] = module.config
    key = f"rarefy-{next(_numbers)}"
    before = {i: c._attn_implementation_internal for i, c in configs.items()}
    _names.add(key)
    ALL_ATTENTION_FUNCTIONS.register(key, _Router(methods, before))
    ALL_MASK_ATTENTION_FUNCTIONS.register(key, sdpa_mask)
    try:
        for config in configs.values():
            config._attn_implementation_internal = key
        yield
    finally:
        for i, config in configs.items():
            config._attn_implementation_internal = before[i]
        _names.discard(key)
        type(ALL_ATTENTION_FUNCTIONS)._global_mapping.pop(key, None)
        type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping.pop(key, None)
