"""Several needles in filler (Hsieh et al. 2024, RULER, multi-key and multi-query retrieval), in a small model's vocabulary.

`count` keys with their values stand at random places in filler; at the end some of the keys are asked for, each followed
by its value. Those not asked for are the distractors of RULER's multi-key task. One question of one needle is
`recall.needle`. (RULER's multi-value task, one key with several values, has no order of answers to teach and is left out.)

Shape letters: B = sequences, T = tokens, C = needles, K = questions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import BadInput
from ..method import positive
from .recall import Recall


def places(batch: int, room: int, count: int, size: int, generator: torch.Generator) -> Tensor:
    """[B, C] rising starts of `count` runs of `size` tokens that do not overlap within `room`; every way equally likely."""
    spare = room - count * (size - 1)
    if count > spare:
        raise BadInput(f"{count} pieces of {size} tokens do not fit into {room}; give a longer sequence or fewer pieces")
    chosen = torch.rand(batch, spare, generator=generator).argsort(1)[:, :count].sort(1).values
    return chosen + torch.arange(count) * (size - 1)


def needles(
    keys: Sequence[int], values: Sequence[int], filler: Sequence[int], length: int, count: int, batch: int, *, asked: int = 1, seed: int = 0
) -> Recall:
    """Sequences of `length` tokens: filler with `count` pairs in it, then `asked` of the keys, each with its value.

    Raises:
        BadInput: more needles than keys, more questions than needles, a length that does not hold them, empty values or filler.
    """
    positive("count", count, len(keys))
    positive("asked", asked, count)
    positive("batch", batch)
    if not (len(values) and len(filler)):
        raise BadInput("needles need values and filler tokens")
    generator = torch.Generator().manual_seed(seed)
    at_BC = places(batch, length - 2 * asked, count, 2, generator)
    key_BC = torch.as_tensor(keys)[torch.rand(batch, len(keys), generator=generator).argsort(1)[:, :count]]
    value_BC = torch.as_tensor(values)[torch.randint(len(values), (batch, count), generator=generator)]
    ids = torch.as_tensor(filler)[torch.randint(len(filler), (batch, length), generator=generator)]
    ids.scatter_(1, at_BC, key_BC).scatter_(1, at_BC + 1, value_BC)
    which_BK = torch.rand(batch, count, generator=generator).argsort(1)[:, :asked]
    question = length - 2 * asked + 2 * torch.arange(asked)
    ids[:, question], ids[:, question + 1] = key_BC.gather(1, which_BK), value_BC.gather(1, which_BK)
    answer = torch.zeros_like(ids, dtype=torch.bool)
    answer[:, question + 1] = True
    return Recall(ids, answer, int((question - at_BC.gather(1, which_BK)).min()))
