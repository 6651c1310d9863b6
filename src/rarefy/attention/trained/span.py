"""Self-selected attention span (Jin et al. 2024, arXiv 2404.09336): the model writes which earlier spans it needs, and reads no others.

The text is a row of spans, each begun by a token that names it: a *name* or a *head*, of which span i has one each. A line begins with the head of
a name and may hold *reads*; from its `go` token on it sees

    the newest earlier span of its head's name, the newest earlier span of every name read in it, itself, and the first `sinks` tokens

until the next head or name. All other tokens see everything before them: the model chooses freely, and is bound by what it chose. Keys outside
the mask are not touched (`token_attention`). The markers' syntax is ours; the paper's is told in words. A model is trained on traces with markers
(`rarefy.tasks.arithmetic_spans`; scripts/train_spans.py), the masks in place or not.

Shape letters as in base.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...cost import Cost
from ...errors import BadInput
from ...kernels.block_attention import key_lists, token_attention
from ...method import positive
from ...selection import Selection, check_finite
from ..counted import Counted
from .base import causal_mask, masked_softmax


class Span(Counted):
    """Attention under masks parsed from the tokens; one object may serve all layers, inside `reading(model)`.

    Args:
        names, heads, reads: id of the first token of each kind; token i of a kind stands for span i. count: tokens of a kind.
        go: id of the token that ends the markers. sinks: first tokens always read.
    """

    name = "attention/span"
    fitted = "trained"

    def __init__(self, names: int, heads: int, reads: int, count: int, go: int, sinks: int = 1) -> None:
        super().__init__()
        for what, value in {"names": names, "heads": heads, "reads": reads, "go": go, "sinks": sinks}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise BadInput(f"{what}={value!r} must be a whole number, 0 or more")
        positive("count", count)
        kinds = sorted([(names, names + count), (heads, heads + count), (reads, reads + count), (go, go + 1)])
        if any(a[1] > b[0] for a, b in zip(kinds, kinds[1:], strict=False)):
            raise BadInput(f"the token kinds overlap: names={names}, heads={heads}, reads={reads} of count={count} each, go={go}")
        self.names, self.heads, self.reads, self.count, self.go, self.sinks = names, heads, reads, count, go, sinks
        self._ids_BS: Tensor | None = None

    @contextlib.contextmanager
    def reading(self, model: nn.Module) -> Iterator[None]:
        """Inside, the method sees the token ids that the model is called with, the cached ones before them included."""

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids, past = kwargs.get("input_ids", args[0] if args else None), kwargs.get("past_key_values")
            if ids is None:
                raise BadInput(f"{self.name} parses token ids; call the model with input_ids")
            cached = 0 if past is None else past.get_seq_length()
            if cached and (self._ids_BS is None or self._ids_BS.shape[1] < cached or len(self._ids_BS) != len(ids)):
                raise BadInput(f"{self.name}: {cached} tokens of {len(ids)} rows are in the cache that it was not given; begin with the prompt")
            self._ids_BS = torch.cat([self._ids_BS[:, :cached].to(ids.device), ids], 1) if cached and self._ids_BS is not None else ids

        handle = model.register_forward_pre_hook(see, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self._ids_BS = None

    def mask(self, ids_BS: Tensor, queries: int | None = None) -> Tensor:
        """[B, T, S] bool: what each of the last `queries` tokens (all, if None) reads."""
        T = ids_BS.shape[1] if queries is None else queries
        rows = [self._parse(ids, T) for ids in ids_BS.tolist()]
        return torch.stack(rows).to(ids_BS.device) if rows else torch.zeros(0, T, ids_BS.shape[1], dtype=torch.bool, device=ids_BS.device)

    def _parse(self, ids: list[int], T: int) -> Tensor:
        S = len(ids)
        mask = causal_mask(T, S)
        newest: dict[int, tuple[int, int]] = {}                  # name -> its newest span that has ended, [start, end)
        begun, own, line, bound = 0, -1, False, False
        wanted: list[tuple[int, int]] = []
        for s, token in enumerate(ids):
            named, headed, read = token - self.names, token - self.heads, token - self.reads
            begins = named if 0 <= named < self.count else headed if 0 <= headed < self.count else -1
            if begins >= 0:
                if own >= 0:
                    newest[own] = (begun, s)
                line, bound, begun, own = begins != named, False, s, begins
                wanted = [newest[own]] if line and own in newest else []
            elif line and not bound and 0 <= read < self.count and read in newest:
                wanted = [*wanted, newest[read]]
            elif line and token == self.go:
                bound = True
            if bound and s >= S - T:
                row = torch.zeros(S, dtype=torch.bool)
                for start, end in [(0, min(self.sinks, s + 1)), (begun, s + 1), *wanted]:
                    row[start:end] = True
                mask[s - S + T] = row
        return mask

    def attend(
        self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, scale: float, causal: bool = True, padding_BS: Tensor | None = None,
        layer: int = 0, ids_BS: Tensor | None = None,
    ) -> Tensor:
        """[B, H, T, D]; ids_BS are those of all keys, by default what `reading` saw. Padding is unseen, and padded queries give zeros.

        Raises BadInput without ids of these keys, or for attention that is not causal.
        """
        for what, x in {"queries": q_BHTD, "keys": k_BGSD, "values": v_BGSD}.items():
            check_finite(x, f"{what} of {self.name} in layer {layer}")
        mask = self._seen_by(q_BHTD, k_BGSD, ids_BS, causal, layer)
        if not q_BHTD.numel():
            return torch.zeros_like(q_BHTD)
        T, S, visible = q_BHTD.shape[2], k_BGSD.shape[2], causal_mask(q_BHTD.shape[2], k_BGSD.shape[2], q_BHTD.device)
        if padding_BS is not None:
            visible = visible & padding_BS[:, None] & padding_BS[:, S - T :, None]
        mask, H = mask & visible, q_BHTD.shape[1]
        self._shape = (H, q_BHTD.shape[3], S, T)
        self._kept += float(mask.sum()) * H
        self._seen += float(visible.expand_as(mask).sum()) * H
        return token_attention(q_BHTD, k_BGSD, v_BGSD, key_lists(mask[:, None]), scale=scale)

    def _seen_by(self, q_BHTD: Tensor, k_BGSD: Tensor, ids_BS: Tensor | None, causal: bool, layer: int) -> Tensor:
        ids, B, S = self._ids_BS if ids_BS is None else ids_BS, len(k_BGSD), k_BGSD.shape[2]
        if ids is None or ids.shape != (B, S) or not causal:
            got = "attention is not causal" if not causal else "it was given none" if ids is None else f"it was given {list(ids.shape)}"
            raise BadInput(f"{self.name} in layer {layer} parses the ids [{B}, {S}] of a causal model, but {got}; run it inside reading(model)")
        return self.mask(ids, q_BHTD.shape[2])

    def select(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, ids_BS: Tensor) -> Selection:
        """Pairs read, mask form [B, H, T, S]."""
        mask = self._seen_by(q_BHTD, k_BGSD, ids_BS, True, 0)[:, None].expand(-1, q_BHTD.shape[1], -1, -1)
        return Selection(mask.shape[-1], mask.to(q_BHTD.dtype), mask_=mask)

    def forward(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, ids_BS: Tensor) -> Tensor:
        """Causal attention with scale 1 / sqrt(D)."""
        return self.attend(q_BHTD, k_BGSD, v_BGSD, scale=q_BHTD.shape[3] ** -0.5, ids_BS=ids_BS)

    def reference(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, ids_BS: Tensor) -> Tensor:
        """Dense scores, pairs outside the mask at minus infinity."""
        if not q_BHTD.numel():
            return torch.zeros_like(q_BHTD)
        mask = self.select(q_BHTD, k_BGSD, v_BGSD, ids_BS).mask
        return masked_softmax(q_BHTD, k_BGSD, mask, q_BHTD.shape[3] ** -0.5) @ v_BGSD.repeat_interleave(q_BHTD.shape[1] // k_BGSD.shape[1], 1)

    def cost(self, density: float | None = None) -> Cost:
        """Per query at the context of the last call, all heads; bytes are keys and values in float32."""
        H, D, S = self.dims()
        density = self.budget if density is None else density
        return Cost(4 * H * D * S * density, 8 * H * D * S * density)
