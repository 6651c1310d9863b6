"""A stream that gives, beside each activation, the gradient of the model's own loss in it.

Shape letters: N = rows, D = width, B = contexts of a pass, T = tokens of a context, V = vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .errors import BadInput
from .site import replaced
from .streams import Batch, LiveStream


class GradientStream(LiveStream):
    """LiveStream whose targets are [x, g]: the activation, then the gradient in it of the loss summed over its context.

    The loss is the cross-entropy of each next token, so that g at a position is what it does to all that comes after. A
    buffer costs a whole forward and backward pass of its contexts, where LiveStream stops at the site.

    Args:
        model: one whose output has logits [B, T, V]. site: one stream site; there is no `target`. Others as for LiveStream.
    """

    def __init__(
        self, model: nn.Module, site: str, windows_NT: Tensor, size: int, *, buffer: int = 128, at_once: int = 16, seed: int = 0, skip: int = 1,
    ) -> None:
        super().__init__(model, site, windows_NT, size, buffer=buffer, at_once=at_once, seed=seed, skip=skip)

    @property
    def made_from(self) -> dict[str, Any]:
        """See Stream."""
        return {**super().made_from, "gradient": "next-token cross-entropy"}

    def take(self, ids_BT: Tensor) -> Batch:
        """(x [N, D], x and g side by side [N, 2 D]) of some contexts, in order."""
        there: list[Tensor] = []

        def put(x_BTD: Tensor) -> Tensor:
            there.append(x_BTD.detach().requires_grad_())
            return there[-1]

        ids_BT = ids_BT.to(next(self.model.parameters()).device)
        with torch.enable_grad(), replaced(self.model, {self.flow.sites[0]: put}):
            logits_BTV = getattr(self.model(input_ids=ids_BT), "logits", None)
            if logits_BTV is None:
                raise BadInput(f"{type(self.model).__name__} gives no logits, so that it has no loss; open it as a causal language model")
            logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
            loss = cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum")
        (leaf_BTD,) = there
        x_ND, g_ND = (v[:, self.skip :].flatten(0, 1) for v in (leaf_BTD.detach(), torch.autograd.grad(loss, leaf_BTD)[0]))
        return x_ND, torch.cat([x_ND, g_ND], -1)
