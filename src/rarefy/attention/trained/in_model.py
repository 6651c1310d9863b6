"""Training attention methods where they stand, through `fit.train`: the rows are token windows, the loss runs the model.

Shape letters: B = windows, T = tokens, V = vocabulary; others as in base.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from ...errors import BadInput
from ...families import config_of
from ...method import Loss, Sparse
from ...places import sites_of
from ...site import replaced
from ...streams import weights_digest
from .base import causal_mask


class _InModel(Sparse):
    """A plan of attention methods, one a layer, with the model that they are trained in."""

    unit = "key"
    fitted = "trained"

    def __init__(self, plan: Mapping[str, Sparse], model: nn.Module) -> None:
        super().__init__()
        if not plan:
            raise BadInput("the plan is empty: give at least one attention method, such as rarefy.plan('attention/seer', model)")
        self.names: dict[str, list[str]] = {}
        """Key of the plan -> the layers it names."""
        for (name, method), found in zip(plan.items(), sites_of(model, plan), strict=True):
            wrong = [site.name for site in found.values() if site.kind != "attention"]
            if wrong or not hasattr(method, "attend"):
                raise BadInput(f"{name}: {wrong[0] if wrong else type(method).__name__} is no attention; methods are trained at layers.N.attn")
            self.names[name] = list(found)
        self.methods = nn.ModuleList(plan.values())
        self._held = (model,)      # a tuple, so that the model is no part of what is trained and saved
        self._named = weights_digest(model)

    @property
    def plan(self) -> dict[str, Any]:
        """Layer or glob -> method, as `replaced` takes it."""
        return dict(zip(self.names, self.methods, strict=True))

    @property
    def arguments(self) -> dict[str, Any]:
        """What a run taken up again must agree with: the model it began from, and every method."""
        methods = {name: {"method": m.name, **m.arguments} for name, m in self.plan.items()}
        return {"objective": type(self).__name__.lower(), "model": self._named, "plan": methods}

    @property
    def budget(self) -> float:
        """The methods' mean."""
        return sum(m.budget for m in self.plan.values()) / len(self.methods)

    def after_step(self, step: int) -> None:
        """Each method's."""
        for method in self.plan.values():
            method.after_step(step)

    def windows(self, x: Tensor) -> Tensor:
        """Raise BadInput unless x is token windows [B, T] of two tokens or more, all of the model's vocabulary."""
        if x.ndim != 2 or x.is_floating_point() or x.shape[1] < 2:
            raise BadInput(f"attention is trained on token windows [contexts, tokens >= 2]; got {list(x.shape)} {x.dtype}")
        model: Any = self._held[0]
        count = getattr(model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None, "num_embeddings", None)
        least, most = (int(x.min()), int(x.max())) if x.numel() else (0, 0)
        if count and not 0 <= least <= most < count:
            raise BadInput(f"token ids must lie in 0..{count - 1}, the model's vocabulary; these lie in {least}..{most}: was another tokenizer used?")
        return x


def _through(model: nn.Module, ids_BT: Tensor) -> Any:
    more = {"use_cache": False} if hasattr(config_of(model), "use_cache") else {}
    return model(input_ids=ids_BT.to(next(model.parameters()).device), **more)


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of the model takes part in gradients of what is computed inside."""
    moved = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in moved:
            p.requires_grad_(False)
        yield
    finally:
        for p in moved:
            p.requires_grad_(True)


@contextlib.contextmanager
def _computed_again(model: nn.Module, inside: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """Layers under gradient checkpointing, which the backward pass computes a second time, are computed `inside` then too.

    Without it they would be computed dense, and unfrozen, as the contexts of the forward pass have ended.
    """
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and hasattr(m, "_gradient_checkpointing_func")]
    before = [layer._gradient_checkpointing_func for layer in layers]

    def wrapped(checkpoint: Any) -> Any:
        given = getattr(checkpoint, "keywords", {})
        if given.get("use_reentrant", True):
            return checkpoint                                    # the router refuses it by name

        def contexts() -> tuple[Any, Any]:
            first, second = given["context_fn"]() if "context_fn" in given else (contextlib.nullcontext(), contextlib.nullcontext())
            return first, _both(second, inside())

        return partial(checkpoint, context_fn=contexts)

    try:
        for layer, checkpoint in zip(layers, before, strict=True):
            layer._gradient_checkpointing_func = wrapped(checkpoint)
        yield
    finally:
        for layer, checkpoint in zip(layers, before, strict=True):
            layer._gradient_checkpointing_func = checkpoint


@contextlib.contextmanager
def _both(first: contextlib.AbstractContextManager[Any], second: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    with first, second:
        yield


class _Watched:
    """Dense attention at one layer, which lets the method of that layer compare itself with what it sees."""

    wants = ("hidden",)

    def __init__(self, method: Any, losses: list[Loss]) -> None:
        self.method, self.losses = method, losses

    def attend(
        self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, scale: float, causal: bool = True, padding_BS: Tensor | None = None,
        layer: int = 0, hidden_BTD: Tensor | None = None,
    ) -> Tensor:
        """Dense output; the method's loss is kept aside. Raises BadInput for padding, which would be learned from."""
        if padding_BS is not None:
            raise BadInput(f"{self.method.name} in layer {layer}: give windows of text without padding to train on")
        like = next(self.method.parameters())
        q, k, v, hidden = (None if x is None else x.detach().to(like.dtype) for x in (q_BHTD, k_BGSD, v_BGSD, hidden_BTD))
        with torch.enable_grad():
            self.losses.append(self.method.distil(q, k, v, scale=scale, causal=causal, hidden_BTD=hidden))
        mask = causal_mask(q_BHTD.shape[2], k_BGSD.shape[2], q_BHTD.device) if causal else None
        return scaled_dot_product_attention(q_BHTD, k_BGSD, v_BGSD, attn_mask=mask, scale=scale, enable_gqa=True)

    __call__ = attend


