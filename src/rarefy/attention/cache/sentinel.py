"""Sentinel tokens (Ren et al. 2023): a span of text is read through one closing token, and its own entries go.

A span is wrapped in an opening and a closing token. Tokens inside attend as ever; the closing token sees its own span alone;
later tokens see the closing token and whatever is in no span. Sentinels take the position of the token before them and are
not predicted (sec. 3).

Shape letters: B = batch, H = query heads, G = key heads, T = new tokens, M = entries held, D = head width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...errors import BadInput
from ...method import not_negative
from .entries import Entries, attend_entries, first_of
from .policy import Policy, PolicyLayer, Rotary

PLAIN, INSIDE, CLOSE = 0, 1, 2
"""What a token is: in no span, in one (its opening token too), or the token that stands for one."""


def kinds(ids_BT: Tensor, opening: int, closing: int, before_B2: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(kind [B, T], span [B, T] with -1 in none, state [B, 2] of spans opened and spans closed so far).

    Raises:
        BadInput: a span within a span, or a closing token without an opening one.
    """
    before = torch.zeros(len(ids_BT), 2, dtype=torch.long, device=ids_BT.device) if before_B2 is None else before_B2
    opens = before[:, :1] + (ids_BT == opening).cumsum(1)
    closes = before[:, 1:] + (ids_BT == closing).cumsum(1)
    if bool(((opens - closes < 0) | (opens - closes > 1)).any()):
        raise BadInput(f"spans must open ({opening}) and close ({closing}) in turn: one within another, or one closed before it opened, was given")
    close = ids_BT == closing
    kind = torch.where(close, CLOSE, torch.where(opens > closes, INSIDE, PLAIN))
    return kind, torch.where(kind == PLAIN, -1, opens - 1), torch.stack([opens[:, -1], closes[:, -1]], 1)


def allowed(q_kind: Tensor, q_span: Tensor, k_kind: Tensor, k_span: Tensor) -> Tensor:
    """[B, T, M] bool of queries [B, T] and entries [B, M], beside the causal rule."""
    own = (q_span[:, :, None] == k_span[:, None]) & (q_span[:, :, None] >= 0)
    return own | ((k_kind != INSIDE)[:, None] & (q_kind != CLOSE)[:, :, None])


@dataclass(frozen=True)
class Wrapped:
    """A text [T'] with sentinels, and what a model must be given with it."""

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    """-100 at sentinels and at the first token."""
    mask: Tensor
    """[T', T'] bool, causal rule included."""


def wrap(ids_T: Tensor, spans: Sequence[tuple[int, int]], opening: int, closing: int) -> Wrapped:
    """Put sentinels around spans [first, last) of a text.

    Raises:
        BadInput: spans that are empty, overlap, are out of order or out of the text; sentinels in the text.
    """
    last = 0
    for a, b in spans:
        if not last <= a < b <= len(ids_T):
            raise BadInput(f"span [{a}, {b}) of a text of {len(ids_T)} tokens is empty, out of it, or not behind the span before it")
        last = b
    if bool(((ids_T == opening) | (ids_T == closing)).any()):
        raise BadInput(f"the text holds a sentinel ({opening} or {closing}) already; choose token ids that it does not use")
    starts, ends = {a for a, _ in spans}, {b for _, b in spans}
    ids, positions = [], []
    for t, token in enumerate([*ids_T.tolist(), None]):
        ids += [closing] * (t in ends) + [opening] * (t in starts)
        positions += [max(0, t - 1)] * ((t in ends) + (t in starts))
        if token is not None:
            ids.append(token)
            positions.append(t)
    made = torch.tensor(ids, device=ids_T.device)
    kind, span, _ = kinds(made[None], opening, closing)
    causal = torch.ones(len(ids), len(ids), dtype=torch.bool, device=ids_T.device).tril()
    labels = made.masked_fill((made == opening) | (made == closing), -100)
    labels[0] = -100
    return Wrapped(made, torch.tensor(positions, device=ids_T.device), labels, causal & allowed(kind, span, kind, span)[0])


