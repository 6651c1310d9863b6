"""Induction: does a model copy from its own context? Random tokens twice over; the second time all can be looked up.

Shape letters: B = sequences, H = heads, T = tokens, S = source tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..fidelity import Interval, ratio_interval
from ..method import positive
from .recall import repeated


@dataclass(frozen=True)
class Induction:
    """Loss in nats a token on the two copies, with intervals over sequences."""

    first: Interval
    second: Interval
    drop: Interval
    """first - second, paired within sequences: nats that looking back saves."""


@torch.no_grad()
def induction_score(
    model: nn.Module, tokens: Sequence[int], *, period: int = 64, batch: int = 16, start: int | None = None, seed: int = 0,
    at_once: int = 8,
) -> Induction:
    """Loss on a random sequence and on its immediate repetition (Olsson et al. 2022, "In-context Learning and Induction Heads").

    The first token of each copy is left out: nothing before it says what it is.

    Args:
        tokens: tokens to draw from, without repeats within one copy; at least `period` of them.
        period: tokens a copy, at least 2. batch: sequences. start: token put before the sequence.
    """
    positive("period", period)
    positive("batch", batch)
    if not 2 <= period <= len(tokens):
        raise BadInput(f"period={period} must be in [2, {len(tokens)}], the number of tokens to draw from")
    ids_BT = repeated(tokens, period, batch, start=start, seed=seed).input_ids
    device = next(model.parameters()).device
    parts = [_nats(model, some.to(device)).cpu() for some in ids_BT.split(at_once)]
    nats_BT = torch.cat(parts)[:, -(2 * period - 1) :]        # of tokens 1 .. 2 * period - 1 of the two copies
    first_B, second_B = nats_BT[:, : period - 1].sum(1), nats_BT[:, period:].sum(1)
    count_B = torch.full_like(first_B, period - 1)
    return Induction(*(ratio_interval(total, count_B) for total in (first_B, second_B, first_B - second_B)))


def _nats(model: nn.Module, ids_BT: Tensor) -> Tensor:
    logits = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].double()
    return -logits.log_softmax(-1).gather(-1, ids_BT[:, 1:, None]).squeeze(-1)


def prefix_matching(attention_BHTS: Tensor, period: int) -> Tensor:
    """[H]: mean attention that tokens of the second copy pay to the token after their own first appearance.

    Olsson et al. 2022, "prefix matching score". 1 is a perfect induction head.

    Args:
        attention_BHTS: probabilities over sequences whose last 2 * period tokens are the two copies.
    """
    positive("period", period)
    length = attention_BHTS.shape[-1]
    if attention_BHTS.ndim != 4 or attention_BHTS.shape[-2] != length or length < 2 * period:
        raise BadInput(f"attention {list(attention_BHTS.shape)} must be [B, H, T, T] with T at least 2 * period = {2 * period}")
    query = torch.arange(length - period, length, device=attention_BHTS.device)
    return attention_BHTS[:, :, query, query - period + 1].float().mean((0, 2))