class Distilled(_InModel):
    """Methods that learn what dense attention does: the frozen model runs dense, each method estimates its own layer's map.

    Train it with `fit.train` on token windows without padding; afterwards put `plan` into the model. The model is no part of what
    is trained and checkpointed.

    Args:
        plan: layer (`layers.N.attn`) -> a method that has `distil`. model: in eval mode.

    Raises:
        BadInput: a model in training mode, a plan whose names are not attention, a name for several layers.
    """

    def __init__(self, plan: Mapping[str, Sparse], model: nn.Module) -> None:
        super().__init__(plan, model)
        if model.training:
            raise BadInput("the model is in training mode, where dropout alone would move its maps; call model.eval() first")
        for name, found in self.names.items():
            if len(found) > 1:
                raise BadInput(f"{name} names {len(found)} layers; each layer's map is learned by a method of its own, as rarefy.plan makes them")

    def loss(self, x: Tensor, y: Tensor) -> Loss:
        """Mean over layers of the methods' losses on windows [B, T], by part."""
        losses: list[Loss] = []
        watched = {name: _Watched(method, losses) for name, method in self.plan.items()}
        with torch.no_grad(), replaced(self._held[0], watched):
            _through(self._held[0], self.windows(x))
        parts: dict[str, Tensor] = {}
        for one in losses:
            for name, value in one.parts.items():
                parts[name] = parts.get(name, 0) + value / len(losses)
        return Loss(sum((one.total for one in losses), torch.zeros(())) / len(losses), parts)


class Trained(_InModel):
    """A language model with attention methods in place, trained by its next-token loss; parameters of both move.

    Methods without parameters (MoBA) are trained through the model's weights. After `fit.train`, `model` is the trained model, to be
    used inside `replaced(model, wrapper.plan)`.

    Args:
        plan: layer or glob -> method. train_model: False freezes the model: only the methods' parameters move.
    """

    def __init__(self, plan: Mapping[str, Sparse], model: nn.Module, train_model: bool = True) -> None:
        super().__init__(plan, model)
        self.train_model = train_model
        if train_model:
            self.model = model

    @property
    def arguments(self) -> dict[str, Any]:
        """See _InModel."""
        return {**super().arguments, "train_model": self.train_model}

    def loss(self, x: Tensor, y: Tensor) -> Loss:
        """Next-token cross entropy (nats a token) of windows [B, T], and the mean of the methods' own penalties where they have any."""
        ids = self.windows(x)
        model = self._held[0]

        def inside() -> contextlib.AbstractContextManager[None]:
            return _both(contextlib.nullcontext() if self.train_model else _frozen(model), replaced(model, self.plan))

        with inside(), _computed_again(model, inside):
            logits = _through(model, ids).logits
        ce = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten().to(logits.device))
        extra = [m.penalty() for m in self.plan.values() if hasattr(m, "penalty")]           # what a method charges for its last call
        parts = {"ce": ce} | {name: torch.stack([one.parts[name] for one in extra]).mean() for name in (extra[0].parts if extra else ())}
        return Loss(ce + torch.stack([one.total for one in extra]).mean() if extra else ce, parts)