def sentinel_loss(model: nn.Module, ids_BT: Tensor, opening: int, closing: int, spans: int = 2, length: int = 16, seed: int = 0) -> Tensor:
    """Cross entropy in nats a token of texts with `spans` spans of `length` tokens at random places, the same count in each row.

    The paper trains the sentinels' embeddings and low-rank adapters with it; which parameters get a gradient is up to the caller.

    Raises:
        BadInput: spans that do not fit.
    """
    B, T = ids_BT.shape
    if spans * length > T:
        raise BadInput(f"{spans} spans of {length} tokens do not fit into {T}")
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for ids_T in ids_BT:
        free = torch.randperm(T - spans * length + spans, generator=generator)[:spans].sort().values.tolist()
        starts = [f + n * (length - 1) for n, f in enumerate(free)]
        rows.append(wrap(ids_T, [(a, a + length) for a in starts], opening, closing))
    mask = torch.stack([r.mask for r in rows])[:, None]
    bias = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)
    logits = model(
        input_ids=torch.stack([r.input_ids for r in rows]), position_ids=torch.stack([r.position_ids for r in rows]), attention_mask=bias,
        use_cache=False,
    ).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), torch.stack([r.labels for r in rows])[:, 1:].flatten())


class _Layer(PolicyLayer):
    policy: Sentinels

    def __init__(self, policy: Policy, index: int) -> None:
        super().__init__(policy, index)
        self.entries = Entries()
        self.state: Tensor | None = None

    def answer(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, at_BT: Tensor, *, scale: float, rotary: Rotary, hidden_BTD: Tensor | None
    ) -> Tensor:
        ids = self.policy.new_ids
        ids = torch.full_like(at_BT, -1) if ids is None else ids.to(at_BT.device).masked_fill(at_BT < 0, -1)
        kind_BT, span_BT, self.state = kinds(ids, self.policy.opening, self.policy.closing, self.state)
        heads = lambda x: x[:, None].expand(*k_BGTD.shape[:3]).int()  # noqa: E731
        self.entries.append(k=k_BGTD, v=v_BGTD, at=heads(at_BT), kind=heads(kind_BT), span=heads(span_BT))
        e = self.entries
        rule = allowed(kind_BT, span_BT, e["kind"][:, 0], e["span"][:, 0])
        out = attend_entries(q_BHTD, e["k"], e["v"], e["at"], at_BT, scale, allowed_BTM=rule)[0]
        closed_B11 = self.state[:, 1, None, None]
        gone = (e["kind"] == INSIDE) & (e["span"] < closed_B11) | (e["at"] < 0)
        if bool(gone.any()):
            stay_B = (~gone).sum(-1).amax(1)
            at = e["at"].masked_fill(gone, -1)
            self.entries.take(first_of(torch.zeros(at.shape, device=at.device), at, stay_B.clamp_min(1)))
        return out

    def kept(self) -> Tensor:
        return (self.entries["at"] >= 0).sum(-1)

    def tensors(self) -> dict[str, Tensor]:
        return self.entries.tensors() | ({} if self.state is None else {"state": self.state})

    def rows(self, take: Callable[[Tensor], Tensor]) -> None:
        self.entries.rows(take)
        if self.state is not None:
            self.state = take(self.state)


class Sentinels(Policy):
    """Entries of a span go as soon as its closing token was read; what is kept follows from the text, not from a budget.

    The model must have been trained to read through sentinels (`sentinel_loss`), and be given `position_ids` by the rule of
    `wrap`: generate counts sentinels as positions of their own, so after the prompt call the model itself.

    Args:
        budget: 1; there is no other.
        opening, closing: token ids of the sentinels.
    """

    name = "cache/sentinel"
    layer = _Layer

    def __init__(self, budget: float | list[float] = 1.0, opening: int = -1, closing: int = -1) -> None:
        super().__init__(budget)
        if min(self.budgets) < 1:
            raise BadInput(f"budget={budget}: what {self.name} keeps follows from the spans of the text; leave the budget at 1")
        self.opening, self.closing = int(not_negative("opening", opening)), int(not_negative("closing", closing))
        if opening == closing:
            raise BadInput(f"opening and closing are both {opening}; a span needs two different tokens")
        self.new_ids: Tensor | None = None
        """Token ids of the call at work."""

    @contextlib.contextmanager
    def on(self, model: nn.Module) -> Iterator[Sentinels]:
        """As Policy.on; token ids of each call are noted too."""

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.new_ids = args[0] if args else kwargs.get("input_ids")
            if self.new_ids is None:
                raise BadInput(f"{self.name} needs input_ids: embeddings do not say which tokens are sentinels")

        handle = model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            with super().on(model):
                yield self
        finally:
            handle.remove()
            self.new_ids = None
